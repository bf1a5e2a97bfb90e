"""A device that is not the CPU, and computes: what a GPU would reject is found without one.

Its tensors call themselves those of the meta device, but have numbers, which are computed on the
CPU. What is moved to it is copied; an operation on its tensors and those of the CPU (but for single
numbers) raises, as on a GPU. Code that asks for CUDA or for the CPU sees neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")
aten = torch.ops.aten
# Operations for whose result the host waits. The names of those that ran, in order.
_WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim"}
waits: list[str] = []
# The shapes of the tensors that were copied to it from the CPU, but for single numbers.
uploads: list[tuple[int, ...]] = []


class There(Tensor):
    """A tensor on the device. here: its numbers, on the CPU."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
            requires_grad=here.requires_grad,
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.here.tolist()

    def __repr__(self) -> str:
        return f"There({self.here!r})"


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = any(isinstance(x, There) for x in tensors)
    moves = func in (aten._to_copy.default, aten.copy_.default)
    if there and not moves:
        strangers = [x for x in tensors if not isinstance(x, There) and x.dim()]
        assert not strangers, f"{func}: tensors of two devices, of shapes {shapes(tensors)}"
    if there and (func._schema.name.split("::")[1] in _WAITS or _indexes_by_bools(func, args)):
        waits.append(str(func))
    asked = kwargs.get("device")
    if asked is not None:
        stays, there = there, torch.device(asked).type == DEVICE.type
        if stays and not there:
            waits.append("to the CPU")
        if there and not stays and moves and args[0].dim():
            uploads.append(tuple(args[0].shape))
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func is aten.copy_.default:
        if isinstance(args[0], There) and not isinstance(args[1], There) and args[1].dim():
            uploads.append(tuple(args[1].shape))
        here(args[0]).copy_(here(args[1]))
        return args[0]
    out = func(*tree_map_only(There, here, args), **tree_map_only(There, here, kwargs))
    if not there:
        return out
    changed = {id(here(x)): x for x in tensors}  # in place: the same tensor
    return tree_map_only(Tensor, lambda x: changed[id(x)] if id(x) in changed else There(x), out)


def _indexes_by_bools(func: Any, args: Any) -> bool:
    if func is not aten.index.Tensor:
        return False
    return any(x is not None and x.dtype == torch.bool for x in args[1])


def here(x: Any) -> Any:
    return x.here if isinstance(x, There) else x


def shapes(tensors: list[Tensor]) -> list[tuple[str, tuple[int, ...]]]:
    return [(x.device.type, tuple(x.shape)) for x in tensors]


class _Factories(TorchDispatchMode):
    """Tensors that are created on the device, or moved to it, have numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    waits.clear()
    uploads.clear()
    with _Factories(), patch.object(torch, "tensor", _tensor):
        yield DEVICE


_real_tensor = torch.tensor


def _tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """torch.tensor, which for the meta device drops the numbers before any mode sees them."""
    made = _real_tensor(data, **options)
    return made if device is None else made.to(device)
