"""In which number format a device trains best, and why."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

Name = Literal["auto", "fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Weights, gradients and optimizer stay fp32; matrix products run in `dtype` (autocast)."""

    name: str
    device_type: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.name]

    def autocast(self) -> AbstractContextManager[object]:
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, self.dtype)


def cpu_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (others emulate it, slower than fp32)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose(name: Name, device: torch.device) -> Precision:
    """The wanted format, or for `auto` the fastest that is safe on this device.

    Raises ValueError for a format that the device lacks.
    """
    kind = device.type
    if name == "auto":
        if kind == "cuda":
            if torch.cuda.get_device_capability(device) >= (8, 0):
                return Precision("bf16", kind, "the GPU has bfloat16 tensor cores")
            return Precision("fp16", kind, "the GPU has no bfloat16: fp16 with loss scaling")
        if kind == "cpu" and cpu_bf16():
            return Precision("bf16", kind, "the CPU multiplies bfloat16 in hardware")
        what = (
            "the CPU has neither avx512_bf16 nor AMX" if kind == "cpu" else f"{kind} is safest so"
        )
        return Precision("fp32", kind, what)
    if name == "fp16" and kind == "cpu":
        raise ValueError("precision fp16 is for GPUs: take fp32, bf16 or auto on a CPU")
    reason = "as set"
    if name == "bf16" and kind == "cpu" and not cpu_bf16():
        reason += "; without avx512_bf16 or AMX this CPU emulates it, fp32 is faster"
    return Precision(name, kind, reason)


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps` as a device; ValueError if it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"no device {name!r}: choose auto, cpu, cuda, cuda:N or mps") from None
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {name!r} is not available here: choose cpu or auto")
    return device


def memory_bytes(device: torch.device) -> int | None:
    """Memory of the device, None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


# Dense bf16 (fp16 before Ampere) TFLOP/s from the vendor's data sheets, by words of the name.
_PEAK_TFLOPS = {
    "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312,
    "L40S": 362, "L4": 121, "A10G": 70, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
    "V100": 125, "T4": 65,
}  # fmt: skip
_OTHER_CHIPS = {"Laptop", "Ti", "D"}  # under the number of a faster or slower one


def peak(device: torch.device) -> float | None:
    """FLOP/s that the vendor promises of the device's matrix units; None where that is not known.

    The name must hold all words of an entry, whole ("L4" is in neither "L40" nor "RTX 4090"); the
    first that fits counts.
    """
    if device.type != "cuda":
        return None
    words = set(re.findall(r"\w+", torch.cuda.get_device_name(device)))
    if words & _OTHER_CHIPS:
        return None
    fits = (tflops for name, tflops in _PEAK_TFLOPS.items() if words.issuperset(name.split()))
    return next((tflops * 1e12 for tflops in fits), None)


def mfu(flops_per_second: float, device: torch.device) -> float | None:
    """Share of the device's peak that is used; None where the peak is not known."""
    most = peak(device)
    return None if most is None else flops_per_second / most
