"""README.md of an exported model: what it is and how to open it."""

from importlib.metadata import version

import torch

from gptsmith.interop.external_model import ExportableModel
from gptsmith.interop.hf_mapping import transformers_class
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import parameters
from gptsmith.model.lora import LoraConfig


def text(model: ExportableModel, config: ModelConfig, dtype: torch.dtype) -> str:
    """The card of a whole model, exported as `config`."""
    cls = transformers_class(config)
    auto = "AutoModelForSequenceClassification" if config.labels else "AutoModelForCausalLM"
    source = model.imported_from
    facts = {
        "class": f"`{cls}` of transformers, no custom code",
        "parameters": f"{parameters(config):,} in {str(dtype).removeprefix('torch.')}",
        "context": f"{config.context_length:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        **({"classes": ", ".join(config.labels)} if config.labels else {}),
        **({"origin": f"imported from `{source}`"} if source else {}),
        "chat": "chat template included" if model.chat_template else "none: it continues text",
    }
    if config.labels:
        del facts["chat"]
    rows = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    task = "text-classification" if config.labels else "text-generation"
    use = _USE_CLASSES if config.labels else _USE_CHAT if model.chat_template else _USE
    return f"""\
---
library_name: transformers
pipeline_tag: {task}
tags: [gptsmith]
---

# {model.name}

Exported with gptsmith {version("gptsmith")}.

{rows}

```python
from transformers import {auto}, AutoTokenizer

folder = "."  # of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder)
{use}```

{_DISCLAIMER}"""


def adapter_text(base: ExportableModel, lora: LoraConfig) -> str:
    """The card of a LoRA adapter, exported together with its base model."""
    kind = "SequenceClassification" if base.config.labels else "CausalLM"
    auto = f"AutoPeftModelFor{kind}"
    return f"""\
---
library_name: peft
tags: [gptsmith, lora]
---

# {base.name}

A LoRA adapter of rank {lora.rank} (alpha {lora.alpha:g}).
Exported with gptsmith {version("gptsmith")}.
Its base model is in `base`. `base_model_name_or_path` in `adapter_config.json` has the absolute
path of that folder: change it when you move the folder.

```python
from peft import {auto}

model = {auto}.from_pretrained(".")  # the folder of this file
```

{_DISCLAIMER}"""


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
_DISCLAIMER = """\
Training data, quality, safety and licence are not described here: add them before publishing.
"""
