"""Saves in a thread: copies that stay, one save at a time, errors that are not lost."""

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


def test_without_a_thread_a_save_is_executed_at_once() -> None:
    writer = CheckpointWriter(background=False)
    saved: list[int] = []
    with writer:
        writer.start(lambda: saved.append(threading.get_ident()))
        assert saved == [threading.get_ident()]
        with pytest.raises(OSError, match="No space left"):
            writer.start(fail)
    assert writer.memory is None
