"""The limits of this machine, to compare the benchmarks' figures with."""

import resource
import sys
import time

import torch

from gptsmith.train import runtime


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gemm_flops(device: torch.device) -> float:
    """FLOP/s of the best of several large square matrix products, in the number format that
    `precision auto` takes here."""
    dtype = runtime.choose_precision("auto", device).dtype
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        sync(device)
        begin = time.perf_counter()
        a @ b
        sync(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def copy_bytes() -> float:
    """Bytes/s of the best of several copies of 256 MiB, all threads at work."""
    source = torch.zeros(2**28, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - begin)
    return source.numel() / best


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
