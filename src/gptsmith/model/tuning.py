"""Tuning: which weights of a model are trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from gptsmith.model import lora, state_dict
from gptsmith.model.config import LoraConfig, Quantization
from gptsmith.model.gpt import GPTModel


class Tuning(BaseModel):
    """What is trained: all weights, adapters (LoRA), or the parameters that no pattern freezes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    lora: LoraConfig = LoraConfig()
    freeze: tuple[str, ...] = ()
    """Patterns of parameter names that are not trained (`blocks.0.*`)."""
    quantize: Quantization | None = None
    """Format of the linear layers of the blocks, which are frozen then (default: not quantized)."""
    token_ids: tuple[int, ...] = ()
    """New tokens, whose embeddings are trained in any case."""

    @property
    def is_full_finetune(self) -> bool:
        """Whether all weights are trained."""
        return not self.lora.rank and not self.freeze

    def wrap(self, model: GPTModel) -> None:
        """Prepare the model for training, in place; `lora.merge` undoes it."""
        if self.lora.rank:
            lora.attach(model, self.lora, self.token_ids)
        elif self.freeze:
            lora.freeze(model, self.freeze)
            lora.train_token_rows(model, self.token_ids)


def trainable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name: what a checkpoint of a fine-tuned model contains."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trainable_state_dict(
    model: nn.Module, tensors: Mapping[str, Tensor], origin: str | Path
) -> None:
    """Copy `tensors` into the trained parameters of `model`; the names must be the same.

    Raises ValueError as state_dict.load does.
    """
    load_parameters(trainable_state_dict(model), tensors, origin)


def load_parameters(
    parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str | Path
) -> None:
    """`load_trainable_state_dict` for parameters that are given by name."""
    state_dict.check(parameters, tensors, origin)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
