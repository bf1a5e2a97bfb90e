"""A CUDA graph without CUDA: the operations of a computation, recorded once and run again.

As in a CUDA graph, a replay reads and writes the tensors of the recording and runs no Python:
numbers that the host knew then are those that it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim"}


class RecordedGraph:
    """The operations of `run`, which must not need a value of a tensor (RuntimeError)."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replays = 0
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        with _Recorder(self._calls):
            run()

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, before in self._calls:
            after = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # views and results in place are there already


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[tuple[Any, Any, Any, Any]]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in _WAITS:
            raise RuntimeError(f"{name} while a graph is captured")
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out
