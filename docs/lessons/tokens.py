# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Tokens
#
# A language model reads and writes numbers, each of which stands for a piece of text: a *token*.
# The tokenizer that makes them is learned from text before the model is, and cannot be changed
# afterwards. Here it is learned step by step, by byte-pair encoding as in GPT-2, and then
# measured. It takes a few seconds and downloads nothing.

# %%
from collections import Counter
from itertools import pairwise
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import numpy as np
from tokenizers import pre_tokenizers

import gptsmith
from gptsmith.model import flops

# %% [markdown]
# ## Bytes
#
# UTF-8 writes a character as one to four bytes. A vocabulary of the 256 bytes therefore spells any
# text, and no text is ever unknown. The price is length: a token for each byte.

# %%
by_byte = gptsmith.Tokenizer.byte()
for character in "aé猫🙂":
    print(character, by_byte.encode(character))
text = "naïve 猫 🙂"
assert by_byte.encode(text) == list(text.encode())
assert by_byte.decode(by_byte.encode(text)) == text

# %% [markdown]
# Half a character is not text. A reply that is shown while it is generated must wait for the rest
# of the character, which is what `Tokenizer.stream` does.

# %%
ids = by_byte.encode("猫")
print("at once:", [by_byte.decode([id]) for id in ids])
stream = by_byte.stream()
streamed = [stream.push(id) for id in ids]
print("streamed:", streamed)
assert streamed == ["", "", "猫"]

# %% [markdown]
# ## Pieces
#
# Before anything is merged, the text is cut into pieces: a word, a number or punctuation, each
# with the space before it, and runs of white space, whose last space goes to the next word. No
# token ever crosses a cut. So a letter and a digit, or the end of a word and a comma, are never in
# one token, and a word with a space before it is another token than the word without.

# %%
split = pre_tokenizers.ByteLevel(add_prefix_space=False)


def pieces(text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in split.pre_tokenize_str(text)]


print(pieces("In 2024, it's 100 apples:   x1"))
assert pieces("a cat") == ["a", " cat"]
assert pieces("x1") == ["x", "1"]
assert pieces("a   b") == ["a", "  ", " b"]

# %% [markdown]
# ## Learning merges
#
# Start from bytes. Count all pairs of neighbours inside the pieces, make the most frequent pair a
# new token, replace it everywhere, and count again. Of equally frequent pairs, the one with the
# lower ids is first. That is all of byte-pair encoding, so we do it by hand.

# %%
SMALL = """the cat sat on the mat. the cat ate the rat. that cat is fat, that rat is flat.
the other cat thinks that this is the hat of the cat, but the hat is that of another rat.
"""
base = gptsmith.Tokenizer.train_bpe([SMALL], vocab_size=257)  # 256 bytes and <|endoftext|>
vocabulary = [base.decode_bytes([id]) for id in range(256)]


def merge(ids: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    """The ids with each occurrence of the pair replaced by the new id."""
    merged: list[int] = []
    for id in ids:
        if merged and (merged[-1], id) == pair:
            merged[-1] = new
        else:
            merged.append(id)
    return tuple(merged)


words = {tuple(base.encode(piece)): n for piece, n in Counter(pieces(SMALL)).items()}
new_id: dict[tuple[int, int], int] = {}  # of each pair that was merged, in order
lengths = [sum(len(word) * n for word, n in words.items())]
while True:
    counts: Counter[tuple[int, int]] = Counter()
    for word, n in words.items():
        for pair in pairwise(word):
            counts[pair] += n
    pair, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    if count < 2:
        break
    new_id[pair] = len(vocabulary)
    vocabulary.append(vocabulary[pair[0]] + vocabulary[pair[1]])
    words = {merge(word, pair, new_id[pair]): n for word, n in words.items()}
    lengths.append(sum(len(word) * n for word, n in words.items()))
    if len(new_id) <= 8:
        left, right = (vocabulary[id].decode() for id in pair)
        print(f"{new_id[pair]}: {left!r} + {right!r}, {count} times")

# %% [markdown]
# gptsmith's tokenizer, trained on the same text, has the same vocabulary in the same order.

# %%
learned = gptsmith.Tokenizer.train_bpe([SMALL], vocab_size=10_000)  # as many as there are
assert vocabulary == [learned.decode_bytes([id]) for id in range(learned.vocab_size - 1)]
print(f"{len(new_id)} merges, then no pair occurs twice")

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(lengths, marker=".")
for n in (1, 2, 4, 7, 11, 16):
    token = vocabulary[255 + n].decode().replace(" ", "␣")
    axes.annotate(token, (n, lengths[n]), (4, 6), textcoords="offset points", family="monospace")
axes.set(xlabel="merges", ylabel="tokens in the text", title="each merge shortens the text")
axes.set_xticks(range(0, len(lengths), 2))
axes.set_ylim(0)
plt.show()

# %% [markdown]
# ## Encoding
#
# A new text is cut into pieces, and in each piece the merges are applied in the order in which
# they were learned: always the pair with the lowest new id. The result need not be the shortest
# one.

# %%
steps: list[tuple[int, ...]] = []  # the last piece that was encoded, after each merge


def encode(text: str) -> list[int]:
    ids: list[int] = []
    for piece in pieces(text):
        word = tuple(base.encode(piece))
        steps[:] = [word]
        while known := [(new_id[pair], pair) for pair in pairwise(word) if pair in new_id]:
            new, pair = min(known)
            word = merge(word, pair, new)
            steps.append(word)
        ids += word
    return ids


for text in (SMALL, "The bat sat; it thatched a flat hat.", "naïve 猫"):
    assert encode(text) == learned.encode(text)

encode(" that")
figure, axes = plt.subplots(figsize=(6, 0.5 * len(steps)), layout="constrained")
for row, ids in enumerate(steps):
    x = 0
    for id in ids:
        size = len(vocabulary[id])
        colour = "#dddddd" if id < 256 else plt.get_cmap("Set2")(id % 7)
        axes.barh(row, size - 0.08, left=x, height=0.7, align="center", color=colour)
        label = vocabulary[id].decode().replace(" ", "␣")
        axes.text(x + size / 2 - 0.04, row, label, ha="center", va="center", family="monospace")
        x += size
axes.set(title="' that', merge by merge; grey: bytes", ylabel="merges")
axes.set_xticks([])
axes.invert_yaxis()
plt.show()

# %% [markdown]
# ## A real vocabulary
#
# The same on the language reference of Python, which comes with Python itself. Merges follow
# frequency, not meaning: parts of words come first, then whole words; the longest token is the
# border of a table.

# %%
texts = list(dict.fromkeys(topics.values()))
held_out = texts[::10]
training = [text for n, text in enumerate(texts) if n % 10]
SIZES = [257, 512, 1024, 2048, 4096, 8192]
tokenizers = {V: gptsmith.Tokenizer.train_bpe(training, V) for V in SIZES}
tokenizer = tokenizers[4096]
spelled = [tokenizer.decode([id]) for id in range(4095)]
print("first learned:", spelled[256:266])
print("last learned:", spelled[-8:])
print("longest:", max(spelled, key=len))

# %% [markdown]
# A vocabulary of 1,024 is the beginning of one of 4,096: the merges do not know how many will
# follow.

# %%
assert spelled[:1023] == [tokenizers[1024].decode([id]) for id in range(1023)]

# %% [markdown]
# ## Spaces
#
# A space belongs to the word after it. So a word at the beginning of a line is another token than
# the same word later, and a prompt that ends with a space ends where training never ended a word:
# the space stands alone, and the model has to continue with a word that has none.

# %%
for text in ("for name in names:", "for name in "):
    print([tokenizer.decode([id]) for id in tokenizer.encode(text)])
assert tokenizer.encode("name") != tokenizer.encode(" name")
whole, cut = tokenizer.encode("for name"), tokenizer.encode("for ")
assert whole[: len(cut)] != cut  # " name" is one token, after "for" and not after "for "

# %% [markdown]
# ## Numbers
#
# A run of digits is a piece, and merges inside it follow frequency alone. Numbers that the text
# has often are one token, others fall into parts of unequal length: the digit of the hundreds is
# sometimes a token of its own and sometimes not. That is one reason why small models are bad at
# arithmetic.

# %%
for number in ("8", "16", "256", "257", "1024", "1025", "1234567"):
    print(number, [tokenizer.decode([id]) for id in tokenizer.encode(number)])

tokens = np.array([len(tokenizer.encode(f" {n}")) for n in range(1000)]).reshape(10, 100)
figure, axes = plt.subplots(figsize=(8, 2.2), layout="constrained")
picture = axes.imshow(tokens, cmap="viridis", aspect="auto", vmin=0.5, vmax=tokens.max() + 0.5)
axes.set(xlabel="last two digits", ylabel="hundreds", title="tokens of ' 0' to ' 999'")
axes.set_yticks(range(10))
figure.colorbar(picture, ax=axes, ticks=range(1, tokens.max() + 1), label="tokens")
plt.show()
assert len(set(tokens.flat)) > 1

# %% [markdown]
# ## Special tokens
#
# Some ids stand for no text: the end of a document, or the beginning of a message. They have a
# spelling for people, and whoever types this spelling has typed text. Otherwise a user could end
# their message and begin one in the name of the system.

# %%
chat = tokenizer.add_special_tokens(["<|user|>", "<|end|>"])
typed = "Hello<|end|>"
as_text, as_special = chat.encode(typed), chat.encode(typed, allow_special=True)
print([chat.decode([id]) for id in as_text])
print([chat.decode([id]) for id in as_special])
assert chat.decode(as_text) == chat.decode(as_special) == typed  # people cannot see the difference
end = chat.special_tokens["<|end|>"]
assert end not in as_text
assert as_special == [*chat.encode("Hello"), end]
assert chat.encode(training[0]) == tokenizer.encode(training[0])  # new ids change no old ones

# %% [markdown]
# ## What a token costs
#
# A larger vocabulary makes texts shorter, with diminishing returns, and on text that it was not
# trained on less so. Each id costs a row of the embedding and of the output layer, and every
# predicted token has to be multiplied by all of the latter. Counted in operations per byte of
# text, there is an optimum, and it grows with the model.

# %%
OTHER = "Ein Wörterbuch, das an englischen Texten gelernt wurde, taugt für andere Sprachen wenig."


def bytes_per_token(tokenizer: gptsmith.Tokenizer, texts: list[str]) -> float:
    tokens = sum(len(ids) for ids in tokenizer.encode_arrays(texts))
    return sum(len(text.encode()) for text in texts) / tokens


kinds = {"the training text": training, "held-out text": held_out, "German": [OTHER]}
compression = {
    name: [bytes_per_token(tokenizers[V], texts) for V in SIZES] for name, texts in kinds.items()
}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for name, values in compression.items():
    left.plot(SIZES, values, marker="o", label=name)
left.set(ylabel="bytes per token", title="how much text a token holds")
costs = {}
for layers, width in ((2, 64), (4, 128), (6, 384)):
    configs = [
        gptsmith.ModelConfig(
            n_layer=layers, n_head=width // 32, n_embd=width, context_length=256, vocab_size=V
        )
        for V in SIZES
    ]
    held_out_bytes = compression["held-out text"]
    per_byte = [
        flops.flops_per_token(config) / held
        for config, held in zip(configs, held_out_bytes, strict=True)
    ]
    costs[width] = np.array(per_byte) / per_byte[0]
    right.plot(SIZES, costs[width], marker="o", label=f"{layers} layers, {width} wide")
right.set(ylabel="relative to bytes", title="operations per byte of text")
for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [f"{V:,}" for V in SIZES])
    axes.set(xlabel="ids in the vocabulary")
    axes.legend()
plt.show()
for values in compression.values():
    assert all(a <= b for a, b in pairwise(values))
best = {width: SIZES[int(cost.argmin())] for width, cost in costs.items()}
print("cheapest vocabulary by width:", best)
assert best[64] < best[128] < best[384]

# %% [markdown]
# ## Losses of two vocabularies
#
# A loss in nats per token says nothing without the vocabulary: longer tokens are harder to guess.
# Take the simplest of models, which knows how often each token occurs and looks at nothing else.
# From bytes to 4,096 tokens its loss per token doubles, though it knows more about the text, as
# its bits per byte show. So compare models by bits per byte, which `gptsmith evaluate` reports
# beside perplexity.

# %%
nats, bits = [], []
for V in SIZES:
    ids = np.concatenate(tokenizers[V].encode_arrays(training))
    share = np.bincount(ids) / len(ids)
    share = share[share > 0]
    nats.append(float(-(share * np.log(share)).sum()))
    bits.append(nats[-1] / np.log(2) / bytes_per_token(tokenizers[V], training))
    print(f"{V:5} ids: {nats[-1]:.2f} nats per token, {bits[-1]:.2f} bits per byte")
assert nats[4] > 1.8 * nats[0]
assert bits[4] < 0.6 * bits[0]
assert all(a > b for a, b in pairwise(bits))

# %% [markdown]
# ## Exercises
#
# 1. Set `SMALL = SMALL * 10` before learning. Which of the first merges change, and why are there
#    more of them in the end?
# 2. Train a tokenizer with 1,300 ids on `" ".join(map(str, range(1000)))`. How many ids does it
#    have, which numbers are one token, and why not the others?
# 3. Encode `"\n" + " " * n + "return x"` for n from 0 to 12. What happens to the number of tokens,
#    and why does it hardly grow?
