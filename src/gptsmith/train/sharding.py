"""Weights, gradients and optimizer state divided among the ranks: PyTorch's `fully_shard` (FSDP2).

A parameter of a sharded model is a DTensor, of which each rank has some rows: those of
torch.chunk(parameter, ranks). A block's parameters are gathered for its forward and its backward
pass, and its gradients are added up and divided as soon as they are computed. Parameters outside
the blocks (embedding, final norm, head) stay gathered from the forward to the backward pass, since
the loss uses the head in between, which may be the embedding.

Zhao et al. 2023, "PyTorch FSDP"; Rajbhandari et al. 2020, "ZeRO", stage 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptsmith.train import distributed, runtime

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

    from gptsmith.train.checkpoint_writer import HostMemory

_FORWARD = "run_as_forward"


def shard(model: nn.Module, device: torch.device, compile_blocks: bool = False) -> None:
    """Divide `model`, in place. For several ranks, of which each keeps its rows of what it has.

    model: with `blocks`; anywhere: they are moved to the device one at a time. device: of this
    rank. compile_blocks: compile each block, for training.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    assert distributed.world_size() > 1
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for block in _blocks(model):
        if compile_blocks:
            _compile_in_training(block)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # A loss is computed as if it were the model's forward: what it returns needs a gradient even
    # where only the head is trained, and at the end of its backward pass gradients are added up.
    setattr(model, _FORWARD, MethodType(lambda self, f, *arguments: f(self, *arguments), model))
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, _FORWARD)
    for module in _sharded_modules(model):
        # A sum. By default FSDP divides by the number of ranks, and with the factor alone it asks
        # for a kind of reduction that gloo does not have and that NCCL has got wrong.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    forward(model, lambda _: None)  # FSDP takes the first module that it sees running as the root
    model.reshard()  # type: ignore[operator]


def init(model: nn.Module, init_parameter: Callable[[str, Tensor], None]) -> None:
    """Give a sharded model its first weights, so that no rank ever has all of them: it draws one
    whole parameter at a time, on the CPU, and keeps its rows. init_parameter: fills the parameter
    of a name; called in the order of the model's parameters, as if it were not sharded."""
    rank, _ = part(model)
    for name, p in model.named_parameters():
        drawn = torch.empty(p.shape)
        init_parameter(name, drawn)
        rows = _rows_per_rank(p)
        local(p).copy_(drawn[rank * rows : (rank + 1) * rows])


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, _FORWARD)


def part(model: nn.Module) -> tuple[int, int]:
    """Which part of every parameter this rank has: number r of N."""
    return (distributed.rank(), distributed.world_size()) if is_sharded(model) else (0, 1)


def forward(model: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(model, *arguments) as the forward pass of a sharded model."""
    return getattr(model, _FORWARD)(function, *arguments)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every rank has all weights, and each may use the model without the others; nothing
    may be trained. All ranks enter together. Does nothing with a model that is not sharded."""
    if not is_sharded(model):
        yield
        return
    distributed.barrier()  # rank 0 may still be at work alone
    for module in _sharded_modules(model):
        module.unshard()
    for block in _blocks(model):
        block.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        # FSDP remembers in which order modules ran, to gather the one before for the backward pass
        # of the next. Ranks have evaluated different amounts; they agree that the root was last.
        forward(model, lambda _: None)
        for block in _blocks(model):
            block.set_reshard_after_forward(True, recurse=False)
        for module in _sharded_modules(model):
            module.reshard()


def clip_grad_norm(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ for parameters of a sharded model: the norm of the whole
    gradient, which is the same on all ranks."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = whole(norm)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _blocks(model: nn.Module) -> Sequence[Any]:
    return [*model.get_submodule("blocks").children()]


def _sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    from torch.distributed.fsdp import FSDPModule

    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _compile_in_training(block: nn.Module) -> None:
    """Compile what `block` computes in training, without the hooks of FSDP, which come later.
    Generation, whose shapes vary, uses the block as it is."""
    eager, compiled = block.forward, runtime.compiled(block.forward)

    def choose(*arguments: Any, **named: Any) -> Any:
        return (compiled if block.training else eager)(*arguments, **named)

    block.forward = choose


# --- shards --------------------------------------------------------------------------------------


def local(x: Tensor) -> Tensor:
    """The rows of x that this rank has, in the same memory; any other tensor is returned as it is.
    Without gradients."""
    with torch.no_grad():
        return x.to_local() if hasattr(x, "to_local") else x


def whole(x: Tensor) -> Tensor:
    """All rows of a sharded tensor, which all ranks ask for; any other is returned as it is.
    Without gradients."""
    if not hasattr(x, "full_tensor"):
        return x
    if not x.placements[0].is_shard():  # type: ignore[attr-defined]
        return x.full_tensor()
    import torch.distributed as dist

    # Not full_tensor(): its kind of gathering can crash gloo of PyTorch 2.13. Both of its threads
    # store the name of the operation that they have ended in one std::string without a lock, and
    # free it twice if it is longer than the 15 characters that need no memory of their own.
    own, rows = local(x), _rows_per_rank(x)
    found = own.new_empty(rows * distributed.world_size(), *own.shape[1:])
    dist.all_gather([*found.split(rows)], _padded(own, rows).contiguous())
    return found[: len(x)]


def gather_sharded(
    own: Mapping[str, Tensor], memory: HostMemory | None = None
) -> dict[str, Tensor]:
    """The named tensors, of which each rank has its rows, on the CPU of rank 0, in `memory` if that
    is given; other ranks get an empty dict. One at a time is gathered on the device."""
    distributed.barrier()  # which may wait longer: rank 0 may still be at work alone
    found: dict[str, Tensor] = {}
    for name in sorted(own):
        x = whole(own[name])
        if distributed.rank() == 0:
            found |= {name: x.cpu()} if memory is None else memory.copy({name: x})
    return found


def sharded_like(shard: Tensor, parameter: Tensor) -> Tensor:
    """This rank's rows as a sharded tensor that is divided as `parameter` is; a plain tensor if
    the parameter is one."""
    if not hasattr(parameter, "to_local"):
        return shard
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements,
        run_check=False, shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def gather_rows(
    shards: Mapping[Tensor, Tensor], owners: Mapping[Tensor, int]
) -> dict[Tensor, Tensor]:
    """Whole tensors at their owners. shards: parameter -> this rank's rows of the tensor to gather,
    which has the parameter's shape. owners: parameter -> rank. Returns those of this rank."""
    import torch.distributed as dist

    found, works = {}, []
    for p, shard in shards.items():
        rows = _rows_per_rank(p)
        sent = _padded(shard, rows)
        parts = None
        if owners[p] == distributed.rank():
            padded = shard.new_empty(rows * distributed.world_size(), shard.shape[1])
            found[p], parts = padded[: len(p)], [*padded.split(rows)]
        works.append((dist.gather(sent, parts, dst=owners[p], async_op=True), sent))
    for work, _ in works:
        work.wait()
    return found


def scatter_rows(
    tensors: Mapping[Tensor, Tensor], owners: Mapping[Tensor, int]
) -> dict[Tensor, Tensor]:
    """The inverse of `gather_rows`: this rank's rows of the tensors of all owners. tensors: those
    that this rank owns."""
    import torch.distributed as dist

    found, works = {}, []
    for p, owner in owners.items():
        rows, own = _rows_per_rank(p), local(p)
        received, parts = own.new_empty(rows, own.shape[1]), None
        if owner == distributed.rank():
            parts = [*_padded(tensors[p], rows * distributed.world_size()).split(rows)]
        found[p] = received[: len(own)]
        works.append((dist.scatter(received, parts, src=owner, async_op=True), parts))
    for work, _ in works:
        work.wait()
    return found


def _padded(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else F.pad(x, (*(0, 0) * (x.dim() - 1), 0, rows - len(x)))


def _rows_per_rank(p: Tensor) -> int:
    return -(-len(p) // distributed.world_size())
