"""The limits of this machine, to compare the benchmarks' figures with."""

import resource
import sys
import time

import torch

from gptsmith.budget import machine
from gptsmith.budget.machine import matrix_product_flops as gemm_flops  # noqa: F401


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bytes() -> float:
    """Bytes/s of copies on the CPU."""
    return machine.copy_bytes(torch.device("cpu"))


def read_bytes() -> float:
    """Bytes/s of the best of several sums over 256 MiB, all threads at work: the limit of what
    decodes one row, which reads all weights for each token."""
    numbers = torch.ones(2**25, dtype=torch.int64)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - begin)
    return 8 * len(numbers) / best


def peak_mib(device: torch.device) -> float:
    """Peak memory of this process: of tensors on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
