"""Limits of memory and processors that a container or a batch job may have."""

import os
from pathlib import Path

import pytest
import torch

from gptsmith.train import runtime

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("group", "files", "limits"),
    [
        ("0::/job/step\n", {"memory.max": "max\n", "job/memory.max": "3000\n",
                            "job/step/memory.max": "5000\n"}, {3000, 5000}),
        ("0::/elsewhere\n", {"memory.max": "7000\n"}, {7000}),  # a container sees its own group
        ("4:cpu:/job\n3:memory,hugetlb:/job\n0::/\n",
         {"memory/job/memory.limit_in_bytes": "2000\n",
          "memory/memory.limit_in_bytes": "9223372036854771712\n"}, {2000, 9223372036854771712}),
        ("0::/\n", {}, set()),
    ],
    ids=["job", "container", "version 1", "none"],
)  # fmt: skip
def test_limits_of_control_groups(
    group: str, files: dict[str, str], limits: set[int], tmp_path: Path
) -> None:
    groups, mount = tmp_path / "groups", tmp_path / "mount"
    assert [*runtime._cgroup_limits(groups, mount)] == []
    groups.write_text(group)
    for name, text in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(text)
    assert {*runtime._cgroup_limits(groups, mount)} == limits


@pytest.mark.parametrize(
    ("group", "files", "quotas"),
    [
        ("0::/job\n", {"cpu.max": "max 100000\n", "job/cpu.max": "150000 100000\n"}, [1.5]),
        ("4:cpu,cpuacct:/job\n", {"cpu/job/cpu.cfs_quota_us": "400000\n",
                                  "cpu/job/cpu.cfs_period_us": "100000\n",
                                  "cpu/cpu.cfs_quota_us": "-1\n",
                                  "cpu/cpu.cfs_period_us": "100000\n"}, [4]),
        ("0::/\n", {}, []),
    ],
    ids=["version 2", "version 1", "none"],
)  # fmt: skip
def test_quotas_of_control_groups(
    group: str, files: dict[str, str], quotas: list[float], tmp_path: Path
) -> None:
    groups, mount = tmp_path / "groups", tmp_path / "mount"
    groups.write_text(group)
    for name, text in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(text)
    assert [*runtime._cgroup_quotas(groups, mount)] == quotas


def test_memory_of_the_cpu_is_at_most_what_a_group_may_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(runtime, "_cgroup_limits", lambda *paths: iter([2**62, 4096]))
    assert runtime.memory_bytes(CPU) == 4096
    monkeypatch.setattr(runtime, "_cgroup_limits", lambda *paths: iter([2**62]))
    assert runtime.memory_bytes(CPU) == total
