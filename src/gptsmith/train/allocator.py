"""What the C library does with the memory that a training step frees."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_ONE_GIB = 2**30


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for the next tensor of that size.

    glibc maps each large tensor anew and returns it to the kernel when it is freed. In a training
    step on a CPU that is tens of thousands of page faults, a tenth of the time where the step is
    compiled (docs/log.md). The peak is the same, but what was taken stays taken. Other C libraries
    have no such switch and are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _ONE_GIB)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
