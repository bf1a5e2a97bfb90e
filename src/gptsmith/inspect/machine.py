"""What this machine can do: PyTorch, CPU, memory, GPUs and compilers (`gptsmith doctor`)."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from gptsmith.compilers import cxx_compiler
from gptsmith.inspect.check import Check, attempt, first_line
from gptsmith.kernels import build

_COMPILER = "Debian, Ubuntu: apt install g++ python3-dev; macOS: xcode-select --install"
_NVIDIA = Path("/dev/nvidiactl")
_GIB = 2**30


def machine_checks() -> Iterator[Check]:
    """PyTorch and what it runs on, and the compilers."""
    yield from attempt("PyTorch", _torch)
    yield from attempt("C compiler", _kernels)
    yield from attempt("torch.compile", _compile)


def _torch() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # such as a library that it is linked with
        reason = f"cannot be imported: {first_line(error)}"
        yield Check("PyTorch", "problem", reason, "pip install --force-reinstall torch")
        return
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    if torch.version.hip:
        built_for = f"ROCm {torch.version.hip}"
    yield Check("PyTorch", "ok", f"{torch.__version__}, built for {built_for}")
    yield from attempt("CPU", _cpu)
    yield from attempt("bfloat16", _bf16)
    yield from attempt("memory", _memory)
    yield from attempt("GPU", _gpus)
    yield from attempt("training", _training)


def _training() -> Check:
    from gptsmith.train import runtime

    device = runtime.choose_device("auto")
    precision = runtime.choose_precision("auto", device)
    return Check("training", "ok", f"on {device} in {precision.name}: {precision.reason}")


def _cpu() -> Check:
    import torch

    from gptsmith.train import runtime

    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    threads = torch.get_num_threads()
    found = f"{_cpu_name()}, {cores} cores for this process, {threads} threads"
    quota = runtime.cpu_quota()
    if quota and quota < threads:
        found += f", but the container or batch job gets the time of {quota:g} cores"
        n = max(1, int(quota))
        remedy = f"export OMP_NUM_THREADS={n}: threads that wait for each other lose most of it"
        return Check("CPU", "problem", found, remedy)
    return Check("CPU", "ok", found)


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(\S.*)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _bf16() -> Check:
    import torch

    from gptsmith.train import runtime

    has = [build.variants()[0].name]
    if torch.cpu._is_amx_tile_supported():
        has.append("AMX")
    vectors = f"vector instructions: {', '.join(has)}"
    if runtime.cpu_has_bf16():
        return Check("bfloat16", "ok", f"multiplied by the CPU ({vectors})")
    return Check(
        "bfloat16", "missing", f"not multiplied by the CPU, which trains in fp32 ({vectors})"
    )


def _memory() -> Check:
    import torch

    from gptsmith.train import runtime

    limit = runtime.memory_bytes(torch.device("cpu"))
    if limit is None:
        return Check("memory", "ok", "unknown")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if limit < total:
        found = (
            f"{limit / _GIB:,.1f} GiB: the limit of a container or batch job on a machine of "
            f"{total / _GIB:,.1f}"
        )
        return Check("memory", "ok", found)
    found = f"{total / _GIB:,.1f} GiB"
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        text = ""
    if free := re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE):
        found += f", {int(free[1]) * 1024 / _GIB:,.1f} of it available"
    return Check("memory", "ok", found)


def _gpus() -> Iterator[Check]:
    import torch

    with warnings.catch_warnings(record=True) as caught:  # a driver that is too old is a warning
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        for i in range(torch.cuda.device_count()):
            yield _gpu(i)
    elif torch.backends.mps.is_available():
        yield Check("GPU", "ok", "Apple's, by mps")
    elif not _NVIDIA.exists():
        yield Check("GPU", "missing", "none: training and generation run on the CPU")
    elif torch.version.cuda is None:
        found = "an NVIDIA GPU, but this PyTorch is a build without CUDA"
        yield Check(
            "GPU",
            "problem",
            found,
            "pip install --force-reinstall torch, from an index with CUDA builds",
        )
    else:
        why = first_line(caught[0].message) if caught else "it finds none"
        found = f"an NVIDIA GPU, which PyTorch cannot use: {why}"
        yield Check("GPU", "problem", found, "nvidia-smi must list it; update the driver")


def _gpu(i: int) -> Check:
    import torch

    from gptsmith.train import runtime

    device, name = torch.device("cuda", i), f"GPU {i}"
    try:
        free, total = torch.cuda.mem_get_info(device)
        major, minor = torch.cuda.get_device_capability(device)
        precisions = [runtime.choose_precision("auto", device).name]
        precisions += ["fp8"] if runtime.has_fp8(device) else []
        model = torch.cuda.get_device_name(device)
    except RuntimeError as error:  # such as memory that other processes have taken
        remedy = "nvidia-smi shows what uses it; CUDA_VISIBLE_DEVICES=N chooses another"
        return Check(name, "problem", f"cannot be used: {first_line(error)}", remedy)
    return Check(
        name, "ok",
        f"{model}, compute capability {major}.{minor}, {free / _GIB:,.1f} of "
        f"{total / _GIB:,.1f} GiB free, trains in {' and '.join(precisions)}",
    )  # fmt: skip


# --- compilers -----------------------------------------------------------------------------------


def _kernels() -> Check:
    """The CPU's kernels, compiled (or found in the cache) and loaded."""
    name = "C compiler"
    try:
        from gptsmith.kernels import native

        variant = build.variants()[0]
        native.load(variant, "float32")
    except (build.BuildError, ImportError, OSError) as error:
        found = f"no fast generation on the CPU: {first_line(error)}"
        return Check(name, "missing", found, _COMPILER)
    return Check(name, "ok", f"the kernels for generation work ({variant.name})")


# What torch.compile's own files include; OpenMP is optional on macOS.
_SOURCE = """
#include <Python.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include <cmath>
extern "C" double answer() { return std::floor(42.5); }
"""


def _compile() -> Check:
    """What torch.compile needs. Itself it would take 15 s to compile a small function."""
    name = "torch.compile"
    compiler = cxx_compiler()
    if compiler is None:
        chosen = os.environ.get("CXX")
        found = "no C++ compiler" if chosen is None else f"no C++ compiler {chosen!r} (CXX)"
        found += ": training is not compiled, which would save a quarter of a long run"
        return Check(name, "missing", found, _COMPILER if chosen is None else "unset CXX")
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    headers = sysconfig.get_paths()["include"]
    with tempfile.TemporaryDirectory(prefix="gptsmith-doctor-") as folder:
        source, library = Path(folder, "answer.cpp"), Path(folder, "answer.so")
        source.write_text(_SOURCE)
        flags = ["-std=c++17", "-shared", "-fPIC", *openmp, "-I", headers]
        words = [compiler, *flags, str(source), "-o", str(library)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=60)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line]
                raise OSError(errors[0] if errors else "no message")
            function = ctypes.CDLL(str(library)).answer
            function.restype = ctypes.c_double
            assert function() == 42
        except (OSError, subprocess.TimeoutExpired) as error:
            found = f"{compiler} fails: {first_line(error)}"
            return Check(name, "problem", found, f"--train.compile off, or {_COMPILER}")
    return Check(
        name, "ok", f"{compiler} compiles{' with OpenMP' if openmp else ''} and Python's headers"
    )
