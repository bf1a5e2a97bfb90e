"""Whether torch.compile pays for a run, and why."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

# Compiling takes 20 to 60 s on a CPU and then saves about a quarter of a step (docs/log.md).
_WORTH_SECONDS = 300
_FLOPS_PER_THREAD = 60e9  # of eager training, a cautious round number


def decide(
    wanted: Literal["auto", "on", "off"], device: torch.device, flops: float, seconds: float | None
) -> tuple[bool, str]:
    """Whether to compile, and the reason in words.

    flops: of the whole run; seconds: its length, if the clock limits it. Raises ValueError for
    `on` without a C++ compiler on a CPU.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if device.type == "cuda":  # Triton builds its launchers with a C compiler
        has_triton = importlib.util.find_spec("triton") is not None
        compiler = (compiler or shutil.which("gcc") or shutil.which("cc")) if has_triton else None
    if wanted == "off":
        return False, "as set"
    if wanted == "on":
        if not compiler:
            raise ValueError(
                "train.compile on needs a C++ compiler (g++; on a GPU also triton): install it or "
                "say auto"
            )
        return True, "as set"
    if device.type == "mps":
        return False, "not tried on mps"
    if not compiler:
        return False, "no C++ compiler (g++; on a GPU also triton) here"
    if device.type == "cuda":
        return True, "kernels are fused on a GPU"
    estimate = seconds or flops / (_FLOPS_PER_THREAD * torch.get_num_threads())
    if estimate < _WORTH_SECONDS:
        return False, f"about {estimate:,.0f} s of work: compiling would not pay"
    return True, f"about {estimate:,.0f} s of work: fused kernels repay the minute of compiling"


def compiled(function: F) -> F:
    """torch.compile with fixed shapes and no timing-driven choices: a resumed run, in a new
    process, must get the very same kernels."""
    return torch.compile(function, dynamic=False)  # type: ignore[return-value]
