"""Freed tensors stay with the process, counted in page faults of a real one."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from gptsmith.train.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def work(times):
    for _ in range(times):
        torch.ones(2**24)  # 64 MiB: 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(-work(20) + work(20))  # the heap grows for a while before it holds what is needed
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has the switch")
def test_freed_memory_is_used_again():
    assert faults("keep") < faults("leave") / 3
