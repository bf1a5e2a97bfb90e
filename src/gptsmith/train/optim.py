"""Optimizers: AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

Muon: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the update is scaled to the RMS of
AdamW's, 0.2 * sqrt(max(rows, columns)), so that both share one learning rate and weight decay
(Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).

With several ranks, each parameter has one owner, which keeps its state, computes its update and
sends it to the others (ZeRO stage 1, Rajbhandari et al. 2020, by whole parameters, since Muon
orthogonalises whole matrices).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptsmith.train import distributed, sharding
from gptsmith.train.checkpoint_writer import HostMemory
from gptsmith.train.options import OptimConfig
from gptsmith.train.runtime import cpu_has_bf16

# Quintic iterations x <- a x + b (x x') x + c (x x')^2 x that push all singular values of a matrix
# towards 1. Each is the optimal polynomial for the interval that the previous one leaves, from
# "The Polar Express" (Amsel et al. 2025), with l = 1e-3 and their safety factor.
_POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@torch.no_grad()
def orthogonalize(x: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix to each matrix in x (N, rows, columns), approximately.

    The iteration tolerates bfloat16 (Jordan et al. 2024).
    """
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    for a, b, c in _POLAR:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


# PyTorch's own methods import its compiler, 1.4 s of CPU time, to keep themselves out of graphs; no
# optimizer is in a graph of ours.
_add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)


class AdamW(torch.optim.AdamW):
    add_param_group = _add_param_group
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum, for matrices (rows, columns).

    splits: parameter -> row counts of the matrices fused in it (q, k and v are fused into one);
    each is orthogonalised separately. Matrices of equal shape go through the iteration as a batch.
    owners: of sharded parameters; the rank that gathers and orthogonalises the whole matrix.
    """

    add_param_group = _add_param_group

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        splits: Mapping[nn.Parameter, tuple[int, ...]],
        dtype: torch.dtype,
        owners: Mapping[Tensor, int] | None = None,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.splits = splits
        self.dtype = dtype
        self.owners = owners

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            weights = [sharding.local(p) for p in params]
            grads = [sharding.local(p.grad) for p in params]
            buffers = [sharding.local(self.state[p]["momentum"]) for p in params]
            mu = group["momentum"]
            torch._foreach_lerp_(buffers, grads, 1 - mu)
            nesterov = torch._foreach_lerp(grads, buffers, mu)
            updates = dict(zip(params, nesterov, strict=True))
            del nesterov  # of a sharded parameter, the rows are not needed once they are gathered
            targets: dict[Tensor, Tensor] = dict(zip(params, weights, strict=True))
            if self.owners is not None:
                updates = sharding.gather_rows(updates, self.owners)
                targets = {p: torch.zeros_like(update) for p, update in updates.items()}
            shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p, update in updates.items():
                rows = self.splits.get(p, (p.shape[0],))
                for part, target in zip(update.split(rows), targets[p].split(rows), strict=True):
                    shapes.setdefault(tuple(part.shape), []).append((part, target))
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for shape, pairs in shapes.items():
                stack = torch.stack([part for part, _ in pairs]).to(self.dtype)
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                deltas = orthogonalize(stack).float().unbind()
                torch._foreach_add_([target for _, target in pairs], deltas, alpha=-rate)
            if self.owners is not None:
                changes = sharding.scatter_rows(targets, {p: self.owners[p] for p in params})
                torch._foreach_add_(weights, [changes[p] for p in params])


_FIELDS: dict[type, tuple[str, ...]] = {
    AdamW: ("step", "exp_avg", "exp_avg_sq"),
    Muon: ("momentum",),
}


class Optimizer:
    """The optimizers of one model behind a single interface, with their state as named tensors.

    owners: parameter -> the rank that keeps its state and updates it; empty for a sharded model, of
    which each rank has some rows of every parameter and of its state. With several ranks, `step`,
    `state_tensors` and `load_state_tensors` are called by all of them.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, device_type: str) -> None:
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        ranks, is_sharded = distributed.world_size(), sharding.is_sharded(model)
        matrices = {
            p: n
            for p, n in self.names.items()
            if config.kind == "muon"
            and p.dim() == 2
            and n.startswith("blocks.")
            and ".lora_" not in n  # low-rank factors train better with AdamW (docs/log.md)
        }
        rest = [p for p in self.names if p not in matrices]
        groups: list[dict[str, Any]] = [
            dict(params=[p for p in rest if p.dim() >= 2], weight_decay=config.weight_decay),
            dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0),
        ]
        factor = config.embedding_lr_scale if matrices else 1.0
        self.optimizers: list[torch.optim.Optimizer] = []
        if rest:
            adamw = AdamW(
                [dict(g, factor=factor) for g in groups if g["params"]],
                lr=config.learning_rate,
                betas=(config.beta1, config.beta2),
                fused=True,
            )
            self.optimizers.append(adamw)
        if matrices:
            muon = Muon(
                matrices,
                lr=config.learning_rate,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                splits={p: split for p, n in matrices.items() if (split := fused_rows(model, n))},
                dtype=torch.bfloat16 if _has_fast_bf16(device_type) else torch.float32,
                owners=share({p: p.numel() for p in matrices}, ranks) if is_sharded else None,
            )
            self.optimizers.append(muon)
        sizes = {p: p.numel() * (1 if p in matrices else 2) for p in self.names}  # of the state
        self.owners = {} if is_sharded else share(sizes, ranks)

    def set_learning_rate(self, rate: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("factor", 1.0)

    def step(self) -> None:
        for p, owner in self.owners.items():
            if owner != distributed.rank():
                p.grad = None  # so it is not updated here
        for optimizer in self.optimizers:
            optimizer.step()
        distributed.broadcast_tensors(self.owners)

    def zero_grad(self) -> None:
        for p in self.names:
            p.grad = None

    def state_tensors(self, memory: HostMemory | None = None) -> dict[str, Tensor]:
        """The complete optimizer state: `PARAMETER|FIELD` -> tensor, copied if there is `memory`.
        With several ranks, rank 0 gets it, on the CPU; the others get nothing."""
        own = {
            f"{name}|{field}": value
            for optimizer in self.optimizers
            for p, name in self.names.items()
            if (state := optimizer.state.get(p))
            for field, value in state.items()
        }
        gather = distributed.gather_owned if self.owners else sharding.gather_sharded
        return gather(own, memory)

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state_tensors`, of which each rank keeps its part; ValueError for state
        that does not fit the model. tensors: for a sharded model, this rank's rows of them."""
        by_name = {name: p for p, name in self.names.items()}
        owner = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for key, value in tensors.items():
            name, _, field = key.rpartition("|")
            p = by_name.get(name)
            if (
                p is None
                or field not in _FIELDS[type(owner[p])]
                or (value.dim() and value.shape != sharding.local(p).shape)
            ):
                raise ValueError(
                    f"optimizer state {key!r} {tuple(value.shape)} does not fit this model and "
                    "optimizer: keep model and optim.kind unchanged"
                )
            if self.owners.get(p, distributed.rank()) != distributed.rank():
                continue
            value = value.to(p.device)
            owner[p].state[p][field] = sharding.sharded_like(value, p) if value.dim() else value


def share(sizes: Mapping[Any, int], ranks: int) -> dict[Any, int]:
    """A rank for each key, so that the sums of their sizes are about equal: the largest first, each
    to the rank that has least (Graham 1969)."""
    loads, found = [0] * ranks, {}
    for key in sorted(sizes, key=lambda key: -sizes[key]):
        found[key] = loads.index(min(loads))
        loads[found[key]] += sizes[key]
    return found


def fused_rows(model: nn.Module, name: str) -> tuple[int, ...] | None:
    """Row counts of the matrices fused in parameter `name`, as its module declares them."""
    return getattr(model.get_submodule(name.rpartition(".")[0]), "fused_rows", None)


def _has_fast_bf16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and cpu_has_bf16()
