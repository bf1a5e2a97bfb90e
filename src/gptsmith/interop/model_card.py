"""README.md of an exported model: what it is and how to open it."""

from importlib.metadata import version

import torch

from gptsmith.interop.external_model import ExportableModel
from gptsmith.interop.hf_mapping import transformers_class
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import parameters
from gptsmith.model.lora import LoraConfig


def text(model: ExportableModel, config: ModelConfig, dtype: torch.dtype) -> str:
    """The model card of a complete model, exported as `config`."""
    facts = {
        "class": f"`{transformers_class(config)}` of transformers, no custom code",
        "parameters": f"{parameters(config):,} in {str(dtype).removeprefix('torch.')}",
        "context": f"{config.context_length:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
    }
    if config.labels:
        facts["classes"] = ", ".join(config.labels)
    if model.imported_from:
        facts["origin"] = f"imported from `{model.imported_from}`"
    if not config.labels:
        has_template = model.chat_template is not None
        facts["chat"] = "chat template included" if has_template else "none: it continues text"
    auto, task, use = "AutoModelForCausalLM", "text-generation", _USE
    if model.chat_template:
        use = _USE_CHAT
    if config.labels:
        auto, task, use = "AutoModelForSequenceClassification", "text-classification", _USE_CLASSES
    return _CARD.format(
        header=f"library_name: transformers\npipeline_tag: {task}\ntags: [gptsmith]",
        name=model.name,
        version=version("gptsmith"),
        description="\n".join(f"- {name}: {value}" for name, value in facts.items()),
        code=_OPEN.format(auto=auto) + use,
    )


def adapter_text(base: ExportableModel, lora: LoraConfig) -> str:
    """The model card of a LoRA adapter, exported together with its base model."""
    auto = f"AutoPeftModelFor{'SequenceClassification' if base.config.labels else 'CausalLM'}"
    return _CARD.format(
        header="library_name: peft\ntags: [gptsmith, lora]",
        name=base.name,
        version=version("gptsmith"),
        description=f"A LoRA adapter of rank {lora.rank} (alpha {lora.alpha:g}). {_BASE}",
        code=f'from peft import {auto}\n\nmodel = {auto}.from_pretrained(".")  # of this file\n',
    )


_CARD = """\
---
{header}
---

# {name}

Exported with gptsmith {version}.

{description}

```python
{code}```

Training data, quality, safety and licence are not described here: add them before publishing.
"""
_BASE = """\
Its base model is in `base`.
`base_model_name_or_path` in `adapter_config.json` has the absolute path of that folder: change it
when you move the folder."""
_OPEN = """\
from transformers import {auto}, AutoTokenizer

folder = "."  # of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder)
"""
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
