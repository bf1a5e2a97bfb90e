# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # The model, by hand
#
# From token ids to logits with nothing but the weights of a trained model and matrix products:
# every step is computed by hand and compared with the part of gptsmith that does the same, the
# result with transformers' own Llama. The attention of this model can be understood, because the
# model has learned one thing: to copy. It takes about ten seconds and downloads nothing.
#
# T time (positions), C channels, H query heads, K key/value heads, D head size, V vocabulary.

# %%
import copy
import math
import tempfile
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import gptsmith
from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.interop import hf
from gptsmith.interop.external_model import ExportableModel
from gptsmith.model import flops, state_dict
from gptsmith.train.loss import next_token_loss
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig
from gptsmith.train.runtime import Precision
from gptsmith.train.schedule import Duration, learning_rate
from gptsmith.train.step import train_steps

torch.manual_seed(0)

# %% [markdown]
# ## A model that copies
#
# Its texts are seven random letters, a semicolon, and the same letters again. The first half
# cannot be predicted. The second can, by looking seven positions back.

# %%
LETTERS = "abcdefghijklmnopqrstuvwxyz"
N = 7
tokenizer = gptsmith.Tokenizer.char([LETTERS + ";"])
config = gptsmith.ModelConfig(
    n_layer=2, n_head=4, n_kv_head=2, n_embd=64, d_ff=128, context_length=2 * N + 1,
    vocab_size=tokenizer.vocab_size,
)  # fmt: skip
model = gptsmith.GPTModel(config)


def copies(step: int, rows: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(step)
    letter_ids = torch.tensor(tokenizer.encode(LETTERS))
    word = letter_ids[torch.randint(len(LETTERS), (rows, N), generator=generator)]
    semicolon = torch.full((rows, 1), tokenizer.encode(";")[0])
    ids = torch.cat([word, semicolon, word], dim=1)  # (rows, 2N + 1)
    targets = ids[:, 1:].clone()
    targets[:, :N] = IGNORE_INDEX  # the first word is read, not predicted
    return Batch(ids[:, :-1], targets)


STEPS = 200
optim = OptimConfig(learning_rate=8e-3, weight_decay=0)
training = train_steps(
    model,
    next_token_loss,
    lambda step: [copies(step)],
    Optimizer(model, optim, "cpu"),
    learning_rate=lambda step: learning_rate(optim, Duration(STEPS, None), step, 0.0),
    precision=Precision("fp32", "cpu", "small"),
    max_grad_norm=1.0,
    seed=0,
)
losses = [step.loss for step in islice(training, STEPS)]
model.eval()

figure, axes = plt.subplots(figsize=(5, 2.5), layout="constrained")
axes.plot(losses)
axes.axhline(math.log(len(LETTERS)), color="grey", linestyle=":", label="guessing one of 26")
axes.set(xlabel="step", ylabel="loss, nats per letter", title="learning to copy")
axes.legend()
plt.show()
assert losses[-1] < 0.1

# %% [markdown]
# ## Embedding: a row for each id
#
# The embedding is a matrix (V, C). Looking up a row is a product with a vector that is 1 at the id
# and 0 elsewhere, which is why it can be trained like any other matrix.

# %%
TEXT = "machine;machin"
ids = torch.tensor(tokenizer.encode(TEXT))  # (T,)
T, C = len(ids), config.n_embd
E = model.embedding.token.weight.detach()  # (V, C)
one_hot = torch.nn.functional.one_hot(ids, config.vocab_size).float()  # (T, V)
x = one_hot @ E  # (T, C)
assert torch.equal(x, E[ids])
assert torch.equal(x, model.embedding(ids[None])[0])

# %% [markdown]
# ## RMSNorm: a common length
#
# Every layer reads its input at a common scale: divided by its root mean square, and multiplied by
# a learned weight for each channel.


# %%
def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    rms = (x.square().mean(dim=-1, keepdim=True) + config.norm_eps).sqrt()
    return x / rms * weight


block = model.blocks[0]
h = rms_norm(x, block.attention_norm.weight)
torch.testing.assert_close(h, block.attention_norm(x), rtol=1e-5, atol=1e-5)
torch.testing.assert_close(rms_norm(10 * x, block.attention_norm.weight), h, rtol=1e-3, atol=1e-3)

# %% [markdown]
# ## RoPE: positions are angles
#
# The D numbers of a query or key are D/2 complex numbers: number i has its real part at i and its
# imaginary part at i + D/2. At position t, number i is turned by t * theta^(-2i/D). The first
# turns by one radian from one position to the next, and tells neighbours apart; the last hardly
# turns at all.

# %%
D = config.D
speeds = config.rope_theta ** (-torch.arange(0, D, 2) / D)  # (D/2,) radians per position
angles = torch.arange(T)[:, None] * speeds  # (T, D/2)


def turned(x: Tensor) -> Tensor:
    """x (T, D), each row turned by the angles of its position."""
    turns = torch.polar(torch.ones_like(angles), angles)
    y = torch.complex(x[:, : D // 2], x[:, D // 2 :]) * turns
    return torch.cat([y.real, y.imag], dim=-1)


q, k = torch.randn(2, D)
scores = turned(q.expand(T, D)) @ turned(k.expand(T, D)).T  # (T, T)
for distance in range(T):  # equal along each diagonal: only the distance matters
    assert scores.diagonal(distance).std(unbiased=False) < 1e-4

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
picture = left.imshow(angles.cos().T.numpy(), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
left.set(xlabel="position", ylabel="pair", title="cosine of the angles")
figure.colorbar(picture, ax=left, label="cosine")
picture = right.imshow(scores.numpy(), cmap="RdBu")
right.set(xlabel="position of the key", ylabel="position of the query", title="one q, one k")
figure.colorbar(picture, ax=right, label="score")
plt.show()

# %% [markdown]
# ## Attention: each head looks somewhere
#
# A head compares the query of each position with the keys of this and earlier positions, and takes
# the mean of their values, weighted by the softmax of the scores. Here two query heads share the
# keys and values of one key/value head (grouped queries).


# %%
def attend(h: Tensor, attention: gptsmith.MultiHeadAttention) -> tuple[Tensor, Tensor]:
    """What attention adds to the residual stream (T, C), and the weights of its heads (H, T, T)."""
    H, K = config.n_head, config.K
    w_q, w_k, w_v = attention.qkv.weight.detach().split([H * D, K * D, K * D])
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    outputs, weights = [], []
    for head in range(H):
        shared = head // (H // K)
        q = h @ w_q[head * D : (head + 1) * D].T  # (T, D)
        k = h @ w_k[shared * D : (shared + 1) * D].T
        v = h @ w_v[shared * D : (shared + 1) * D].T
        scores = turned(q) @ turned(k).T / math.sqrt(D)  # (T, T)
        weights.append(scores.masked_fill(future, -math.inf).softmax(dim=-1))
        outputs.append(weights[-1] @ v)
    return torch.cat(outputs, dim=-1) @ attention.proj.weight.detach().T, torch.stack(weights)


y, _ = attend(h, block.attention)
torch.testing.assert_close(y, block.attention(h[None])[0].detach(), rtol=1e-5, atol=1e-5)

# %% [markdown]
# ## SwiGLU: a gated layer
#
# Each position by itself: F products "up" are multiplied by swish(gate), F other products, and
# "down" takes them back to C channels.


# %%
def feed_forward(h: Tensor, mlp: gptsmith.SwiGLU) -> Tensor:
    w_gate, w_up = mlp.gate_up.weight.detach().chunk(2)  # (F, C) each
    gate = h @ w_gate.T
    return (gate * torch.sigmoid(gate) * (h @ w_up.T)) @ mlp.down.weight.detach().T


y = feed_forward(h, block.mlp)
torch.testing.assert_close(y, block.mlp(h).detach(), rtol=1e-5, atol=1e-5)

# %% [markdown]
# ## All of it
#
# Every block adds to the stream what its attention and then its feed-forward layer make of it. At
# the end, a last norm, and the product with the embedding once more: the logit of an id is how
# well the stream agrees with the vector of that id.

# %%
x = E[ids]
streams, heads = [x], []
for block in model.blocks:
    y, weights = attend(rms_norm(x, block.attention_norm.weight), block.attention)
    x = x + y
    x = x + feed_forward(rms_norm(x, block.mlp_norm.weight), block.mlp)
    streams.append(x)
    heads.append(weights.detach())
logits = rms_norm(x, model.final_norm.weight) @ E.T  # (T, V)

with torch.no_grad():
    torch.testing.assert_close(logits, model(ids[None])[0], rtol=1e-5, atol=1e-5)
print(f"{TEXT} -> {tokenizer.decode([int(logits[-1].argmax())])}")
assert tokenizer.decode([int(logits[-1].argmax())]) == "e"

# %% [markdown]
# ## The same in transformers
#
# `gptsmith export` writes a folder that transformers opens with its own class, here Llama's. The
# same weights, another program, the same logits.

# %%
from transformers import AutoModelForCausalLM  # noqa: E402 - it takes seconds, and is needed here

with tempfile.TemporaryDirectory() as folder:
    exported = Path(folder) / "exported"
    hf.export(ExportableModel("copy", config, model.state_dict, tokenizer), exported)
    stock = AutoModelForCausalLM.from_pretrained(exported)
with torch.no_grad():
    theirs = stock(ids[None]).logits[0]
print(type(stock).__name__, f"differs by at most {(theirs - logits).abs().max():.1e}")
torch.testing.assert_close(logits, theirs, rtol=1e-5, atol=1e-5)

# %% [markdown]
# ## What the heads look at
#
# A row is the position that looks, a column the position that is looked at. A head that looks a
# fixed number of positions back shows a line of squares parallel to the diagonal. RoPE makes that
# easy to learn, since one angle holds for all positions.

# %%
figure, axes = plt.subplots(2, 4, figsize=(11, 6), layout="constrained")
for layer, row in enumerate(axes):
    for head, cell in enumerate(row):
        picture = cell.imshow(heads[layer][head].numpy(), cmap="Blues", vmin=0, vmax=1)
        cell.set(title=f"block {layer}, head {head}")
        cell.set_xticks(range(T), list(TEXT), family="monospace")
        cell.set_yticks(range(T), list(TEXT), family="monospace")
figure.colorbar(picture, ax=axes, shrink=0.5, label="attention weight")
figure.supxlabel("key: what is looked at")
figure.supylabel("query: what looks")
plt.show()

# %% [markdown]
# The letter to write stands seven positions back. There are two ways to get it: a head looks seven
# back; or a head of block 1 looks at a position into which block 0 has already copied the letter,
# for example six back and then one. Here are the weights of all heads by distance, in the mean
# over the second word.

# %%
distances = torch.stack(
    [
        torch.stack([heads[layer][:, N + i, i : i + N + 1].flip(-1) for i in range(N)]).mean(dim=0)
        for layer in range(config.n_layer)
    ]
)  # (n_layer, H, N + 1): entry d is the weight of what is d positions back
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
picture = axes.imshow(distances.flatten(0, 1).numpy(), cmap="Blues", vmin=0, vmax=1)
axes.set_yticks(range(8), [f"block {n // 4}, head {n % 4}" for n in range(8)])
axes.set(xlabel="positions back", title="mean weight from the second word")
figure.colorbar(picture, ax=axes, shrink=0.8, label="attention weight")
plt.show()
first, second = distances.amax(dim=1)  # (N + 1,): the best head of each block
direct = float(torch.maximum(first[N], second[N]))
in_two_steps = float((second * first.flip(0)).max())  # d back in block 1, then N - d in block 0
print(f"in one step {direct:.2f}, in two {in_two_steps:.2f}")
assert max(direct, in_two_steps) > 0.3

# %% [markdown]
# A picture of attention is a guess at what a head is for. Evidence is what the model loses without
# it: take out one head after the other, which is to set its columns of the output projection to 0,
# and then all heads of a block. A head that others can replace costs little, however clear its
# picture.

# %%
batch = copies(10_000)


def loss_without(layer: int, first: int, heads: int) -> float:
    damaged = copy.deepcopy(model)
    damaged.blocks[layer].attention.proj.weight.data[:, first * D : (first + heads) * D] = 0
    with torch.no_grad():
        return float(next_token_loss(damaged, batch) / batch.count)


H = config.n_head
without = {
    f"block {layer}\nhead {head}": loss_without(layer, head, 1)
    for layer in range(config.n_layer)
    for head in range(H)
}
for layer in range(config.n_layer):
    without[f"block {layer}\nall"] = loss_without(layer, 0, H)
figure, axes = plt.subplots(figsize=(8, 2.8), layout="constrained")
axes.bar(without.keys(), without.values())
axes.axhline(math.log(len(LETTERS)), color="grey", linestyle=":", label="guessing one of 26")
axes.set(ylabel="loss, nats per letter", title="without these heads")
axes.legend()
plt.show()
whole = loss_without(0, 0, 0)
print(f"with all heads {whole:.4f}")
assert max(without.values()) > whole + 1

# %% [markdown]
# ## What the stream knows after each block
#
# The last norm and the product with the embedding can be applied to the stream anywhere: the
# probability that the model would give to the right next letter if it ended there.

# %%
lens = torch.stack(
    [
        (rms_norm(stream, model.final_norm.weight) @ E.T).softmax(dim=-1).detach()
        for stream in streams
    ]
)  # (n_layer + 1, T, V)
right_ids = torch.tensor(tokenizer.encode(TEXT[1:] + "e"))
right = lens[:, torch.arange(T), right_ids]  # (n_layer + 1, T)

figure, axes = plt.subplots(figsize=(7, 2), layout="constrained")
picture = axes.imshow(right.numpy(), cmap="Greens", vmin=0, vmax=1, aspect="auto")
axes.set(title="probability of the next letter of the text", xlabel="letter that was read")
axes.set_xticks(range(T), list(TEXT), family="monospace")
axes.set_yticks(range(3), ["embedding", "after block 0", "after block 1"])
figure.colorbar(picture, ax=axes, label="probability")
plt.show()
assert right[-1, N:].min() > 0.5  # the copy is certain
assert right[1, N:].max() < right[-1, N:].min()  # and found by the last block

# %% [markdown]
# ## Where the parameters are
#
# In a small model most parameters are in the embedding, in a large one the feed-forward layers
# have the largest share. Norms have so few that they are invisible here. `flops.parameters` counts
# by formula.

# %%
GROUPS = {
    "embedding": "embedding.", "attention": ".attention.", "feed-forward": ".mlp.", "norms": "norm",
}  # fmt: skip
shares, labels = [], []
for preset in ("nano", "tiny", "fast", "course", "gpt2", "smollm2-135m", "qwen3-0.6b"):
    shape = gptsmith.ModelConfig.preset(preset)
    sizes = {name: math.prod(s) for name, s in state_dict.shapes(shape).items()}
    counts = dict.fromkeys(GROUPS, 0)
    for name, size in sizes.items():
        counts[next(group for group, part in GROUPS.items() if part in name)] += size
    total = sum(counts.values())
    assert total == flops.parameters(shape)
    shares.append([count / total for count in counts.values()])
    labels.append(f"{preset} ({total / 1e6:,.1f} M)")

figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
table = torch.tensor(shares)
begin = table.cumsum(dim=1) - table
for n, group in enumerate(GROUPS):
    axes.barh(labels, table[:, n].tolist(), left=begin[:, n].tolist(), label=group)
axes.set(xlabel="share of the parameters", title="where the parameters are")
axes.invert_yaxis()
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# ## Exercises
#
# 1. Tell the model that all letters are at position 0: `model(ids[None], positions=torch.zeros(T,
#    dtype=torch.long))`. What does it write instead, and why can it not know better?
# 2. Train with `n_layer=1`. Which of the two ways is left, and what does the picture of distances
#    look like?
# 3. Draw `N` anew in every batch, from 4 to 10 (with a longer context). Is the loss as low after
#    200 steps? No fixed distance helps now: the model has to find what followed the same letter
#    before, which takes two blocks and more steps (induction heads, Olsson et al. 2022).
