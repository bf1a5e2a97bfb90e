"""Runs of small models for every transformers class that we export to, and their exports opened."""

from pathlib import Path
from typing import Any

import torch
from random_weights import add_noise
from runs import random_run
from torch import Tensor
from transformers import AutoModelForCausalLM, logging

from gptsmith.chat_template.template import TEMPLATE
from gptsmith.commands.export import exportable
from gptsmith.interop import hf
from gptsmith.interop import peft as adapters
from gptsmith.interop.peft import Adapter
from gptsmith.model.config import ModelConfig, RopeScaling
from gptsmith.model.lora import LoraConfig, attach
from gptsmith.model.tuning import Tuning, trainable_state_dict
from gptsmith.run import CheckpointName, Run, layout
from gptsmith.run.create import open_for_training
from gptsmith.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog; it barks: woof! 0123456789\n"
TOKENIZER = Tokenizer.train_bpe([TEXT * 3], 280)
V, T = TOKENIZER.vocab_size, 64
IDS = torch.randint(0, V - 1, (3, 12), generator=torch.Generator().manual_seed(1))
SMALL = dict(n_layer=2, n_head=4, n_embd=32, context_length=T, vocab_size=V)
LLAMA3 = RopeScaling(rope_type="llama3", factor=4, original_max_position_embeddings=16)
AXES: dict[str, dict[str, Any]] = {
    "gpt2": dict(norm="layernorm", mlp="gelu", position="learned", bias="all"),
    "gpt2 untied": dict(
        norm="layernorm", mlp="gelu", position="learned", bias="all", tie_embeddings=False
    ),
    "gpt2 erf": dict(norm="layernorm", mlp="gelu_erf", position="learned", bias="all"),
    "llama": dict(n_kv_head=2, tie_embeddings=False),
    "llama tied": dict(norm_eps=1e-6, rope_theta=500.0),
    "llama biased": dict(bias="all", n_kv_head=1),
    "llama linear": dict(rope_scaling=RopeScaling(rope_type="linear", factor=2)),
    "llama3": dict(rope_scaling=LLAMA3, rope_theta=100.0),
    "llama wide heads": dict(head_dim=16, tie_embeddings=False),
    "qwen2": dict(bias="qkv", n_kv_head=2),
    "qwen3": dict(qk_norm=True, head_dim=16, n_kv_head=2, tie_embeddings=False),
    "arcee": dict(mlp="relu2", n_kv_head=2),
}


def export(run: Run, out: Path, dtype: torch.dtype | None = None) -> list[str]:
    return hf.export(exportable(run), out, dtype)


def export_adapter(run: Run, out: Path, checkpoint: CheckpointName = "last") -> None:
    hf.export_adapter(exportable(run, base=True), run.load_adapter(checkpoint), out)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return getattr(out := model(ids), "logits", out)


def opened(folder: Path, auto: Any = AutoModelForCausalLM) -> Any:
    """The model of transformers; every tensor must have been used."""
    logging.disable_progress_bar()
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def save_adapter(run: Run, tensors: dict[str, Tensor], step: int) -> None:
    folder, header = run.path / layout.ADAPTER, {"which": "last", "step": str(step)}
    folder.mkdir(exist_ok=True)
    adapter = Adapter(run.tuning.lora, tensors, run.tuning.token_ids)
    adapters.save(folder, run.model_config, adapter, header)


def lora_run(path: Path, config: ModelConfig, new: list[str]) -> Run:
    tokenizer = TOKENIZER.add_special_tokens(new)
    config = config.change(vocab_size=tokenizer.vocab_size + 3)
    ids = tuple(tokenizer.special_tokens[name] for name in new)
    tuned = Tuning(lora=LoraConfig(rank=3, alpha=6), token_ids=ids)
    base = random_run(path.with_name("base of it"), config, tokenizer).load_model()
    template = TEMPLATE if new else None
    tensors = {name: t.clone() for name, t in base.state_dict().items()}
    run = open_for_training(
        path, {}, config, tokenizer, tuning=tuned, base=tensors, template=template
    )
    attach(base, tuned.lora, ids)
    torch.manual_seed(5)
    add_noise(base, 0.2)
    save_adapter(run, trainable_state_dict(base), step=1)
    run.close()
    return run
