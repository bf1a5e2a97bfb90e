"""Saves in a thread: copies that stay, one save at a time, errors that are not lost."""

import signal
import subprocess
import sys
import threading

import pytest
import torch

from gptsmith.train.checkpoint_writer import CheckpointWriter, HostMemory


def test_copies_stay_as_they_are_and_take_the_memory_of_the_copies_before() -> None:
    memory, weight = HostMemory(), torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    first = memory.copy({"weight": weight, "step": torch.tensor(1.0)})
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(first["weight"], torch.arange(6.0).view(2, 3))
    assert not first["weight"].requires_grad
    again = memory.copy({"weight": weight, "step": torch.tensor(2.0)})
    assert torch.equal(again["weight"], weight)
    assert again["weight"].data_ptr() == first["weight"].data_ptr()
    other = memory.copy({"weight": weight.detach().half()})  # does not fit there
    assert other["weight"].dtype == torch.float16


def test_one_save_at_a_time_and_the_last_ends_before_the_block_does() -> None:
    saved, go_on = [], threading.Event()

    def slowly() -> None:
        go_on.wait(60)
        saved.append("first")

    with CheckpointWriter(background=True) as writer:
        writer.start(slowly)
        writer.check()
        assert saved == []  # this thread goes on
        go_on.set()
        writer.start(lambda: saved.append("second"))
        assert saved[0] == "first"  # the second one has waited
    assert saved == ["first", "second"]


def fail() -> None:
    raise OSError(28, "No space left on device", "step-000010")


@pytest.mark.parametrize("call", ["check", "wait", "start"])
def test_an_error_is_raised_once_by_the_next_call(call: str) -> None:
    with CheckpointWriter(background=True) as writer:
        writer.start(fail)
        assert writer._save is not None
        while not writer._save.done():
            pass
        with pytest.raises(OSError, match=r"No space left on device: 'step-000010'"):
            writer.start(fail) if call == "start" else getattr(writer, call)()
        writer.check()
        writer.wait()


def test_an_error_is_a_note_of_one_that_ends_training_or_is_raised_at_the_end() -> None:
    def diverge() -> None:
        with CheckpointWriter(background=True) as writer:
            writer.start(fail)
            raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged") as raised:
        diverge()
    (note,) = raised.value.__notes__
    assert note.startswith("the last checkpoint was not written: ")
    assert "No space left" in note
    with pytest.raises(OSError, match="No space left"), CheckpointWriter(True) as writer:
        writer.start(fail)


HANGS = """
import time
from gptsmith.train.checkpoint_writer import CheckpointWriter
from gptsmith.train.signals import StopSignal
handle = StopSignal._handle
StopSignal._handle = lambda *all: (handle(*all), print("received", flush=True))
def save():
    print("ready", flush=True)
    time.sleep(600)
with StopSignal(), CheckpointWriter(background=True) as writer:
    writer.start(save)
    if {waits}:
        writer.wait()
    while True:  # a step
        pass
"""


@pytest.mark.parametrize("waits", [True, False])
def test_a_second_ctrl_c_does_not_wait_for_a_save(waits: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS.format(waits=waits)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "received\n"  # two at a time come in any order
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors
    assert "the checkpoint being written is abandoned" in errors
    assert process.returncode == -signal.SIGINT  # as Python ends after a Ctrl-C


def test_without_a_thread_a_save_is_executed_at_once() -> None:
    writer = CheckpointWriter(background=False)
    saved: list[int] = []
    with writer:
        writer.start(lambda: saved.append(threading.get_ident()))
        assert saved == [threading.get_ident()]
        with pytest.raises(OSError, match="No space left"):
            writer.start(fail)
    assert writer.memory is None
