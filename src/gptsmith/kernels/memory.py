"""Memory in pages of 2 MiB, if the system has them.

Fewer TLB misses make int4 1.5 times as fast. Many systems give such pages to a private anonymous
mapping, and only if madvise(MADV_HUGEPAGE) asks for them: PyTorch's allocator maps large blocks so,
but does not ask.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor


def allocate(size: int) -> Tensor:
    """`size` bytes, all zero. What is not used of them takes no memory."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)
