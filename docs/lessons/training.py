# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Training
#
# What happens between random weights and a trained model: the first test of any training code,
# what a loss is divided by, learning rates, two optimizers side by side, and a run that is killed
# and goes on as if nothing had happened. It takes about twenty seconds and downloads nothing.

# %%
import hashlib
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import torch

import gptsmith
from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.data.dataset import validation_batches
from gptsmith.data.options import PrepareConfig
from gptsmith.data.prepare import prepare
from gptsmith.train import checkpoint
from gptsmith.train.loss import next_token_loss
from gptsmith.train.monitor import read_events
from gptsmith.train.optim import Optimizer, orthogonalize
from gptsmith.train.options import OptimConfig
from gptsmith.train.runtime import Precision
from gptsmith.train.schedule import Duration, learning_rate
from gptsmith.train.step import Step, train_steps

# %% [markdown]
# ## Text and model
#
# The language reference of Python, which comes with Python, as bytes, and a model of 120 thousand
# parameters. `train` is gptsmith's own training step, by which all experiments on this page are
# made.

# %%
TEXT = "\n".join(dict.fromkeys(topics.values()))
tokenizer = gptsmith.Tokenizer.byte()
tokens = tokenizer.encode_array(TEXT)
held_out, tokens = tokens[:4000], tokens[4000:]
T, B = 32, 16
windows = gptsmith.Windows([tokens], T)
config = gptsmith.ModelConfig(
    n_layer=2, n_head=2, n_embd=64, context_length=T, vocab_size=tokenizer.vocab_size
)


def new_model() -> gptsmith.GPTModel:
    torch.manual_seed(0)
    return gptsmith.GPTModel(config)


def train(
    model: gptsmith.GPTModel, optim: OptimConfig, steps: int, batches: Sequence[Batch] = ()
) -> list[Step]:
    """Trains on the windows in their order, or on these batches in every step."""
    duration = Duration(steps, None)
    done = train_steps(
        model,
        next_token_loss,
        lambda step: batches or [windows.batch(step * B, B)],
        Optimizer(model, optim, "cpu"),
        learning_rate=lambda step: learning_rate(optim, duration, step, 0.0),
        precision=Precision("fp32", "cpu", "a small model"),
        max_grad_norm=optim.max_grad_norm,
        seed=0,
    )
    return list(islice(done, steps))


# %% [markdown]
# ## First, overfit one batch
#
# A model that is trained on the same batch again and again must learn it by heart. If it does not,
# targets, loss, gradients or optimizer are wrong, and no large run will find out which. The first
# loss is known, too: an untrained model guesses, ln V.

# %%
one_batch = windows.batch(0, B)
memorize = OptimConfig(learning_rate=1e-2, schedule="constant")
losses = [step.loss for step in train(new_model(), memorize, 100, [one_batch])]
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(losses)
axes.axhline(math.log(config.vocab_size), color="grey", linestyle=":", label="ln V: guessing")
axes.set(
    xlabel="step", ylabel="loss, nats per byte", yscale="log", title="one batch, again and again"
)
axes.legend()
plt.show()
print(f"loss {losses[0]:.2f} (ln V is {math.log(config.vocab_size):.2f}) -> {losses[-1]:.3f}")
assert abs(losses[0] - math.log(config.vocab_size)) < 0.2
assert losses[-1] < 0.5

# %% [markdown]
# ## Accumulation: four small batches are one large batch
#
# A batch that does not fit into memory is computed in parts, whose gradients are added up. The
# loss of gptsmith is a sum, and the number of targets is counted over all parts *before* it is
# divided by. Where parts have different numbers of targets (padding, masked prompts), the mean of
# their means is another loss, in which the tokens of short texts count for more.

# %%
large = windows.batch(0, 16)
targets = large.targets.clone()
for row in range(16):  # row 0 has 2 targets, row 15 all 32
    targets[row, : T - 2 * (row + 1)] = IGNORE_INDEX
large = Batch(large.inputs, targets)
parts = [Batch(large.inputs[n : n + 4], targets[n : n + 4]) for n in range(0, 16, 4)]
print("targets in each part:", [part.count for part in parts])


def gradient(batches: Sequence[Batch], divisors: Sequence[float]) -> torch.Tensor:
    model = new_model()
    for batch, divisor in zip(batches, divisors, strict=True):
        (next_token_loss(model, batch) / divisor).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


whole = gradient([large], [large.count])
summed = gradient(parts, [large.count] * 4)
mean_of_means = gradient(parts, [4 * part.count for part in parts])


def difference(other: torch.Tensor) -> float:
    return float((other - whole).norm() / whole.norm())


print(f"sums by the number of all targets: differs by {difference(summed):.1e}")
print(f"mean of the parts' means:          differs by {difference(mean_of_means):.1e}")
assert difference(summed) < 1e-5
assert difference(mean_of_means) > 0.1

# %% [markdown]
# The training step does that with every list of micro-batches.

# %%
at_once, in_parts = (train(new_model(), OptimConfig(), 1, made)[0] for made in ([large], parts))
print(f"loss {at_once.loss:.5f} and {in_parts.loss:.5f}")
print(f"norm of the gradient {at_once.grad_norm:.5f} and {in_parts.grad_norm:.5f}")
assert math.isclose(at_once.loss, in_parts.loss, rel_tol=1e-5)
assert math.isclose(at_once.grad_norm, in_parts.grad_norm, rel_tol=1e-4)

# %% [markdown]
# ## Schedules
#
# The rate rises for some steps, since at first gradients change quickly and the optimizer has
# averaged few of them, and it falls at the end: small steps average out the noise of single
# batches. *cosine* falls all the time. *wsd* (warm-up, stable, decay) stays at the peak until the
# last part, so a run can be made longer without beginning anew.

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for schedule in ("cosine", "linear", "wsd", "constant"):
    optim = OptimConfig(schedule=schedule, learning_rate=3e-3, warmup_steps=20, min_lr_ratio=0.05)
    rates = [learning_rate(optim, Duration(200, None), step, 0.0) for step in range(200)]
    axes.plot(rates, label=schedule)
    assert max(rates) == rates[20] == 3e-3  # the step after warm-up has the peak
    if schedule != "constant":
        assert rates[-1] < 0.1 * 3e-3
axes.set(xlabel="step", ylabel="learning rate", title="schedules of 200 steps, 20 of them warm-up")
axes.legend()
plt.show()

# %% [markdown]
# ## What an optimizer makes of a gradient
#
# The gradient of a matrix is large in a few directions and small in most: its singular values fall
# quickly. AdamW divides each number by its own recent size, which evens them out a little. Muon
# replaces the matrix by the nearest orthogonal one, so that all directions are learned equally
# fast. Here is the first update of one matrix; sizes relative to the largest.

# %%
model = new_model()
(next_token_loss(model, one_batch) / one_batch.count).backward()
G = model.blocks[0].mlp.down.weight.grad  # (C, F)
muon_update = orthogonalize(G[None])[0]
adam_update = G.sign()  # of its first step: the gradient, divided by its own size
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for name, matrix in (("gradient", G), ("AdamW's", adam_update), ("Muon's", muon_update)):
    values = torch.linalg.svdvals(matrix)
    axes.plot((values / values[0]).tolist(), label=name)
axes.set(xlabel="direction", ylabel="singular value, relative", title="first update of a matrix")
axes.legend()
plt.show()
spread = torch.linalg.svdvals(muon_update)
assert spread.min() > 0.5 * spread.max()
assert torch.linalg.svdvals(G).min() < 0.1 * torch.linalg.svdvals(G).max()

# %% [markdown]
# ## AdamW and Muon side by side
#
# The same model, batches, and number of steps. A comparison at one learning rate would only tell
# which optimizer that rate suits, so each gets several, and its best one counts. In gptsmith, Muon
# trains the matrices of the blocks, AdamW the rest, with one rate for both. This is a small model
# at the beginning of its training, and no more than that.


# %%
def held_out_loss(model: gptsmith.GPTModel) -> float:
    total = count = 0.0
    with torch.no_grad():
        for batch in validation_batches([held_out], T, 64, None):
            total += float(next_token_loss(model.eval(), batch))
            count += batch.count
    return total / count


RATES = [2e-3, 1e-2, 5e-2]
STEPS = 70
results: dict[str, list[float]] = {}
curves: dict[str, list[list[float]]] = {}
for kind in ("adamw", "muon"):
    results[kind], curves[kind] = [], []
    for rate in RATES:
        model = new_model()
        steps = train(model, OptimConfig(kind=kind, learning_rate=rate, warmup_steps=10), STEPS)
        curves[kind].append([step.loss for step in steps])
        results[kind].append(held_out_loss(model))

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for kind, values in results.items():
    left.plot(RATES, values, marker="o", label=kind)
    best = values.index(min(values))
    right.plot(curves[kind][best], label=f"{kind}, {RATES[best]:g}")
left.set(xscale="log", xlabel="learning rate", ylabel="held-out loss, nats per byte")
left.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
left.minorticks_off()
left.set(title=f"after {STEPS} steps")
right.set(xlabel="step", ylabel="training loss, nats per byte", title="each at its best rate")
for axes in (left, right):
    axes.legend()
plt.show()
print({kind: round(min(values), 3) for kind, values in results.items()})
assert min(results["muon"]) < min(results["adamw"])

# %% [markdown]
# ## Killed, and resumed to the bit
#
# A run that needs days will be interrupted. Here is a small one, three times: undisturbed; in a
# process of its own, which is killed with SIGKILL, so that it can neither save nor clean up; and
# resumed from what that process has left.

# %%
directory = tempfile.TemporaryDirectory()
folder = Path(directory.name)
(folder / "text.txt").write_text(TEXT[:200_000], encoding="utf-8")
corpus = prepare(
    PrepareConfig(sources=(str(folder / "text.txt"),), out=folder / "corpus", tokenizer="byte")
)
recipe = folder / "recipe.yaml"
recipe.write_text(f"""
data: {corpus}
model: {{n_layer: 2, n_head: 2, n_embd: 64, context_length: 32, dropout: 0.1}}
train: {{steps: 120, batch_size: 8, num_threads: 1}}
eval: {{interval: 0, sample_tokens: 0}}
save: {{interval: 15}}
monitor: {{log_interval: 1, trackers: [none]}}
""")
undisturbed, killed = folder / "undisturbed", folder / "killed"
gptsmith.pretrain(recipe, out=undisturbed)


def losses_of(run: Path) -> dict[int, float]:
    """The loss of each step on record."""
    log = run / "metrics.jsonl"
    events = read_events(log) if log.exists() else []
    return {e["step"]: e["train_loss"] for e in events if e["event"] == "train"}


# %% [markdown]
# The process is killed when 40 steps are on record.

# %%
process = subprocess.Popen(
    [sys.executable, "-m", "gptsmith", "pretrain", recipe, "--out", killed],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
)
while process.poll() is None and len(losses_of(killed)) < 40:
    time.sleep(0.002)
process.send_signal(signal.SIGKILL)
assert process.wait() == -signal.SIGKILL
before = losses_of(killed)
print("killed after step", max(before))
print("left behind:", *sorted(path.name for path in (killed / "checkpoints").iterdir()))
assert not (killed / "model.safetensors").exists()

# %% [markdown]
# `--resume` takes the newest checkpoint that is complete. Steps since then are computed again.
# Dropout is on in this run, and batches come in random order; both are functions of seed and step,
# not states of generators, so they are the same again.

# %%
newest, _ = checkpoint.find(killed / "checkpoints")
gptsmith.pretrain(recipe, out=killed, resume=True)
after = losses_of(killed)

figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
whole = losses_of(undisturbed)
axes.plot(whole.keys(), whole.values(), color="lightgrey", linewidth=6, label="undisturbed")
axes.plot(before.keys(), before.values(), label="until SIGKILL")
rest = {step: loss for step, loss in after.items() if step > newest.step}
axes.plot(rest.keys(), rest.values(), linestyle="--", label="resumed")
axes.axvline(newest.step, color="black", linewidth=0.8, linestyle=":", label="newest checkpoint")
axes.set(xlabel="step", ylabel="training loss, nats per byte", title="killed and resumed")
axes.legend()
plt.show()
print(f"resumed at step {newest.step}; steps computed twice: {max(before) - newest.step}")
assert after == whole  # every loss, every digit
assert all(before[step] == whole[step] for step in before)

# %% [markdown]
# Weights and optimizer state are equal, too, in every bit: so are the digests of the files.


# %%
def digests(run: Path) -> dict[str, str]:
    files = [run / "model.safetensors", *sorted(run.glob("checkpoints/step-000120/*.safetensors"))]
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


for name, digest in digests(killed).items():
    print(digest[:16], digests(undisturbed)[name][:16], name)
assert digests(killed) == digests(undisturbed)
assert len(digests(killed)) == 3
directory.cleanup()

# %% [markdown]
# ## Exercises
#
# 1. Overfit one batch with `learning_rate=1e-5`, and with 0.3. How does each curve differ from the
#    one above, and which of them looks like a bug in the data or in the loss?
# 2. Train one step on `[large] * 4`, and compare its `grad_norm` with that of `[large]`. Why is it
#    not four times as large?
# 3. Kill the process at its beginning (wait for 1 step instead of 40), or twice. What is lost, and
#    are the digests still the same?
