"""The compiled kernels, called by ctypes with the addresses of tensors.

A call takes 1 us this way, and 10 us as a PyTorch operator.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from pathlib import Path

import numpy as np
import torch

from gptsmith import terminal
from gptsmith.kernels import build

PAGE = 64  # positions whose keys and values lie together, and are attended to as one block
FORMATS = ("float32", "bfloat16", "int8", "int4")  # of weights, in the order of the C enums
NORMS = ("layernorm", "rmsnorm")
MLPS = ("gelu", "gelu_erf", "relu2", "swiglu")


class Runtime(Structure):
    _fields_ = [(n, c_void_p) for n in ("parallel", "thread", "team")]
    _fields_ += [("threads", c_int64)]


class Matrix(Structure):
    _fields_ = [
        *((n, c_void_p) for n in ("data", "bias")),
        *((n, c_int64) for n in ("format", "outputs", "inputs")),
    ]


class Norm(Structure):
    _fields_ = [(n, c_void_p) for n in ("weight", "bias")]


class Block(Structure):
    _fields_ = [
        *((n, Norm) for n in ("attention_norm", "mlp_norm")),
        *((n, c_void_p) for n in ("q_norm", "k_norm")),
        *((n, Matrix) for n in ("qkv", "proj", "up", "down")),
    ]


class Model(Structure):
    _fields_ = [
        *((n, c_int64) for n in ("n_layer", "H", "K", "D", "C", "F", "norm_kind", "mlp", "window")),
        *((n, c_void_p) for n in ("cos", "sin", "positions")),
        ("eps", c_float),
        ("blocks", POINTER(Block)),
        ("final_norm", Norm),
        ("embedding", Matrix),
    ]


class Batch(Structure):
    _fields_ = [
        ("N", c_int64),
        *((n, c_void_p) for n in ("ids", "rows", "positions", "tables")),
        ("pages_per_row", c_int64),
        *((n, c_void_p) for n in ("pages", "allowed")),
        *((n, c_int64) for n in ("allowed_token", "allowed_head")),
        ("keys", c_void_p),
    ]


# `choice` of sample.h as a NumPy record.
CHOICE = np.dtype([
    ("logits", np.uintp),
    *((name, np.float64) for name in ("uniform", "temperature", "top_p", "min_p")),
    ("top_k", np.int64),
])  # fmt: skip


class Scratch(Structure):
    _fields_ = [
        *((n, c_void_p) for n in ("qkv", "mixed", "hidden", "normed", "prepared")),
        ("prepared_bytes", c_int64),
    ]


@functools.cache
def kernels(format: str, required: bool = False) -> ctypes.CDLL | None:
    """The kernels for weights of a format on this CPU, compiled on first use; None, with a notice,
    where that fails, or BuildError if they are required."""
    try:
        return load(build.variants()[0], format)
    except build.BuildError as error:
        if required:
            raise
        terminal.note(
            f"Generation on this CPU uses PyTorch's operations, which are slower: {error}"
        )
        return None


def load(variant: build.Variant, format: str) -> ctypes.CDLL:
    """The kernels of one variant. BuildError if they cannot be compiled or opened."""
    with build.built(variant, format) as path:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:  # such as a temporary folder from which nothing may be run
            raise build.BuildError(str(error)) from None
    runtime, matrix, address = POINTER(Runtime), POINTER(Matrix), c_void_p
    library.forward.argtypes = [runtime, POINTER(Model), POINTER(Batch), Scratch, address]
    library.product.argtypes = [runtime, matrix, address, c_int64, address, address]
    library.sample.argtypes = [runtime, address, c_int64, c_int64, address]
    library.pack.argtypes = [runtime, matrix, address, *[c_int64] * 3]
    library.unpack.argtypes = [matrix, c_int64, address]
    library.row_bytes.argtypes = [c_int64]
    library.packed_bytes.argtypes = [c_int64] * 3
    for name in ("forward", "product", "sample", "pack", "unpack"):
        getattr(library, name).restype = None
    library.row_bytes.restype = library.packed_bytes.restype = c_int64
    return library


def runtime() -> Runtime:
    """As many threads as torch uses, from the OpenMP runtime that it has loaded: a second runtime
    would compete for the cores. One thread if there is none."""
    addresses = _openmp()
    return Runtime(*addresses, torch.get_num_threads() if all(addresses) else 1)


@functools.cache
def _openmp() -> tuple[int | None, ...]:
    # Symbols are looked up in the library and in what it was linked with, whatever its name is.
    # LLVM's and Intel's runtimes have GNU's functions too.
    found = sorted(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))
    try:
        library = ctypes.CDLL(str(found[0]))
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        return tuple(ctypes.cast(getattr(library, name), c_void_p).value for name in names)
    except (IndexError, OSError, AttributeError):
        return (None,) * 3
