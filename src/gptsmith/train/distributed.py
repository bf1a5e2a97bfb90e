"""Several processes train one model. The only files that import torch.distributed are this one and
sharding.py.

Each process is a rank, 0 to world_size() - 1. torchrun and srun start them and say in environment
variables who is who; recipes and the training step ask this file. A process that was started alone
is rank 0 of 1: then nothing here imports torch.distributed, and sums are what they are given.

Numbers on the host go through gloo in a group with a long time limit, because rank 0 evaluates,
generates and saves while the others wait; gradients go through NCCL on GPUs and gloo on CPUs.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from gptsmith import terminal

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn.parallel import DistributedDataParallel

    from gptsmith.train.checkpoint_writer import HostMemory

T = TypeVar("T")

START_TIMEOUT = timedelta(minutes=30)  # of a sum: some read data or compile, and others wait
STEP_TIMEOUT = timedelta(minutes=5)  # after the first step, no rank is late by more than this
HOST_TIMEOUT = timedelta(hours=4)  # while rank 0 evaluates or saves
_FAILED = "gptsmith/failed"
_POLL_SECONDS = 0.25
_LINGER_SECONDS = 4.0  # for another rank to report its error and to end


@dataclass(frozen=True)
class Launch:
    """Which of several processes this is, and where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int  # number on this machine, which is that of its GPU among those it sees
    address: str
    port: int

    @classmethod
    def from_environment(cls, env: dict[str, str] | os._Environ[str] = os.environ) -> Launch | None:
        """As torchrun or srun says; None for a process that was started alone.

        Without srun, the variables of a Slurm job do not count: a batch script is one process.
        """
        address, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
        if "RANK" in env and "WORLD_SIZE" in env:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            address, port = address or "localhost", port or "29500"
        elif "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
            hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
            address = address or first_host(hosts)
            port = port or str(20_000 + int(env.get("SLURM_JOB_ID", "0")) % 20_000)
            if "," not in env.get("CUDA_VISIBLE_DEVICES", ","):
                env = {**env, "SLURM_LOCALID": "0"}  # --gpus-per-task: it sees its own GPU only
        else:
            return None
        rank, size, local = (int(env.get(name, "0")) for name in names)
        return cls(rank, size, local, address, int(port)) if size > 1 else None


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[003-007,9],login` -> gpu003."""
    found = re.match(r"([^,\[]+)(?:\[([^],-]+)[^]]*\])?([^,\[]*)", nodes)
    assert found, nodes
    return "".join(part or "" for part in found.groups())


@dataclass(frozen=True)
class _Connection:
    launch: Launch
    store: Any  # of torch.distributed: keys that all ranks see
    host: Any  # group for numbers on the host


_connection: _Connection | None = None


def rank() -> int:
    return _connection.launch.rank if _connection else 0


def world_size() -> int:
    return _connection.launch.world_size if _connection else 1


def local_rank() -> int:
    return _connection.launch.local_rank if _connection else 0


# --- start and end -------------------------------------------------------------------------------


@contextmanager
def connected() -> Iterator[None]:
    """Connect to the other ranks, if this process was started as one of several.

    What other ranks than 0 print is discarded. The first rank that fails raises its error, which
    its caller prints; all others end seconds later, with exit code 1 and no message.
    """
    launch = Launch.from_environment()
    if launch is None or _connection is not None:
        yield
        return
    connection = _connect(launch)
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(connection, ended), daemon=True)
    watch.start()
    try:
        with terminal.silenced() if launch.rank else nullcontext():
            yield
            barrier()  # none ends while another works: torchrun would stop that one
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code:
            _report_first(connection, error, ended)
        raise
    finally:
        ended.set()
        watch.join(10)  # at the end of Python, a thread inside the store would crash the process
    _disconnect()


@contextmanager
def alone() -> Iterator[None]:
    """For what rank 0 does while the others wait: inside, it is the only rank."""
    global _connection
    connection, _connection = _connection, None
    try:
        yield
    finally:
        _connection = connection


def _connect(launch: Launch) -> _Connection:
    global _connection
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(launch.local_rank), MASTER_ADDR=launch.address, MASTER_PORT=str(launch.port),
    )  # fmt: skip
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda:
        torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
    store, *_ = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store, rank=launch.rank, world_size=launch.world_size, timeout=START_TIMEOUT,
    )  # fmt: skip
    host = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    _connection = _Connection(launch, store, host)
    return _connection


def _disconnect() -> None:
    global _connection
    import torch.distributed as dist

    _connection = None
    dist.destroy_process_group()


def _watch(connection: _Connection, ended: threading.Event) -> None:
    """End this process if another rank has failed, or rank 0, which may keep the store, is gone."""
    while not ended.wait(_POLL_SECONDS):
        try:
            failed = connection.store.check([_FAILED])
        except Exception:
            failed = None
        if failed is not False and not ended.is_set():
            ended.set()  # what fails from now on is left to this thread
            _end_silently(connection, store_is_lost=failed is None)


def _report_first(connection: _Connection, error: BaseException, ended: threading.Event) -> None:
    """Return on the rank whose error is to be shown; all others end here.

    Mostly all ranks meet the same error: then it is that of rank 0. What only follows from the end
    of another rank, such as a lost connection, waits for the error of that one.
    """
    me = connection.launch.rank
    expected = isinstance(error, ValueError | OSError | KeyboardInterrupt)
    time.sleep((0.0 if expected else 1.5) + (0.75 if me else 0.0))
    if ended.is_set():
        time.sleep(2 * _LINGER_SECONDS)  # the watch is about to end this process
    ended.set()
    try:
        first = connection.store.compare_set(_FAILED, "", str(me)) == str(me).encode()
    except Exception:
        _end_silently(connection, store_is_lost=True)
    if not first:
        _end_silently(connection)
    if me:
        terminal.note(f"rank {me} on {socket.gethostname()}:")
    time.sleep(3 * _POLL_SECONDS)  # the others look for it in the store, which rank 0 may keep


def _end_silently(connection: _Connection, store_is_lost: bool = False) -> NoReturn:
    """End this process. If rank 0 is gone and could not say why, rank 1 reports that.

    Otherwise the rank that failed ends first: as soon as one has ended, torchrun stops all others,
    and with them the one that has yet to print its error.
    """
    if not store_is_lost:
        time.sleep(_LINGER_SECONDS)
    elif connection.launch.rank == 1:
        terminal.last_words("rank 0 has ended without a message: it was killed or has crashed")
    os._exit(1)


# --- values on the host --------------------------------------------------------------------------


def from_rank_0(make: Callable[[], T]) -> T:
    """make() of rank 0, on every rank: a JSON value. Only rank 0 calls it, the others wait."""
    if _connection is None:
        return make()
    return _broadcast(make() if rank() == 0 else None, 0)


def from_all(value: T) -> list[T]:
    """The value of every rank, a JSON value, in the order of the ranks."""
    return [_broadcast(value, source) for source in range(world_size())]


def _broadcast(value: Any, source: int) -> Any:
    if _connection is None:
        return value
    import torch
    import torch.distributed as dist

    data = json.dumps(value).encode() if rank() == source else b""
    length = torch.tensor([len(data)])
    dist.broadcast(length, source, group=_connection.host)
    content = torch.zeros(int(length), dtype=torch.uint8)
    if rank() == source:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    dist.broadcast(content, source, group=_connection.host)
    return json.loads(content.numpy().tobytes())


def sums(*numbers: float) -> list[float]:
    """The sum of each number over all ranks; exact for integers below 2^53."""
    if _connection is None:
        return list(numbers)
    import torch

    return sum_over_ranks(torch.tensor(numbers, dtype=torch.float64)).tolist()


def barrier() -> None:
    """Wait until all ranks are here."""
    sums(0.0)


# --- tensors -------------------------------------------------------------------------------------


def sum_over_ranks(x: Tensor) -> Tensor:
    """All-reduce: the sum of x over all ranks, in x. CPU tensors wait as long as rank 0 may work
    alone."""
    if _connection is not None:
        import torch.distributed as dist

        dist.all_reduce(x, group=_connection.host if x.device.type == "cpu" else None)
    return x


def broadcast_tensors(owners: Mapping[Tensor, int]) -> None:
    """Each tensor becomes that of its owner, on all ranks. owners: in the same order everywhere."""
    if _connection is None:
        return
    import torch.distributed as dist

    sent = [dist.broadcast(x.detach(), r, async_op=True) for x, r in owners.items()]
    for work in sent:
        work.wait()


def gather_owned(own: Mapping[str, Tensor], memory: HostMemory | None = None) -> dict[str, Tensor]:
    """The named tensors of all ranks, on the CPU of rank 0; other ranks get an empty dict.

    memory: where rank 0 gets copies, which stay as they are; otherwise its own tensors are not
    copied from CPU to CPU, nor those of a process alone from anywhere.
    """
    if _connection is None:
        return dict(own) if memory is None else memory.copy(own)
    import torch
    import torch.distributed as dist

    from gptsmith.train.checkpoint_writer import HostMemory

    received = memory or HostMemory()
    found: dict[str, Tensor] = {}
    if rank() == 0:
        found = {n: x.cpu() for n, x in own.items()} if memory is None else memory.copy(own)
    described = [(n, str(x.dtype).removeprefix("torch."), [*x.shape]) for n, x in own.items()]
    for source, tensors in enumerate(from_all(described)):
        for name, dtype, shape in tensors if source else ():
            if rank() == source:
                dist.send(own[name].cpu().contiguous(), 0, group=_connection.host)
            elif rank() == 0:
                found[name] = received.empty(name, shape, getattr(torch, dtype))
                dist.recv(found[name], source, group=_connection.host)
    return found


def data_parallel(module: nn.Module) -> DistributedDataParallel:
    """DistributedDataParallel around a module whose forward is the loss. Parameters become those of
    rank 0; gradients are added up over all ranks, not averaged, during the backward pass."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    def add(bucket: dist.GradBucket) -> Any:
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    with warnings.catch_warnings():  # 2.13 renames the argument
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = DistributedDataParallel(
            module,
            broadcast_buffers=False,  # they are constants
            gradient_as_bucket_view=True,
        )
    # a lambda, since DDP compares annotations, which are strings in this file
    wrapped.register_comm_hook(None, lambda state, bucket: add(bucket))
    return wrapped


def expect_steps() -> None:
    """From now on ranks are at most STEP_TIMEOUT apart in a step: a dead machine is noticed."""
    if _connection is not None:
        from torch.distributed import distributed_c10d

        distributed_c10d._set_pg_timeout(STEP_TIMEOUT)
