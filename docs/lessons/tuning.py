# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # What tuning changes
#
# A chat model is tuned on conversations, of which it learns some tokens and only reads the others.
# This lesson shows which, in colour and by their gradients; packs conversations without mixing
# them; tunes a tiny model until it answers; and then teaches it something else through two thin
# matrices (LoRA), which are drawn. It takes about ten seconds and downloads nothing.
#
# B batch, T time, C channels, V vocabulary, r rank.

# %%
import copy
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Patch

import gptsmith
from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate, Message
from gptsmith.console import Console
from gptsmith.data.chat import ChatCounts, encode_conversations
from gptsmith.data.conversations import Conversation
from gptsmith.data.examples import Examples
from gptsmith.data.packing import PackedRows, PaddedRows
from gptsmith.inspect.chat import marked
from gptsmith.model import lora
from gptsmith.model.config import LoraConfig
from gptsmith.train.loss import next_token_loss

torch.manual_seed(0)
tokenizer = gptsmith.Tokenizer.byte().add_special_tokens(CHAT_TOKENS)
template = ChatTemplate(TEMPLATE, tokenizer)

# %% [markdown]
# ## Which tokens are learned
#
# A template writes each message as `<|role|>`, its text and `<|end|>`. Targets are the assistant's
# messages, from `<|assistant|>` to `<|end|>`, which teaches the model to stop: green below,
# special tokens in magenta. All the rest is grey, context that the model reads and is not taught
# to write. `gptsmith inspect` prints the same.


# %%
class Html(str):
    """Text that a notebook shows as HTML."""

    def _repr_html_(self) -> str:
        return str(self)


def coloured(ids: Sequence[int], is_target: Sequence[bool]) -> Html:
    """The text of ids, targets in colour."""
    console = Console(record=True, file=io.StringIO(), width=90, force_jupyter=False)
    console.print(marked(np.array(ids), np.array(is_target), tokenizer, plain=False))
    style = "background:#fff;color:#000;padding:0.7em;white-space:pre-wrap;font-size:0.85em"
    page = f'<pre style="{style}">{{code}}</pre>'
    return Html(console.export_html(inline_styles=True, code_format=page))


def conversation(word: str, answer: str) -> list[Message]:
    return [
        {"role": "user", "content": f"Say {word}."},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": answer},
    ]


encoded = template.encode(conversation("ant", "ant"))
coloured(encoded.ids, encoded.is_target)

# %%
learned = [id for id, target in zip(encoded.ids, encoded.is_target, strict=True) if target]
print(tokenizer.decode(learned))
print(f"{len(learned)} of {len(encoded.ids)} tokens are targets")
assert tokenizer.decode(learned) == 2 * "<|assistant|>ant<|end|>"

# %% [markdown]
# ## What a masked target does, and does not
#
# In a batch, the target of position t is token t + 1, and -100 where it is not to be learned. Two
# gradients of the same loss tell the difference. At the output of a masked position it is zero:
# nothing is said about what should follow there. At the input of the user's tokens it is not: the
# answer depends on them, and the model learns to read them. After the last target, and in the
# padding, both are zero.


# %%
def examples_of(conversations: Iterable[list[Message]], T: int) -> Examples:
    found = (Conversation(chat, f"chat {i}") for i, chat in enumerate(conversations))
    return Examples(encode_conversations(found, template, ChatCounts(T)))


T = 64
pad_id = tokenizer.special_tokens["<|pad|>"]
config = gptsmith.ModelConfig(
    n_layer=2, n_head=2, n_embd=64, context_length=T, vocab_size=tokenizer.vocab_size
)
model = gptsmith.GPTModel(config)
batch = PaddedRows(examples_of([conversation("ant", "ant")], T), T, 0, pad_id).batch(0, 1)

kept: dict[str, torch.Tensor] = {}
hooks = [
    model.embedding.register_forward_hook(lambda module, given, x: kept.update(input=x)),
    model.final_norm.register_forward_hook(lambda module, given, x: kept.update(output=x)),
]
loss = next_token_loss(model, batch)
for hook in hooks:
    hook.remove()
at_input, at_output = torch.autograd.grad(loss, (kept["input"], kept["output"]))  # (1, T, C)
is_learned = batch.targets[0] != IGNORE_INDEX  # (T,)
last = int(is_learned.nonzero()[-1])
shown = last + 3
names = [tokenizer.decode([id]).replace(" ", "␣") for id in batch.inputs[0, :shown].tolist()]
colours = ["#2a9d8f" if target else "#b0b7c3" for target in is_learned[:shown]]
figure, axes = plt.subplots(2, 1, figsize=(8, 4), sharex=True, layout="constrained")
for axis, (name, gradient) in zip(
    axes, (("at the output", at_output), ("at the input", at_input)), strict=True
):
    axis.bar(range(shown), gradient[0, :shown].norm(dim=-1).tolist(), color=colours)
    axis.set(ylabel="norm of gradient", title=name)
axes[1].set_xticks(range(shown), names, rotation=90, fontsize=8)
axes[1].set_xlabel("token that is read (its target is the next one)")
axes[0].legend(
    handles=[Patch(color="#2a9d8f", label="has a target"), Patch(color="#b0b7c3", label="masked")],
    fontsize=8,
)
assert not at_output[0, ~is_learned].any()
assert at_output[0, is_learned].any(dim=-1).all()
assert at_input[0, : last + 1].any(dim=-1).all()
assert not at_input[0, last + 1 :].any()

# %% [markdown]
# ## Packed rows
#
# Conversations are short. One in a row leaves most of it to padding; packed rows hold several,
# each of which attends to itself alone and counts its positions from 0. The sum of the losses is
# the same, for less work. Without the numbers of the documents, each conversation would read those
# before it, and the loss is another one.

# %%
WORDS = [
    "ant", "bee", "crow", "donkey", "elephant", "fox",
    "goldfinch", "hen", "ibis", "jackal", "kingfisher", "lynx",
]  # fmt: skip
T_packed = 128
chats = [conversation(word, word) for word in WORDS]
small = gptsmith.GPTModel(config.model_copy(update={"context_length": T_packed}))
padded = PaddedRows(examples_of(chats, T_packed), T_packed, 0, pad_id)
packed = PackedRows(examples_of(chats, T_packed), T_packed, 0, pad_id)
one_each, several = padded.batch(0, len(chats)), packed.batch(0, packed.per_epoch)
mixed = replace(several, documents=None, positions=None)
with torch.no_grad():
    sums = {
        name: (next_token_loss(small, x).item(), x)
        for name, x in {"padded": one_each, "packed": several, "mixed": mixed}.items()
    }
for name, (total, x) in sums.items():
    print(f"{name}: loss {total:.4f} over {x.count} targets, {x.inputs.numel():,} positions")

picture = np.full((*several.inputs.shape, 3), 0.93)  # (B, T, 3): padding is grey
assert several.documents is not None
for b, t in np.ndindex(*several.inputs.shape):
    if several.inputs[b, t] != pad_id:
        number = int(several.documents[b, t])
        is_context = several.targets[b, t] == IGNORE_INDEX
        picture[b, t] = plt.get_cmap("tab20")(2 * number + int(is_context))[:3]
figure, axis = plt.subplots(figsize=(8, 1.8), layout="constrained")
axis.imshow(picture, aspect="auto", interpolation="nearest")
title = "a colour for each conversation; dark: targets"
axis.set(xlabel="position", ylabel="row", title=title, yticks=range(len(picture)))
assert abs(sums["padded"][0] - sums["packed"][0]) < 1e-3
assert abs(sums["padded"][0] - sums["mixed"][0]) > 1e-2
assert one_each.count == several.count
assert several.inputs.numel() < one_each.inputs.numel()

# %% [markdown]
# ## A model that answers
#
# The model begins with random weights. All of them are trained on twelve conversations of two
# turns. For the second answer it must look back: "Again." says nothing about the word.


# %%
def tune(model: gptsmith.GPTModel, rows: PackedRows, steps: int, rate: float) -> list[float]:
    """Train what requires gradients; the loss of each step in nats per target."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    losses = []
    for step in range(steps):
        batch: Batch = rows.batch(step * rows.per_epoch, rows.per_epoch)
        loss = next_token_loss(model, batch) / batch.count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def answers(model: gptsmith.GPTModel) -> list[tuple[str, str]]:
    """What the model says to both turns of each conversation; it hears its own first answer."""
    chat = gptsmith.Chat(model, tokenizer, template)
    greedy = gptsmith.SamplingConfig(temperature=0, max_new_tokens=16)
    found = []
    for word in WORDS:
        messages = conversation(word, "")[:1]
        said = chat.reply(messages, greedy).text
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Again."}]
        found.append((said, chat.reply(messages, greedy).text))
    return found


def score(model: gptsmith.GPTModel, spelled: Callable[[str], str]) -> int:
    """Of all answers, how many are right."""
    pairs = zip(answers(model), WORDS, strict=True)
    return sum(said == spelled(word) for both, word in pairs for said in both)


model = small
before = answers(model)
losses = tune(model, packed, steps=75, rate=3e-3)
print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f}")
print(f"before: {before[0]}\nafter:  {answers(model)[:3]} ...")
right = score(model, str)
print(f"{right} of {2 * len(WORDS)} answers are right")
assert right >= 2 * len(WORDS) - 2

# %% [markdown]
# ## LoRA
#
# Now the same model is to spell each word backwards, and none of its weights may change. Beside
# each weight matrix W, LoRA adds the product of two thin ones: B (out, r) times A (r, in), scaled
# by alpha / r. B begins at zero, so the model first answers exactly as before. Only A and B are
# trained.

# %%
base = copy.deepcopy(model)
ids = several.inputs
with torch.no_grad():
    of_base = base(ids)
RANK = 4
lora.attach(model, LoraConfig(rank=RANK, alpha=2 * RANK))
print(lora.trainable_summary(model))
with torch.no_grad():
    assert torch.equal(model(ids), of_base)


def backwards(word: str) -> str:
    return word[::-1]


chats = [conversation(word, backwards(word)) for word in WORDS]
rows = PackedRows(examples_of(chats, T_packed), T_packed, 0, pad_id)
lora_losses = tune(model, rows, steps=60, rate=1e-2)
print(f"loss {lora_losses[0]:.2f} -> {lora_losses[-1]:.3f}")
print(answers(model)[:3], "...")
assert score(model, backwards) >= 2 * len(WORDS) - 2
assert score(base, str) == right

frozen = lora.merged_state_dict(model, adapters=False)
assert all(torch.equal(frozen[name], p) for name, p in base.named_parameters())

# %% [markdown]
# The update of a matrix, drawn. B A is as large as W, but all of its rows are combinations of the
# r rows of A. Singular values count the independent directions of a matrix: all of W's are well
# above zero, and only r of the update's; the rest is rounding error.

# %%
layer = model.blocks[0].attention.proj
assert isinstance(layer, lora.LoraLinear)
W, A, B = (x.detach() for x in (layer.base.weight, layer.lora_A, layer.lora_B))
update = layer.update().detach()
torch.testing.assert_close(update, layer.scale * B @ A)

figure, axes = plt.subplots(
    1, 4, figsize=(10, 3), width_ratios=[8, 1.2, 8, 8], layout="constrained"
)
for axis, (name, matrix) in zip(
    axes, (("W", W), ("B", B), ("A", A), ("B A, scaled", update)), strict=True
):
    limit = matrix.abs().max().item()
    axis.imshow(matrix.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set(title=f"{name} {tuple(matrix.shape)}", xlabel="in" if name != "B" else "r")
    axis.tick_params(labelsize=7)
axes[0].set_ylabel("out")
axes[1].set_xticks([0, RANK - 1])
axes[2].set_yticks([0, RANK - 1])
figure.suptitle("output projection of attention, first block: blue positive, red negative", size=10)

singular = {
    "W": torch.linalg.svdvals(W),
    f"update, r = {RANK}": torch.linalg.svdvals(update),
}
figure, axis = plt.subplots(figsize=(5, 2.8), layout="constrained")
for name, values in singular.items():
    axis.semilogy(range(1, len(values) + 1), values.clamp(min=1e-9).numpy(), ".-", label=name)
axis.axvline(RANK + 0.5, color="grey", linestyle=":")
axis.set(xlabel="number", ylabel="singular value", title="how many directions a matrix has")
axis.legend()
assert torch.linalg.matrix_rank(update) == RANK
assert torch.linalg.matrix_rank(W) > 8 * RANK

# %% [markdown]
# ## Merged
#
# W + alpha / r B A is a matrix of the shape of W. Merged, the model is a plain one again, with the
# names and the speed of the base, and the same logits but for rounding.

# %%
with torch.no_grad():
    unmerged = model(ids)
    lora.merge(model)
    merged = model(ids)
print(f"largest difference of logits: {(merged - unmerged).abs().max():.1e}")
torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
assert [*model.state_dict()] == [*base.state_dict()]
assert score(model, backwards) >= 2 * len(WORDS) - 2

# %% [markdown]
# ## Exercises
#
# 1. Set `RANK = 1`, and take the assertions on `score` out. How many parameters are trained then?
#    How many answers are right after 60 steps, and after 300? Where does the curve of singular
#    values break off?
# 2. Let the adapters learn capitals: `str.upper` instead of `backwards`. The loss stays above 3,
#    and no answer is right. Which rows of the embedding would have to change, and do they? Give
#    `lora.attach` the ids of the capitals as its third argument,
#    `tokenizer.encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ")`, and try again.
# 3. Give `LoraConfig` the targets `("qkv",)`. Which parameters have `requires_grad` now? The words
#    are still learned, but more slowly: how many steps does it take?
