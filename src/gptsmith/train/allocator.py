"""What the C library does with the memory that a training step frees."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**30, 2**25  # bytes; a C library may refuse the first


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for the next tensor of that size.

    glibc maps each large tensor anew and returns it to the kernel when it is freed. In a training
    step on a CPU that is tens of thousands of page faults, a tenth of the time where the step is
    compiled (docs/log.md). The peak grows by a few per cent. Other C libraries have no such switch
    and are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # The second without the first would only switch off that glibc learns what is large here.
    if mallopt is not None and any(mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGEST):
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
