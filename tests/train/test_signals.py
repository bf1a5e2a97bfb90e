"""Real processes, each the leader of a group of its own, and signals to the whole group: what a
terminal does on Ctrl-C and a batch system at the end of the time."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gptsmith.train.signals import SIGNALS, StopSignal

CHILD = """
import subprocess, sys
from gptsmith.train.signals import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    child = "import time; print('child', flush=True); time.sleep(1.0); print('child ends')"
    ended = subprocess.run([sys.executable, "-c", child]).returncode
    print(stop.received, ended, flush=True)
    while True:  # a second SIGINT ends it
        pass
"""

COMPILE = """
import torch
import torch._inductor.config
from gptsmith.train.runtime import compiled
from gptsmith.train.signals import StopSignal
torch._inductor.config.cpp.vec_isa_ok = False  # no trials of the processor, which take seconds
with StopSignal() as stop:
    print("ready", flush=True)
    x = torch.ones(3)
    print(stop.received, compiled(lambda x: x.sin() * 2)(x).allclose(x.sin() * 2), stop.received)
"""


def start(program: str, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_process_group_spares_child_processes(number: signal.Signals) -> None:
    process = start(CHILD)
    assert process.stdout is not None
    assert process.stdout.readline() == "child\n"
    os.killpg(process.pid, number)
    assert process.stdout.readline() == "child ends\n"
    assert process.stdout.readline() == f"{number.name} 0\n"
    os.killpg(process.pid, signal.SIGTERM)  # as batch systems do before they kill
    time.sleep(0.1)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]
    assert process.returncode == -signal.SIGINT  # as Python ends after a Ctrl-C


def compiles(group: int) -> bool:
    """Whether a C++ compiler runs in the process group (proc(5): comm, then state, ppid, pgrp)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
        except OSError:  # it has ended
            continue
        if name in ("cc1plus", "clang++", "clang") and int(rest.split()[2]) == group:
            return True
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the compiler by /proc")
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler (g++) to interrupt")
def test_ctrl_c_during_torch_compile_does_not_fail_the_step(tmp_path: Path) -> None:
    process = start(COMPILE, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    while process.poll() is None and not compiles(process.pid):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=100)
    assert (output, process.returncode) == ("None True SIGINT\n", 0), errors[-2000:]


def test_exit_restores_handlers_and_mask() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    threads, mask = threading.active_count(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)  # to this thread, which blocks it
        assert stop.received is None
        assert threading.active_count() == threads + 1
    assert stop.received == "SIGINT", "what came is not lost"
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    assert threading.active_count() == threads
