"""README.md of an exported model: what it is and how it opens, no more than is known."""

from pathlib import Path

import torch

from gptsmith import __version__
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import parameters
from gptsmith.model.stock import stock_class
from gptsmith.run import Run


def text(run: Run, config: ModelConfig, dtype: torch.dtype) -> str:
    """The card of a whole model, exported from `run` as `config`."""
    cls = stock_class(config)
    auto = "AutoModelForSequenceClassification" if config.labels else "AutoModelForCausalLM"
    source = str(run.config.get("import", ""))  # of a path on this machine, only its end
    source = source if "revision" in run.config else Path(source).name
    facts = {
        "class": f"`{cls}` of transformers, no custom code",
        "parameters": f"{parameters(config):,} in {str(dtype).removeprefix('torch.')}",
        "context": f"{config.context_length:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        **({"classes": ", ".join(config.labels)} if config.labels else {}),
        **({"origin": f"imported from `{source}`"} if source else {}),
        "chat": "chat template included" if run.template else "none: it continues text",
    }
    if config.labels:
        del facts["chat"]
    rows = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    task = "text-classification" if config.labels else "text-generation"
    use = _USE_CLASSES if config.labels else _USE_CHAT if run.template else _USE
    return f"""\
---
library_name: transformers
pipeline_tag: {task}
tags: [gptsmith]
---

# {run.path.resolve().name}

Exported with gptsmith {__version__}.

{rows}

```python
from transformers import {auto}, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder)
{use}```

{_HONEST}"""


def adapter_text(run: Run) -> str:
    """The card of a LoRA adapter that lies beside its base model."""
    lora = run.tuning.lora
    auto = (
        "AutoPeftModelForSequenceClassification"
        if run.model_config.labels
        else "AutoPeftModelForCausalLM"
    )
    return f"""\
---
library_name: peft
tags: [gptsmith, lora]
---

# {run.path.resolve().name}

A LoRA adapter of rank {lora.rank} (alpha {lora.alpha:g}), exported with gptsmith {__version__}.
The model that it changes lies in `base`. `base_model_name_or_path` in `adapter_config.json` says
where that is: change it when you move the folder.

```python
from peft import {auto}

model = {auto}.from_pretrained(".")  # where this file lies
```

{_HONEST}"""


_USE = """\
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
"""
_USE_CHAT = """\
ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt",
    return_dict=True,
)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
"""
_USE_CLASSES = """\
ids = tokenizer("some text", return_tensors="pt")
print(model.config.id2label[model(**ids).logits.argmax().item()])
"""
_HONEST = """\
Nothing is said here of data, quality, safety or licence: they follow from what it was trained on.
"""
