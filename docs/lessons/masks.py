# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Attention masks
#
# Which tokens may a token read? A mask answers that for every pair of positions. This lesson draws
# masks, combines them, measures what a model can know under each of them, and counts what each
# costs. It takes a few seconds and downloads nothing.
#
# B batch, T time, H heads, L layers, V vocabulary; q is the position of a query, the token that
# reads, and k that of a key, a token that is read.

# %%
import math
import textwrap
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import gptsmith
from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.model.masks import Mask, bidirectional, causal, documents, prefix, sliding_window
from gptsmith.model.target_leakage import first_target
from gptsmith.train.loss import next_token_loss

T = 12
COLOURS = ("#eceff4", "#3b6ea5")  # what a token may not read, and what it may


def visible(mask: Mask, T: int = T, H: int = 1) -> torch.Tensor:
    """Which key each query may read, (H, T, T)."""
    at = torch.arange(T)
    return mask.dense(1, H, at, at).expand(1, H, T, T)[0]


def draw(
    panels: Sequence[tuple[str, torch.Tensor]],
    targets: bool = False,
    names: tuple[str, str] = ("may not read", "may read"),
    axes: tuple[str, str] = ("key", "query"),
) -> None:
    """Pictures of booleans (T, T). targets: mark the token that each position is to predict."""
    n = len(panels)
    figure, row = plt.subplots(1, n, figsize=(2.7 * n, 3.4), squeeze=False, layout="constrained")
    for axis, (title, seen) in zip(row[0], panels, strict=True):
        size = len(seen)
        axis.imshow(seen.numpy(), cmap=ListedColormap(COLOURS), vmin=0, vmax=1)
        axis.set_title(textwrap.fill(title, 32), fontsize=9)
        axis.set(xlabel=axes[0], ylabel=axes[1], xticks=range(0, size, 2), yticks=range(0, size, 2))
        axis.hlines([i + 0.5 for i in range(size)], -0.5, size - 0.5, color="white", linewidth=0.8)
        axis.vlines([i + 0.5 for i in range(size)], -0.5, size - 0.5, color="white", linewidth=0.8)
        if targets:
            axis.plot(range(1, size), range(size - 1), "o", color="#d1495b", markersize=4)
    handles = [Patch(color=c, label=name) for c, name in zip(COLOURS, names, strict=True)]
    if targets:
        red = dict(marker="o", color="#d1495b", linestyle="")
        handles.append(plt.Line2D([], [], **red, label="the token to be predicted"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)


# %% [markdown]
# ## Four masks
#
# A row of each picture is a query, a column a key. Under the causal mask, a token reads itself and
# what precedes it. A sliding window of 4 leaves it the newest four of these. Under a prefix mask,
# every token reads the first four, and the rest is causal: a prompt that is read in both
# directions. Without any restriction, every token reads every other one, as in BERT.

# %%
four = [causal(), causal() & sliding_window(4), prefix(4), bidirectional()]
draw([(mask.expression, visible(mask)[0]) for mask in four])
assert torch.equal(visible(causal())[0], torch.ones(T, T).tril().bool())
assert visible(causal() & sliding_window(4)).sum(dim=-1).max() == 4
assert visible(prefix(4))[0, :, :4].all()
assert visible(bidirectional()).all()

# %% [markdown]
# ## Masks are an algebra
#
# `&` keeps what both masks allow, `|` what one of them allows, and `~` what a mask forbids. A
# token that reads the newest three, or all that is older, reads what the causal mask allows.

# %%
near = causal() & sliding_window(3)
far = causal() & ~sliding_window(3)
draw([(mask.expression, visible(mask)[0]) for mask in (near, far, near | far)])
assert torch.equal(visible(near | far), visible(causal()))
assert not visible(near & far).any()
assert torch.equal(visible(~(near | far)), visible(~near & ~far))  # De Morgan

# %% [markdown]
# ## Masks of your own
#
# A mask is a function of four integers: the row of the batch, the head, the query and the key. Any
# condition will do. Here are every fourth token (Sparse Transformers), the first two tokens kept
# visible beside a window (the attention sinks of StreamingLLM), and sentences: a token reads its
# own sentence, and of earlier ones only the full stop, as a summary.


# %%
def strided(b, h, q, k):
    return (q - k) % 4 == 0


def first_two(b, h, q, k):
    return k < 2


is_stop = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1]).bool()  # (T,)
sentence = is_stop.cumsum(dim=0) - is_stop.int()  # (T,): its number


def stops_as_summaries(b, h, q, k):
    return (sentence[q] == sentence[k]) | is_stop[k]


own = [
    causal() & (sliding_window(2) | Mask(strided)),
    causal() & (sliding_window(3) | Mask(first_two)),
    causal() & Mask(stops_as_summaries),
]
draw([(mask.expression, visible(mask)[0]) for mask in own])
assert visible(own[0])[0, 11].nonzero().flatten().tolist() == [3, 7, 10, 11]
assert visible(own[1])[0, 11].nonzero().flatten().tolist() == [0, 1, 9, 10, 11]
assert visible(own[2])[0, 10].nonzero().flatten().tolist() == [3, 8, 9, 10]

# %% [markdown]
# Heads may differ. With windows of 2, 4, 8 and 16 tokens, each head looks at another scale.


# %%
def doubling(b, h, q, k):
    return q - k < 2 ** (h + 1)


heads = visible(causal() & Mask(doubling), H=4)  # (H, T, T)
draw([(f"head {h}", heads[h]) for h in range(4)])
assert heads[:, 11].sum(dim=-1).tolist() == [2, 4, 8, 12]

# %% [markdown]
# The function is called with whole tensors of indices on the CPU, and traced into a kernel by
# FlexAttention on a GPU. It must therefore be elementwise: comparisons and tables, no `if`.
# Anything else is rejected when the mask is made.


# %%
def rejected(make: Callable[[], object]) -> str:
    """The message with which something is rejected."""
    try:
        make()
    except ValueError as error:
        return textwrap.fill(str(error), 100)
    raise AssertionError("it was accepted")


def with_if(b, h, q, k):
    if q >= k:
        return q - k < 4
    return False


print(rejected(lambda: Mask(with_if)))

# %% [markdown]
# ## What a model knows: perturbation
#
# A mask says what one layer reads directly. What does the model know in the end? Replace a single
# token, and see which outputs change. The model has random weights, made large and computed in
# float64, so that a small influence is not mistaken for a rounding error.


# %%
def changed(mask: Mask, n_layer: int, T: int = T) -> torch.Tensor:
    """Whether the logits at position i (rows) change with the token at position j, (T, T)."""
    torch.manual_seed(1)
    config = gptsmith.ModelConfig(
        n_layer=n_layer, n_head=1, n_embd=16, context_length=T, vocab_size=20
    )
    model = gptsmith.GPTModel(config).double().eval()
    ids = torch.randint(20, (T,))
    others = (ids + torch.eye(T).long()) % 20  # (T, T): in row j, token j is replaced
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 10
        before, after = (model(x, mask=mask) for x in (ids.repeat(T, 1), others))  # (T, T, V)
    return ((after - before).abs().amax(dim=-1) > 1e-9).T


def reach(mask: Mask, n_layer: int, T: int = T) -> torch.Tensor:
    """The same by theory: what n_layer hops of reading, or staying in place, lead to."""
    hop = visible(mask, T)[0].double() + torch.eye(T).double()
    return torch.linalg.matrix_power(hop, n_layer) > 0


window = causal() & sliding_window(4)
outcome = dict(names=("unchanged", "changes"), axes=("token replaced", "output"))
draw([(f"window 4, L = {L}", changed(window, L)) for L in (1, 2, 3)], **outcome)
for L in (1, 2, 3):
    assert torch.equal(changed(window, L), reach(window, L))
    known = int(changed(window, L)[-1].sum())
    print(f"L = {L}: the last output depends on {known} tokens")
    assert known == 1 + L * (4 - 1)

# %% [markdown]
# Layers pass on what they have read, so L layers with a window of W know 1 + L(W - 1) tokens. A
# narrow window makes attention cheap, and depth still gives the model a wide view.
#
# ## What must not leak
#
# A position is trained to predict the next token. If it can read that token, there is nothing left
# to predict. Red dots mark it: no dot may lie on a coloured square. Let every token read one token
# ahead, and train on random tokens, about which nothing can be known.


# %%
def one_ahead(b, h, q, k):
    return k <= q + 1


def train(mask: Mask, steps: int = 100) -> list[float]:
    """Losses of a small model on random tokens, 16 different ones."""
    torch.manual_seed(0)
    config = gptsmith.ModelConfig(
        n_layer=1, n_head=2, n_embd=32, context_length=24, vocab_size=16, position="learned"
    )
    model = gptsmith.GPTModel(config, mask=mask)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        ids = torch.randint(16, (16, 25))
        batch = Batch(ids[:, :-1], ids[:, 1:])
        loss = next_token_loss(model, batch) / batch.count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


ahead = Mask(one_ahead)
draw([(mask.expression, visible(mask)[0]) for mask in (causal(), ahead)], targets=True)
honest, cheating = train(causal()), train(ahead)

figure, axis = plt.subplots(figsize=(5, 2.8), layout="constrained")
axis.plot(honest, label="causal()")
axis.plot(cheating, label="one_ahead")
axis.axhline(math.log(16), color="grey", linestyle=":", label="ln 16: a blind guess")
axis.set(xlabel="step", ylabel="loss, nats per token", ylim=0, title="random tokens")
axis.legend()
print(f"causal {honest[-1]:.2f}, one_ahead {cheating[-1]:.2f}, ln 16 = {math.log(16):.2f}")
assert honest[-1] > math.log(16) - 0.1
assert cheating[-1] < 0.5

# %% [markdown]
# The second model has learned to copy the answer; only the last token of a row has nothing to
# copy, which leaves ln 16 / 24 = 0.12. In generation there is never a next token, and such a model
# writes nonsense, however low its loss was. Training therefore rejects the mask before the first
# step.

# %%
assert first_target(causal(), T, 1, n_layer=1) == 0  # every position may be trained
print(rejected(lambda: first_target(ahead, T, 1, n_layer=1)))

# %% [markdown]
# Leaks can take a detour. Under the next mask, no token reads the one that follows; every token
# reads the one after that, and the one before. With two layers, the answer arrives all the same:
# two ahead, one back. What decides is where L hops lead, not the mask itself.


# %%
def detour(b, h, q, k):
    return (k == q) | (k == q + 2) | (k == q - 1)


around = Mask(detour)
panels = [("the mask", visible(around)[0])] + [
    (f"known after {L} layer{'s' * (L > 1)}", changed(around, L)) for L in (1, 2)
]
draw(panels, targets=True, names=("not known", "read, or known"))
assert not changed(around, 1).diagonal(1).any()
assert changed(around, 2).diagonal(1).all()
assert first_target(around, T, 1, n_layer=1) == 0
print(rejected(lambda: first_target(around, T, 1, n_layer=2)))

# %% [markdown]
# A prefix looks ahead too, but only within the prompt. The first targets are known, and training
# leaves them out of the loss; from the last token of the prefix on, every target is a real
# question.

# %%
prompt = prefix(5)
panels = [("the mask", visible(prompt)[0]), ("known after 2 layers", changed(prompt, 2))]
draw(panels, targets=True, names=("not known", "read, or known"))
first = first_target(prompt, T, 1, n_layer=2)
known = changed(prompt, 2).diagonal(1)
print(f"the first {first} targets are left out")
assert first == 4
assert known[:first].all()
assert not known[first:].any()

tokens = torch.arange(100, 200).numpy()
batch = gptsmith.Windows([tokens], T, mask_targets_before=first).batch(0, 1)
print(batch.targets[0].tolist())
assert (batch.targets == IGNORE_INDEX).sum() == first

# %% [markdown]
# ## Documents in one row
#
# Short texts are packed into one row, so that little of it is padding. Each must stay alone: a
# token reads its own document, and positions count from its beginning. The logits are then those
# of the document by itself.

# %%
numbers = torch.tensor([[0] * 3 + [1] * 5 + [2] * 4])  # (1, T): the document of each token
separate = causal() & documents(numbers.expand(T, T))  # the perturbed batch has T rows
known = changed(separate, 2)
draw(
    [(separate.expression, visible(separate)[0]), ("known after 2 layers", known)],
    names=("not known", "read, or known"),
)
assert torch.equal(known, visible(separate)[0])

torch.manual_seed(0)
config = gptsmith.ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=T, vocab_size=20)
model = gptsmith.GPTModel(config).eval()
ids = torch.randint(20, (1, T))
positions = torch.cat([torch.arange(n) for n in (3, 5, 4)])[None]
with torch.no_grad():
    packed = model(ids, documents=numbers, positions=positions)
    alone = torch.cat([model(part) for part in ids.split((3, 5, 4), dim=1)], dim=1)
    mixed = model(ids)
print(f"largest difference from each document alone: packed {(packed - alone).abs().max():.1e},")
print(f"without the mask {(mixed - alone).abs().max():.1e}")
torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-6)
assert (mixed - alone).abs().max() > 1e-3

# %% [markdown]
# ## Cost
#
# Attention computes a score for every pair that is read: T(T + 1)/2 under the causal mask, and
# about W T with a window of W. Generation keeps keys and values of all tokens that can still be
# read: T, or no more than W.


# %%
def capacity(mask: Mask, T: int) -> int:
    """How many tokens the cache of a model with this context keeps."""
    config = gptsmith.ModelConfig(n_layer=1, n_head=1, n_embd=16, context_length=T, vocab_size=20)
    return gptsmith.KVCache.for_model(config, mask, batch=1).capacity


W = 128
sizes = [64, 128, 256, 512, 1024, 2048]
masks = {"causal()": causal(), f"window of {W}": causal() & sliding_window(W)}
pairs = {name: [int(visible(m, T).sum()) for T in sizes] for name, m in masks.items()}
kept = {name: [capacity(m, T) for T in sizes] for name, m in masks.items()}

figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
for name in masks:
    axes[0].loglog(sizes, pairs[name], "o-", base=2, label=name)
    axes[1].loglog(sizes, kept[name], "o-", base=2, label=name)
axes[0].set(xlabel="tokens in the text, T", ylabel="pairs", title="scores in training")
axes[1].set(xlabel="tokens in the text, T", ylabel="tokens", title="kept in generation")
for axis in axes:
    axis.legend()
assert pairs["causal()"] == [T * (T + 1) // 2 for T in sizes]
assert pairs[f"window of {W}"][-1] == W * 2048 - W * (W - 1) // 2
assert kept["causal()"] == sizes
assert kept[f"window of {W}"] == [min(T, W) for T in sizes]

# %% [markdown]
# Whether pairs that are not read cost nothing depends on the kernel. One that takes the mask as a
# table of booleans computes every score and throws away most of them. FlexAttention, on a GPU,
# skips blocks of 128 x 128 in which nothing is read. The picture shows which blocks of 1,024
# tokens it computes.

# %%
blocks = {name: mask.block_mask(1, 1, 1024, "cpu") for name, mask in masks.items()}
computed = {name: block.to_dense()[0, 0].bool() for name, block in blocks.items()}
draw(
    [(f"{name}: {int(x.sum())} of {x.numel()} blocks", x) for name, x in computed.items()],
    names=("skipped", "computed"),
    axes=("block of keys", "block of queries"),
)
assert computed["causal()"].sum() == 8 * 9 // 2
assert computed[f"window of {W}"].sum() == 8 + 7

# %% [markdown]
# A mask that looks ahead has a price of its own: a token of the prefix is read by those before it,
# so that none of them can be stored in a cache until the whole prefix is there. `lookahead` is the
# number of tokens that must be read in one pass.

# %%
for mask, together in ((causal(), 0), (prefix(5), 5), (bidirectional(), T)):
    print(mask, mask.lookahead(T, H=1))
    assert mask.lookahead(T, H=1) == together

# %% [markdown]
# ## Exercises
#
# 1. `causal() & ~prefix(3)`: which pairs remain? Say it first, then draw it. (`~` turns the whole
#    rule of `prefix` round, its causal part included.)
# 2. Change the window in "What a model knows" from 4 to 6. With how many layers does the last of
#    12 outputs depend on all tokens? Check it with `changed`.
# 3. Write a mask for chunks of four tokens: a token reads the earlier tokens of its chunk, and all
#    of the chunk before. Draw it with `targets=True`. Does `first_target` accept it, and would it
#    if a token could read the whole of its own chunk?
