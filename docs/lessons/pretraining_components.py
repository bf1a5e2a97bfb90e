# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A GPT, part by part
#
# From text to a model that continues it: each part of gptsmith by itself, in the order in which
# the [course](../../course/README.md) builds them. Half a minute on a laptop; nothing is
# downloaded. Other lessons go deeper into [tokens](tokens.py), the [model](model.py),
# [masks](masks.py), [training](training.py) and [decoding](decoding.py).
#
# B batch, T time, C channels, H heads, V vocabulary.

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import gptsmith
from gptsmith.batch import Batch
from gptsmith.model.rope import rotary_table, rotate
from gptsmith.train.loss import next_token_loss

torch.manual_seed(0)
TEXT = "".join(f"{a} plus {b} is {a + b}. " for a in range(30) for b in range(30))

# %% [markdown]
# ## Tokens
#
# Byte-level BPE starts from single bytes, and again and again joins the pair of neighbours that
# occurs most. Words that the text has often become one token.

# %%
tokenizer = gptsmith.Tokenizer.train_bpe([TEXT], vocab_size=300)
ids = tokenizer.encode("12 plus 7 is 19.")
print(" | ".join(tokenizer.decode([id]) for id in ids))
assert tokenizer.decode(ids) == "12 plus 7 is 19."

# %% [markdown]
# ## Embedding
#
# A vector for each id. Positions have no vectors here: the same token is the same vector anywhere.

# %%
config = gptsmith.ModelConfig(
    n_layer=2, n_head=2, n_embd=64, context_length=48, vocab_size=tokenizer.vocab_size
)
vectors = gptsmith.TokenEmbedding(config)(torch.tensor([[5, 9, 5]]))
print(vectors.shape)  # (B, T, C)
assert torch.equal(vectors[0, 0], vectors[0, 2])

# %% [markdown]
# ## Rotary positions
#
# Queries and keys are rotated by angles that grow with the position. The product of a query and a
# key then depends on how far they are apart, and not on where they are.

# %%
D = config.D  # the size of a head
q, k = torch.randn(2, D)


def score(query_at: int, key_at: int) -> float:
    cos, sin = rotary_table(config, torch.tensor([query_at, key_at]))  # (2, D/2)
    turned_q, turned_k = rotate(torch.stack([q, k]), cos, sin)
    return float(turned_q @ turned_k)


print([round(score(at + 3, at), 4) for at in (0, 1, 10, 40)], "3 apart")
print([round(score(at + 9, at), 4) for at in (0, 1, 10, 38)], "9 apart")
assert math.isclose(score(3, 0), score(43, 40), abs_tol=1e-4)

# %% [markdown]
# ## Attention
#
# Which inputs does an output depend on? Its gradient tells. A row of the picture is an output, a
# column an input; dark is no gradient. All is dark above the diagonal: no position sees a later
# one.

# %%
attention = gptsmith.MultiHeadAttention(config)
x = torch.randn(1, 12, config.n_embd, requires_grad=True)
y = attention(x)
rows = [
    torch.autograd.grad(y[0, t].norm(), x, retain_graph=True)[0][0].norm(dim=-1) for t in range(12)
]
depends = torch.stack(rows)  # (T outputs, T inputs)
assert torch.equal(depends > 0, torch.ones(12, 12).tril() > 0)

figure, axes = plt.subplots(figsize=(3, 3))
axes.imshow((depends / depends.amax(dim=1, keepdim=True)).numpy())
axes.set(
    xlabel="input",
    ylabel="output",
    title="what an output depends on\n(rows by their largest)",
    xticks=range(0, 12, 2),
    yticks=range(0, 12, 2),
)

# %% [markdown]
# ## Feed-forward layers
#
# SwiGLU: one half of the hidden layer is multiplied by swish of the other half, the gate. Where
# the gate is far below zero, nothing passes.

# %%
gate = torch.linspace(-6, 6, 200)
figure, axes = plt.subplots(figsize=(3, 2))
axes.plot(gate.numpy(), F.silu(gate).numpy())
axes.set(xlabel="gate", ylabel="factor", title="swish(x) = x * sigmoid(x)")
print(gptsmith.SwiGLU(config)(x).shape)

# %% [markdown]
# ## A block, and the model
#
# A block adds attention and feed-forward layers to its input. The model is an embedding, blocks, a
# norm and a head. Untrained, it guesses: its loss is about ln V.

# %%
block = gptsmith.TransformerBlock(config)
print(block(x).shape)
model = gptsmith.GPTModel(config)
tokens = torch.tensor(tokenizer.encode(TEXT))
logits = model(tokens[None, :40])  # (B, T, V)
guess = F.cross_entropy(logits[0], tokens[1:41]).item()
print(f"loss {guess:.2f}, ln V {math.log(config.vocab_size):.2f}")
assert abs(guess - math.log(config.vocab_size)) < 0.5

# %% [markdown]
# ## Windows, and a loader
#
# The text in windows of T tokens; the target of a token is the next one.

# %%
windows = gptsmith.Windows([tokens.numpy().astype("uint16")], T=48)
loader = DataLoader(windows, batch_size=16, shuffle=True, drop_last=True)
inputs, targets = next(iter(loader))
print(windows, inputs.shape)
assert torch.equal(inputs[:, 1:], targets[:, :-1])

# %% [markdown]
# ## Training
#
# A loss of gptsmith is a sum, and the batch knows what to divide it by: where some targets are
# masked, the mean over a step is not the mean of its batches' means.

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
losses: list[float] = []
while len(losses) < 150:
    for inputs, targets in loader:
        batch = Batch(inputs, targets)
        loss = next_token_loss(model, batch) / batch.count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())

figure, axes = plt.subplots(figsize=(4, 2.5))
axes.plot(losses)
axes.set(xlabel="step", ylabel="loss, nats per token")
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert losses[-1] < losses[0] / 3

# %% [markdown]
# ## Generation
#
# The engine feeds each new token back, and keeps keys and values so that nothing is read twice.

# %%
greedy = gptsmith.SamplingConfig(temperature=0, max_new_tokens=20)
[answer] = gptsmith.Engine(model.eval(), tokenizer).generate("3 plus 4 is", greedy)
print("3 plus 4 is" + answer.text)
assert " plus " in answer.text

# %% [markdown]
# ## Exercises
#
# 1. Print `score(at, at + 3)` beside `score(at + 3, at)`: a key that is three positions ahead
#    instead of behind. Is it the same number? Does it depend on where the two are?
# 2. Ask for `31 plus 4 is`, a sum that is not in the text. Is the reply right, and does it at
#    least have the form of one?
# 3. Train the tokenizer with `vocab_size=257`. Why is the final loss per token lower, and the
#    model not better?
