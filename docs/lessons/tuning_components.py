# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A model that answers
#
# Conversations as tokens, what of them is learned, batches, a model that learns to answer, and its
# replies: the parts of gptsmith's chat tuning one at a time. The model is so small that it starts
# untrained; half a minute on a laptop. [Tuning](tuning.py) goes on from here: LoRA, and targets in
# colour.

# %%
import matplotlib.pyplot as plt
import torch

import gptsmith
from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate
from gptsmith.data.chat import ChatCounts, encode_conversations
from gptsmith.data.conversations import Conversation
from gptsmith.data.examples import Examples
from gptsmith.data.packing import PackedRows, PaddedRows
from gptsmith.train.loss import next_token_loss

torch.manual_seed(0)

# %% [markdown]
# ## A conversation as tokens
#
# Each message is `<|role|>`, its text, `<|end|>`. These special tokens come from the template
# alone: what a person types is text, even where it spells one of them.

# %%
tokenizer = gptsmith.Tokenizer.byte().add_special_tokens(CHAT_TOKENS)
template = ChatTemplate(TEMPLATE, tokenizer)
messages = [
    {"role": "user", "content": "Say <|end|>"},
    {"role": "assistant", "content": "<|end|>"},
]
encoded = template.encode(messages)
print(tokenizer.decode(encoded.ids))
end = tokenizer.special_tokens["<|end|>"]
assert encoded.ids.count(end) == 2  # of four that are spelled

# %% [markdown]
# ## What is learned
#
# The answer, from `<|assistant|>` to the `<|end|>` after it, which teaches the model to stop. The
# user's message is context: the model reads it, and is not taught to write it.

# %%
pieces = [tokenizer.decode([id]) for id in encoded.ids]
for learned, name in ((False, "context"), (True, "learned")):
    shown = [p for p, target in zip(pieces, encoded.is_target, strict=True) if target == learned]
    print(f"{name}: {''.join(shown)}")
assert encoded.is_target == [False] * 13 + [True] * 9

# %% [markdown]
# ## Batches
#
# Conversations differ in length. One in a row is padded; several in a row are packed, and each
# attends to itself alone. Either way the targets are the same, without any padding, and so is the
# summed loss.

# %%
WORDS = [
    "ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen",
    "jay", "kid", "owl", "pig", "ram", "yak",
]  # fmt: skip
chats = [
    [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}]
    for word in WORDS
]
T = 64
counts = ChatCounts(T)
found = (Conversation(chat, f"chat {i}") for i, chat in enumerate(chats))
examples = Examples(encode_conversations(found, template, counts))
pad_id = tokenizer.special_tokens["<|pad|>"]
padded, packed = PaddedRows(examples, T, 0, pad_id), PackedRows(examples, T, 0, pad_id)
print(counts)
print(padded.batch(0, len(chats)), packed.batch(0, packed.per_epoch), sep="\n")

config = gptsmith.ModelConfig(
    n_layer=2, n_head=2, n_embd=64, context_length=T, vocab_size=tokenizer.vocab_size
)
model = gptsmith.GPTModel(config)
with torch.no_grad():
    one_per_row = next_token_loss(model, padded.batch(0, len(chats)))
    several = next_token_loss(model, packed.batch(0, packed.per_epoch))
print(f"summed loss, padded {one_per_row:.3f}, packed {several:.3f}")
torch.testing.assert_close(one_per_row, several, rtol=1e-4, atol=1e-3)

# %% [markdown]
# ## Masked targets have no gradient
#
# A target of -100 is left out of the loss: the last layer learns nothing at its position.

# %%
batch = padded.batch(0, 1)
hidden: list[torch.Tensor] = []
handle = model.final_norm.register_forward_hook(lambda module, given, out: hidden.append(out))
loss = next_token_loss(model, batch)
handle.remove()
[gradient] = torch.autograd.grad(loss, hidden)  # (1, T, C)
learned = batch.targets[0] != IGNORE_INDEX
assert not gradient[0, ~learned].any()
assert gradient[0, learned].any(dim=-1).all()

figure, axes = plt.subplots(figsize=(5, 1.5))
axes.bar(range(len(learned)), gradient[0].norm(dim=-1).tolist())
axes.set(xlabel="position", ylabel="gradient", title="only the answer teaches")

# %% [markdown]
# ## Tuning, and replies
#
# A reply ends where the model writes `<|end|>`, or another special token. Before tuning, that is
# chance.

# %%
chat = gptsmith.Chat(model.eval(), tokenizer, template)
greedy = gptsmith.SamplingConfig(temperature=0, max_new_tokens=12)


def replies() -> list[str]:
    chat.engine.refresh()  # the weights have changed
    return [chat.reply(messages[:1], greedy).text for messages in chats]


before = replies()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model.train()
for step in range(120):
    batch = packed.batch(step * packed.per_epoch, packed.per_epoch)
    loss = next_token_loss(model, batch) / batch.count
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
model.eval()
after = replies()
right = sum(reply == word for reply, word in zip(after, WORDS, strict=True))
print(f"before: {before[0]!r}\nafter: {after[:5]}, {right} of {len(WORDS)} right")
assert right >= len(WORDS) - 2

# %% [markdown]
# ## Exercises
#
# 1. Train on `chats[:-1]`, and ask for the last word. What does the model reply to a word that it
#    has never copied?
# 2. Set `T = 32`. How many packed rows are there now, and does the summed loss change?
# 3. Before the loss, hide the end of the answers: `batch.targets[batch.targets == end] = -100`.
#    What do the replies look like, and what ends them?
