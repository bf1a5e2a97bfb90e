"""Device, precision, torch.compile and memory allocator of a training run."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from gptsmith import compilers
from gptsmith.train import distributed
from gptsmith.train.options import CompileMode, TrainingPrecision

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S")

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,  # what train/fp8.py does not compute
}


@dataclass(frozen=True)
class Precision:
    """Weights, gradients and optimizer state stay fp32; autocast runs matrix products in `dtype`.

    reason: why it was chosen, for the report.
    """

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


@dataclass(frozen=True)
class Runtime:
    """Device, precision and compilation, which are chosen once, at the start of a run."""

    device: torch.device
    precision: Precision
    compile: bool


# --- device --------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps` as a device; ValueError if it is not available.

    With several ranks, each takes the GPU of its number on the machine, whatever number is given.
    """
    if distributed.world_size() > 1 and (
        name.partition(":")[0] == "cuda" or (name == "auto" and torch.cuda.is_available())
    ):
        name = f"cuda:{distributed.local_rank()}"
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"no device {name!r}: choose auto, cpu, cuda, cuda:N or mps") from None
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if (device.index or 0) >= count.get(device.type, 0):
        raise ValueError(f"device {name!r} is not available here: choose cpu or auto")
    return device


def memory_bytes(device: torch.device) -> int | None:
    """Total memory of the device; of the CPU, what this process may have of it, in a container or a
    batch job. None if it cannot be determined."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    return min([total, *_cgroup_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def cpu_quota() -> float | None:
    """The cores whose time a container or a batch job allows this process; None if all."""
    return min(_cgroup_quotas(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")), default=None)


def _cgroup_limits(groups: Path, mount: Path) -> Iterator[int]:
    """Bytes of memory that the kernel allows."""
    for folder, version in _control_groups("memory", groups, mount):
        name = "memory.max" if version == 2 else "memory.limit_in_bytes"
        with suppress(OSError, ValueError):  # ValueError: "max", no limit
            yield int((folder / name).read_text())


def _cgroup_quotas(groups: Path, mount: Path) -> Iterator[float]:
    """Seconds of all cores that the kernel allows per second."""
    for folder, version in _control_groups("cpu", groups, mount):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        with suppress(OSError, ValueError):
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if int(quota) > 0:  # version 1 writes -1 for no limit
                yield int(quota) / int(period)


def _control_groups(controller: str, groups: Path, mount: Path) -> Iterator[tuple[Path, int]]:
    """Folders of this process's control group and those around it, as far as they are visible here,
    with the version (cgroups(7))."""
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, version = mount, 2
        elif controller in controllers.split(","):
            root, version = mount / controller, 1
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield folder, version


# Dense bf16 (fp16 before Ampere) TFLOP/s from the vendor's data sheets, by words of the name.
PEAK_TFLOPS = {
    "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312,
    "L40S": 362, "L4": 121, "A10G": 70, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
    "V100": 125, "T4": 65,
}  # fmt: skip
_OTHER_CHIPS = {"Laptop", "Ti", "D"}  # variants with the same number but another speed


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of the device's matrix units, from its data sheet; None if unknown.

    A table entry matches if all its words occur in the device name as whole words ("L4" does not
    match "L40" or "RTX 4090"); the first match counts.
    """
    if device.type != "cuda":
        return None
    words = set(re.findall(r"\w+", torch.cuda.get_device_name(device)))
    if words & _OTHER_CHIPS:
        return None
    matches = (tflops for name, tflops in PEAK_TFLOPS.items() if words.issuperset(name.split()))
    return next((tflops * 1e12 for tflops in matches), None)


def mfu(flops_per_second: float, device: torch.device) -> float | None:
    """Model FLOPs utilisation: the fraction of the device's peak; None if that is unknown."""
    peak = peak_flops(device)
    return None if peak is None else flops_per_second / peak


# --- precision -----------------------------------------------------------------------------------


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (others emulate it, slower than fp32)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies 8-bit floating-point numbers."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def choose_precision(name: TrainingPrecision, device: torch.device) -> Precision:
    """The requested precision; `auto` is the fastest that is safe on this device.

    Raises ValueError for one that the device does not support.
    """
    kind = device.type
    if name == "auto":
        if kind == "cuda":
            if torch.cuda.get_device_capability(device) >= (8, 0):
                return Precision("bf16", kind, "the GPU has bfloat16 tensor cores")
            return Precision("fp16", kind, "the GPU has no bfloat16: fp16 with loss scaling")
        if kind == "cpu" and cpu_has_bf16():
            return Precision("bf16", kind, "the CPU multiplies bfloat16 in hardware")
        reason = (
            "the CPU has neither avx512_bf16 nor AMX"
            if kind == "cpu"
            else f"the safe choice on {kind}"
        )
        return Precision("fp32", kind, reason)
    if name == "fp16" and kind == "cpu":
        raise ValueError("precision fp16 is for GPUs: use fp32, bf16 or auto on a CPU")
    if name == "fp8" and not has_fp8(device):
        raise ValueError(
            "precision fp8 needs an NVIDIA GPU of compute capability 8.9 or newer (Ada, Hopper, "
            "Blackwell): use bf16 or auto"
        )
    reason = "as configured"
    if name == "bf16" and kind == "cpu" and not cpu_has_bf16():
        reason += "; without avx512_bf16 or AMX this CPU emulates it, fp32 is faster"
    return Precision(name, kind, reason)


@contextmanager
def evaluating(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Inside, the model computes without dropout and gradients, in the precision of training."""
    training = model.training
    model.eval()
    try:
        # Not inference_mode: a BlockMask that the model caches here is used in training too.
        with torch.no_grad(), precision.autocast():
            yield
    finally:
        model.train(training)


# --- torch.compile -------------------------------------------------------------------------------

# Compiling takes 20 to 60 s on a CPU and then saves about a quarter of a step; on an H200 10 to
# 30 s and two fifths (docs/log.md).
_MIN_SECONDS_TO_COMPILE = {"cpu": 300, "cuda": 60}
_FLOPS_PER_THREAD, _FLOPS_PER_GPU = 60e9, 100e12  # of eager training, cautious round numbers


def choose_compile(
    mode: CompileMode, device: torch.device, flops: float, seconds: float | None
) -> tuple[bool, str]:
    """Whether to use torch.compile, and why.

    flops: of the whole run. seconds: its length, if it has a time limit. Raises ValueError for `on`
    without a compiler.
    """
    if mode == "off":
        return False, "as configured"
    missing = compilers.missing(device.type)
    if mode == "on":
        if missing:
            raise ValueError(f"train.compile on: {missing}: install what is missing, or use auto")
        return True, "as configured"
    if device.type == "mps":
        return False, "not tested on mps"
    if missing:
        return False, missing
    rate = _FLOPS_PER_THREAD * torch.get_num_threads()
    if device.type == "cuda":
        rate = _FLOPS_PER_GPU
        if torch.cuda.get_device_capability(device) < (7, 0):
            return False, "the GPU is older than those that Triton supports"
    estimate = seconds or flops / rate
    if estimate < _MIN_SECONDS_TO_COMPILE[device.type]:
        return False, f"about {estimate:,.0f} s of work: too short to repay compiling"
    return True, f"about {estimate:,.0f} s of work: fused kernels repay the minute of compiling"


def compiled(function: F) -> F:
    """torch.compile with fixed shapes and without autotuning: a resumed run, in a new process,
    must get exactly the same kernels."""
    return torch.compile(function, dynamic=False)  # type: ignore[return-value]


# --- determinism ---------------------------------------------------------------------------------


def prepare_determinism() -> None:
    """What `deterministic` needs before the first matrix product: cuBLAS reads the environment when
    it starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def deterministic(steps: Iterator[S]) -> Iterator[S]:
    """The same steps, each computed by PyTorch's deterministic algorithms.

    What happens between them is as ever: some operations of sampling and evaluation have no such
    algorithm and would raise.
    """
    while True:
        with _deterministic_algorithms():
            try:
                step = next(steps)
            except StopIteration:
                return
        yield step


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    settings: Any = torch.utils.deterministic
    on = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # nothing reads what it has not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warns)
        settings.fill_uninitialized_memory = fills


# --- allocator -----------------------------------------------------------------------------------

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_THRESHOLDS = 2**30, 2**25  # bytes; the C library may reject the first


def keep_freed_memory() -> None:
    """Make malloc keep freed memory in this process and reuse it for the next tensor of that size.

    glibc maps each large tensor anew and returns it to the kernel when it is freed. In a training
    step on a CPU that costs tens of thousands of page faults, a tenth of the time of a compiled
    step (docs/log.md). Peak memory grows by a few per cent. Does nothing on other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # The trim threshold alone would only switch off glibc's adaptation of the mmap threshold.
    if mallopt is not None and any(mallopt(_M_MMAP_THRESHOLD, size) for size in _THRESHOLDS):
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
