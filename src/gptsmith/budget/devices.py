"""Machines that are not here, from their makers' data sheets. Every figure that follows is an
estimate: the share of the peak that training reaches was measured on one H200 (docs/log.md)."""

from __future__ import annotations

from typing import NamedTuple

from gptsmith.budget.machine import Machine
from gptsmith.budget.step_time import Cluster
from gptsmith.train.runtime import PEAK_TFLOPS


class Device(NamedTuple):
    """sheet: its entry in train/runtime.py, which has its FLOP/s. memory: GB. bandwidth: GB/s of
    that memory. reduced: GB/s at which gradients are added up within a machine, an assumption: a
    third of NVLink's, or PCI Express 4."""

    sheet: str
    memory: int
    bandwidth: int
    reduced: int = 20


# NVIDIA's data sheets: H100 and H200 (SXM), A100 80GB SXM, L40S, L4, A10, GeForce RTX, V100, T4.
DEVICES = {
    "h200": Device("H200", 141, 4800, 300),
    "h100": Device("H100", 80, 3350, 300),
    "a100": Device("A100", 80, 2039, 200),
    "l40s": Device("L40S", 48, 864),
    "l4": Device("L4", 24, 300),
    "a10g": Device("A10G", 24, 600),
    "rtx5090": Device("RTX 5090", 32, 1792),
    "rtx4090": Device("RTX 4090", 24, 1008),
    "rtx3090": Device("RTX 3090", 24, 936),
    "v100": Device("V100", 32, 900, 100),
    "t4": Device("T4", 16, 320),
}


def published(name: str, count: int, memory: int | None = None) -> Machine:
    """`count` devices of this name; ValueError for an unknown one, for a count that does not fill
    machines of 8, and for more memory than it has.

    memory: bytes of each that the run may use (default: all).
    """
    device = DEVICES.get(name.lower().replace(" ", "").replace("-", ""))
    if device is None:
        raise ValueError(f"--device {name!r}: choose from {', '.join(DEVICES)}")
    if memory is not None and memory > device.memory * 10**9:
        raise ValueError(f"--memory: {device.sheet} has {device.memory} GB")
    cluster = Cluster(
        peak=PEAK_TFLOPS[device.sheet] * 1e12,
        memory=device.bandwidth * 1e9,
        inside=device.reduced * 1e9,
    )
    size = cluster.per_machine
    if count > size and count % size:
        raise ValueError(
            f"--count {count}: more than {size} are in machines of {size}; give a multiple"
        )
    title = f"{count} x {device.sheet}" if count > 1 else device.sheet
    startup = 60.0  # starting, compiling
    return Machine(
        title, "cuda", cluster, memory or device.memory * 10**9, ranks=count, startup=startup
    )
