# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # One step on two ranks
#
# Several processes can train one model: each reads a share of the rows, and all take the same
# step. Processes are called ranks. This lesson takes steps on one process and on two real ones,
# and compares them to the last bit; it shows the division that people get wrong, and which rank
# keeps what. It takes about ten seconds, two cores, and downloads nothing.
#
# B batch, T time, C channels, V vocabulary.

# %%
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from itertools import islice

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import gptsmith
from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.recipes.micro_batches import micro_batches
from gptsmith.train import distributed
from gptsmith.train.loss import next_token_loss
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig
from gptsmith.train.runtime import Precision
from gptsmith.train.step import train_steps

# %% [markdown]
# ## The program
#
# All processes run this file. Which of them it is, a process learns from environment variables,
# which `torchrun` and `srun` set. Each has the same rows, with very different numbers of targets,
# as in chat data, where only answers are learned; and each has the same small model.

# %%
T, V = 16, 24
ROWS, BATCH = 4, 2  # rows of a step, and of a micro-batch
TARGETS = (2, 3, 16, 15)  # of the rows, again and again


class Rows:
    """Random rows; row i has TARGETS[i % 4] targets, at its end."""

    T, per_epoch = T, 1000

    def batch(self, first: int, count: int) -> Batch:
        ids = torch.stack([
            torch.randint(V, (T + 1,), generator=torch.Generator().manual_seed(i))
            for i in range(first, first + count)
        ])  # fmt: skip
        targets = ids[:, 1:].clone()
        for row, target in enumerate(targets, first):
            target[: T - TARGETS[row % 4]] = IGNORE_INDEX
        return Batch(ids[:, :-1], targets, name=f"rows {first} to {first + count - 1}")


def small_model(dropout: float = 0.0) -> gptsmith.GPTModel:
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, context_length=T, vocab_size=V)
    return gptsmith.GPTModel(gptsmith.ModelConfig(**sizes, dropout=dropout))


# %% [markdown]
# What differs is the share of the rows that each of them reads.


# %%
def share(step: int) -> list[Batch]:
    """The micro-batches of this rank."""
    rank, ranks = distributed.rank(), distributed.world_size()
    return micro_batches(Rows(), step * ROWS, ROWS, BATCH, rank, ranks)


# %% [markdown]
# `by_hand` takes the gradient of one step in plain PyTorch: count the targets of all ranks, divide
# by this one number, and add the gradients up.


# %%
def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def by_hand() -> list[float]:
    """The gradient of the first step, of all parameters in a row."""
    model = small_model()
    count = torch.tensor(sum(batch.count for batch in share(0)))
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(count)
    for batch in share(0):
        (next_token_loss(model, batch) / count).backward()
    if distributed.world_size() > 1:
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad)
    return flat(parameter.grad for parameter in model.parameters()).tolist()


# %% [markdown]
# `by_package` takes several steps by gptsmith's loop.


# %%
def by_package(kind: str, steps: int = 5) -> dict:
    """Losses, final weights, and how many numbers of optimizer state this rank keeps, by name."""
    model = small_model(dropout=0.1)
    optimizer = Optimizer(model, OptimConfig(kind=kind), "cpu")
    run = train_steps(
        model, next_token_loss, share, optimizer, learning_rate=lambda step: 0.01,
        precision=Precision("fp32", "cpu", ""), max_grad_norm=1.0, seed=0,
    )  # fmt: skip
    losses = [step.loss for step in islice(run, steps)]
    kept = {
        name: sum(x.numel() for x in each.state[parameter].values() if x.dim())
        for each in optimizer.optimizers
        for parameter, name in optimizer.names.items()
        if each.state.get(parameter)
    }
    return {"losses": losses, "weights": flat(model.parameters()).tolist(), "kept": kept}


# %% [markdown]
# A process that was started as one of several is given its rank. It connects to the others, and
# leaves what it finds to the one that started it. This notebook has no rank: it is the only
# process, rank 0 of 1, and goes on.


# %%
def results() -> dict:
    return {
        "rank": distributed.rank(),
        "rows": [batch.name for batch in share(0)],
        "gradient": by_hand(),
        "adamw": by_package("adamw"),
        "muon": by_package("muon"),
    }


if "RANK" in os.environ:
    torch.set_num_threads(1)
    with distributed.connected():
        found = results()
    json.dump(found, sys.stdout)
    sys.exit()

one = results()
print(f"rank {one['rank']} alone reads {one['rows']}")

# %% [markdown]
# ## Two processes
#
# They find each other at a port of this machine, and exchange numbers through gloo; GPUs use NCCL
# instead.

# %%
FILE = globals().get("__file__", "ranks.py")  # Jupyter, in this folder, does not name it


def on_ranks(count: int) -> list[dict]:
    """What this file finds on each of so many processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = dict(
        WORLD_SIZE=str(count), MASTER_ADDR="localhost", MASTER_PORT=str(port), OMP_NUM_THREADS="1"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, FILE],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        done = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), [said for _, said in done]
    return [json.loads(out) for out, _ in done]


two = on_ranks(2)
for rank in two:
    print(f"rank {rank['rank']} of 2 reads {rank['rows']}")
assert two[0]["rows"] + two[1]["rows"] == one["rows"]

# %% [markdown]
# Micro-batches are the same for any number of ranks, which take turns. Here is the step: four
# rows, of which the first rank has 5 targets, and the second 31.

# %%
rows = Rows().batch(0, 4)
is_target = rows.targets != IGNORE_INDEX  # (B, T)
picture = is_target * torch.tensor([1, 1, 2, 2])[:, None]  # by the rank that reads the row
colours = ("#eceff4", "#3b6ea5", "#e07a3f")
figure, axis = plt.subplots(figsize=(6.5, 2.2), layout="constrained")
axis.imshow(picture.numpy(), cmap=ListedColormap(colours), vmin=0, vmax=2)
axis.set(xlabel="position", ylabel="row", title="targets of a step")
axis.set_yticks(range(4))
axis.set_xticks([i + 0.5 for i in range(16)], minor=True)
axis.set_yticks([i + 0.5 for i in range(4)], minor=True)
axis.grid(which="minor", color="white")
axis.tick_params(which="minor", length=0)
names = ("context only", "rank 0", "rank 1")
handles = [Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=True)]
figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
assert is_target.sum(dim=1).tolist() == [2, 3, 16, 15]

# %% [markdown]
# ## The division
#
# The loss of a step is the mean over its targets. Data-parallel code often lets each rank take the
# mean over its own, and averages the gradients. Where targets are uneven, that is a different
# gradient: each of rank 0's 5 targets weighs as much as six of rank 1's. The right way is to add
# up sums, and to divide once, by the number of targets of all ranks.

# %%
model = small_model()


def gradient(*losses: torch.Tensor) -> torch.Tensor:
    """Of the sum of these losses: all parameters in a row."""
    return flat(torch.autograd.grad(sum(losses), [*model.parameters()]))


halves = [Rows().batch(first, 2) for first in (0, 2)]
whole = gradient(next_token_loss(model, rows) / rows.count)
mean_of_means = gradient(*(next_token_loss(model, half) / half.count / 2 for half in halves))
sum_of_sums = gradient(*(next_token_loss(model, half) / rows.count for half in halves))

figure, axes = plt.subplots(1, 2, figsize=(7, 3.4), sharey=True, layout="constrained")
for axis, (name, found) in zip(
    axes,
    (("mean of the ranks' means", mean_of_means), ("sums, divided once", sum_of_sums)),
    strict=True,
):
    error = float((found - whole).norm() / whole.norm())
    axis.plot(whole.numpy(), found.numpy(), ".", markersize=2)
    axis.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    axis.set(xlabel="gradient of the whole batch", title=f"{name}\nrelative error {error:.1g}")
axes[0].set_ylabel("gradient from two shares")
assert (mean_of_means - whole).norm() > 0.2 * whole.norm()
torch.testing.assert_close(sum_of_sums, whole, rtol=1e-3, atol=1e-6)

# %% [markdown]
# This is how `results` does it, by hand and in the package. Its gradient on two processes is
# that of one process with two micro-batches, to the last bit: both add the same two numbers, and
# the sum of two does not depend on their order.

# %%
for rank in two:
    assert rank["gradient"] == one["gradient"]
torch.testing.assert_close(torch.tensor(one["gradient"]), whole, rtol=1e-3, atol=1e-6)
print(f"{len(one['gradient']):,} numbers, equal to the last bit on both ranks and on one process")

# %% [markdown]
# ## Whole steps
#
# Five steps with dropout, each with clipping and an update. Random numbers of a micro-batch depend
# on its number in the step and not on the rank that computes it; so losses and weights stay equal.

# %%
for kind in ("adamw", "muon"):
    for rank in two:
        assert rank[kind]["losses"] == one[kind]["losses"]
        assert rank[kind]["weights"] == one[kind]["weights"]
    print(kind, [round(loss, 4) for loss in two[1][kind]["losses"]])

# %% [markdown]
# With three ranks or more, sums are formed in an order of their own, and (a + b) + c is not always
# a + (b + c). Then two runs on three ranks are equal bit for bit, and one on three and one on a
# single process only nearly.

# %%
a, b, c = (torch.tensor(x) for x in (1e8, -1e8, 1.0))
print((a + b) + c, a + (b + c))
assert (a + b) + c != a + (b + c)

# %% [markdown]
# ## Who keeps what
#
# Each rank has all weights, but AdamW's two moments, as large as the model twice, need not be
# everywhere. Each parameter has an owner, which keeps its moments, updates it and sends it to the
# others. The largest parameters are given away first, each to the rank that has least.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for axis, kind in zip(axes, ("adamw", "muon"), strict=True):
    parts = [rank[kind]["kept"] for rank in two]
    every = one[kind]["kept"]
    assert not parts[0].keys() & parts[1].keys()
    assert parts[0] | parts[1] == every
    names = [name for name, _ in small_model().named_parameters()]
    of_rank = [colours[1 + (name in parts[1])] for name in names]
    axis.barh(names, [every[name] for name in names], color=of_rank)
    sums = [sum(part.values()) for part in parts]
    axis.set(xlabel="numbers of optimizer state", title=f"{kind}: {sums[0]:,} + {sums[1]:,}")
    axis.tick_params(labelsize=7)
    axis.invert_yaxis()
    assert max(sums) < 0.6 * sum(every.values())
figure.legend(handles=handles[1:], loc="outside lower center", ncols=2, fontsize=9)
print({kind: sum(one[kind]["kept"].values()) for kind in ("adamw", "muon")}, "on one process")

# %% [markdown]
# Muon keeps one moment for each matrix of the blocks instead of two. A checkpoint gathers the
# state of all ranks, so it does not depend on their number, and a run on two can be resumed on
# one. A command trains on several ranks when `torchrun` starts it, as in `torchrun
# --nproc-per-node 2 -m gptsmith pretrain ...`; with `--train.shard`, weights and gradients are
# divided among them too.
#
# ## Exercises
#
# Some of these break an assertion. Which one, and rightly so? Change the file and run it as a
# script: the processes read the file, not what is open in a notebook.
#
# 1. Make `TARGETS = (9, 9, 9, 9)`. What becomes of the error of the mean of means?
# 2. Make `ROWS = 6`, which is three micro-batches: rank 1 has none in the second turn. What does
#    `micro_batches` give it instead? Is the gradient on two ranks still equal to the last bit, and
#    if not, how large is the difference?
# 3. Remove the first `all_reduce` in `by_hand`. The gradient of two ranks is now that of the mean
#    of means, but for a factor. Which factor is it? Check it with `mean_of_means`.
