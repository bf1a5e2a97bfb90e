"""Train part of a model: low-rank adapters, embeddings of new tokens, unfrozen parameters.

The first two wrap modules of an existing model; `merge` unwraps them. LoRA: Hu et al. 2021.
B batch, T time, C channels, V vocabulary, r rank, n trainable rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptsmith.arguments import check_several
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import LoraConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.quantized import QuantizedLinear, quantized_layers, restore_linears

LINEAR = nn.Linear | QuantizedLinear  # what adapters are attached to


class LoraLinear(nn.Module):
    """A frozen linear layer, quantized or not, plus the low-rank update B @ A, with A (r, in) and
    B (out, r).

    B starts at zero and A as in peft, so initially the output is unchanged.
    """

    def __init__(self, base: nn.Linear | QuantizedLinear, config: LoraConfig) -> None:
        super().__init__()
        self.base: nn.Linear | QuantizedLinear = base.requires_grad_(False)
        like = base.scales if isinstance(base, QuantizedLinear) else base.weight
        self.lora_A = nn.Parameter(like.new_empty(config.rank, base.in_features))
        self.lora_B = nn.Parameter(like.new_zeros(base.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(self.dropout(x), self.lora_A)  # (B, T, r)
        return self.base(x) + self.scale * F.linear(low, self.lora_B)

    def plain(self) -> nn.Linear:
        """The frozen layer, dequantized if it is quantized."""
        base = self.base
        return base.dequantized() if isinstance(base, QuantizedLinear) else base

    def update(self) -> Tensor:
        """The low-rank update (out, in), fp32."""
        return self.scale * (self.lora_B.float() @ self.lora_A.float())

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        linear = self.plain()
        linear.weight += self.update().to(linear.weight.dtype)
        return linear


class TrainableTokens(nn.Module):
    """A frozen table (V, C), embedding or output head, whose rows `ids` are trained.

    The rows are a separate parameter, so gradients and checkpoints contain no other rows.
    """

    def __init__(self, base: nn.Embedding | nn.Linear, ids: Sequence[int]) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        V, device = base.weight.shape[0], base.weight.device
        self.num_embeddings = V
        self.register_buffer("ids", torch.tensor(ids, device=device), persistent=False)  # (n,)
        slot = torch.full((V,), -1, device=device)
        slot[self.ids] = torch.arange(len(ids), device=device)
        self.register_buffer("slot", slot, persistent=False)  # (V,): index into rows, or -1
        self.rows = nn.Parameter(base.weight.detach()[self.ids].clone())  # (n, C)

    ids: Tensor
    slot: Tensor

    @property
    def weight(self) -> Tensor:
        """The whole table (V, C). Without gradients, as in generation, the rows are written into
        the frozen table, which costs nothing; otherwise it is a copy."""
        if torch.is_grad_enabled():
            return self.base.weight.index_copy(0, self.ids, self.rows)
        return self.merged().weight

    def forward(self, ids: Tensor) -> Tensor:
        slot = self.slot[ids].unsqueeze(-1)  # (B, T, 1)
        trained = F.embedding(slot.squeeze(-1).clamp(min=0), self.rows)  # (B, T, C)
        return torch.where(slot >= 0, trained, F.embedding(ids, self.base.weight))

    @torch.no_grad()
    def merged(self) -> nn.Embedding | nn.Linear:
        self.base.weight[self.ids] = self.rows
        return self.base


def attach(model: GPTModel, config: LoraConfig, token_ids: Sequence[int] = ()) -> None:
    """Wrap the target layers of `model` in place and freeze everything else.

    Parameters without pretrained values stay trainable: the head of a classifier, and the rows
    `token_ids` of the embedding and of an untied head (see train_token_rows). Parameters get the
    names `blocks.0.attention.qkv.lora_A`, `.lora_B` and `.base.weight`, until `merge`.
    Raises ValueError for a target that the blocks do not have.
    """
    assert config.rank > 0
    assert not any(isinstance(m, LoraLinear | TrainableTokens) for m in model.modules())
    linears = {n: m for n, m in model.blocks.named_modules() if isinstance(m, LINEAR)}
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    for target in config.targets:
        if target not in kinds:
            raise ValueError(
                f"lora.targets has {target!r}: the linear layers of this model's blocks are "
                f"{', '.join(kinds)}"
            )
    model.requires_grad_(False)
    for name, linear in linears.items():
        if not config.targets or name.rpartition(".")[2] in config.targets:
            model.blocks.set_submodule(name, LoraLinear(linear, config).train(model.training))
    if isinstance(model, GPTClassifier):
        model.score.requires_grad_(True)
    train_token_rows(model, token_ids)


def train_token_rows(model: GPTModel, token_ids: Sequence[int]) -> None:
    """Train the rows `token_ids` of the embedding and of an untied head if these are frozen.

    Freeze first. The rows are the parameters `embedding.token.rows` and `head.rows` (n, C), in the
    order of token_ids. Raises ValueError for an id outside the vocabulary or given twice.
    """
    V = model.config.vocab_size
    if len(set(token_ids)) < len(token_ids) or not all(0 <= i < V for i in token_ids):
        raise ValueError(f"token ids {list(token_ids)} to train: give each once, in 0..{V - 1}")
    tables = {"embedding.token": model.embedding.token, "head": model.head}
    for name, table in tables.items():
        if table is not None and token_ids and not table.weight.requires_grad:
            model.set_submodule(name, TrainableTokens(table, token_ids))


def merge(model: GPTModel) -> None:
    """Merge adapters and trained rows into the weights, in place. Afterwards the model has its
    plain modules and names, none of them quantized, and all parameters are trainable."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear | TrainableTokens):
            model.set_submodule(name, module.merged())
    restore_linears(model)  # those without an adapter
    model.requires_grad_(True)


def is_wrapped(model: nn.Module) -> bool:
    """Whether a model has adapters or trained rows that are not merged."""
    return any(isinstance(m, LoraLinear | TrainableTokens) for m in model.modules())


@torch.no_grad()
def merged_state_dict(model: nn.Module, *, adapters: bool = True) -> dict[str, Tensor]:
    """The weights that `merge` would leave, by their plain names; the model stays as it is.

    adapters: False gives those of the layers without their low-rank updates.
    """
    wrapped = {
        n: m for n, m in model.named_modules() if isinstance(m, LoraLinear | TrainableTokens)
    }
    inside = tuple(f"{name}." for name in wrapped)
    found = {n: p.detach() for n, p in model.named_parameters() if not n.startswith(inside)}
    for name, module in wrapped.items():
        if isinstance(module, TrainableTokens):
            found[f"{name}.weight"] = module.base.weight.index_copy(0, module.ids, module.rows)
            continue
        linear = module.plain()
        found |= {f"{name}.{n}": p.detach() for n, p in linear.named_parameters()}
        if adapters:
            found[f"{name}.weight"] = linear.weight + module.update().to(linear.weight.dtype)
    for name, layer in quantized_layers(model):  # those without an adapter
        if not name.startswith(inside):
            found[f"{name}.weight"] = layer.weight
    return found


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop training the parameters whose names match (`embedding.*`, `blocks.[0-3].*`).

    Raises ValueError for a pattern that matches nothing, and if nothing is left to train.
    """
    check_several(patterns, "patterns")
    names = dict(model.named_parameters())
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(
                f"freeze pattern {pattern!r} matches no parameter of {', '.join(names)[:160]}, ..."
            )
        for name in found:
            names[name].requires_grad_(False)
    if not any(p.requires_grad for p in names.values()):
        raise ValueError(f"freeze {list(patterns)} leaves nothing to train: remove a pattern")


def trainable_summary(model: nn.Module) -> str:
    """How many parameters of a model are trained, as text."""
    total = sum(p.numel() for p in model.parameters())
    total += sum(m.in_features * m.out_features for _, m in quantized_layers(model))
    some = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{some:,} of {total:,} parameters are trained ({some / total:.1%})"
