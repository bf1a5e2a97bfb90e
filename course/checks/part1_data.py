"""Checks of part 1: data set, loader, tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from course.checks.compare import covered_once, holds, same
from course.checks.exercise import Exercise
from course.reference import part1 as reference

TEXTS = ("Once upon a time, 3 bears…\n\n\tüber naïve 模型 🙂", " ", "a<|end|>b <|endoftext|>")
TEXT = list(range(100, 130))  # 30 tokens, each another id


def dataset_setup(code: Any) -> Iterator[str]:
    yield "length: as many windows as have a target for each token"
    for tokens, T, windows in ((30, 7, 4), (29, 7, 4), (28, 7, 3), (8, 7, 1), (7, 7, 0)):
        found = len(code.GPTDataset(TEXT[:tokens], T))
        holds(found == windows, f"{found} windows of {T} in {tokens} tokens, expected {windows}")


def dataset_items(code: Any) -> Iterator[str]:
    windows = code.GPTDataset(TEXT, 7)
    yield "shape and type: inputs and targets are int64 tensors (T,)"
    for name, x in zip(("inputs", "targets"), windows[0], strict=True):
        found = (tuple(x.shape), x.dtype)
        holds(found == ((7,), torch.int64), f"{name} are {found}")
    yield "shift: each target is the token that follows its input"
    for number in range(4):
        inputs, targets = windows[number]
        same(targets, inputs + 1, f"targets of window {number}")
    yield "coverage: every token but the first is a target once, in order"
    targets = [id for i in range(len(windows)) for id in windows[i][1].tolist()]
    covered_once(targets, TEXT[1:29], "target")
    yield "end: IndexError beyond the last window"
    try:
        windows[len(windows)]
    except IndexError:
        pass
    else:
        holds(False, f"window {len(windows)} of {len(windows)} exists")
    yield "equality: the windows are those of gptsmith"
    for number, (inputs, targets) in enumerate(reference.GPTDataset(TEXT, 7)):
        same(windows[number][0], inputs, f"inputs of window {number}")
        same(windows[number][1], targets, f"targets of window {number}")


def dataloader(code: Any) -> Iterator[str]:
    text = torch.arange(51).tolist()  # ten windows of 5
    yield "shape: inputs and targets are (B, T)"
    inputs, targets = next(iter(code.create_dataloader(text, 5, 4)))
    for name, x in (("inputs", inputs), ("targets", targets)):
        holds(x.shape == (4, 5), f"{name} are {tuple(x.shape)}")
    same(targets, inputs + 1, "targets")

    def firsts(loader: Any) -> list[int]:  # the first token of each window, in order
        return [id for inputs, _ in loader for id in inputs[:, 0].tolist()]

    yield "order: that of the text without shuffling, and a smaller last batch is kept on request"
    plain = code.create_dataloader(text, 5, 4, shuffle=False, drop_last=False)
    same(firsts(plain), list(range(0, 50, 5)), "first tokens")
    yield "last batch: one with fewer than batch_size windows is left out on request"
    sizes = [len(inputs) for inputs, _ in code.create_dataloader(text, 5, 4, drop_last=True)]
    holds(sizes == [4, 4], f"batches of {sizes} windows from ten, with batch_size 4")
    yield "shuffling: another order than the text's, each window once"
    shuffled = code.create_dataloader(text, 5, 4, drop_last=False)
    first_epoch, second_epoch = firsts(shuffled), firsts(shuffled)
    covered_once(sorted(first_epoch), list(range(0, 50, 5)), "window at")
    holds(first_epoch != sorted(first_epoch), "the windows come in the order of the text")
    yield "epochs: each has another order"
    holds(first_epoch != second_epoch, f"two epochs have one order, {first_epoch}")
    yield "seed: the same seed gives the same order, another seed another"
    again, other = (code.create_dataloader(text, 5, 4, drop_last=False, seed=s) for s in (0, 1))
    same(firsts(again), first_epoch, "first tokens with the same seed")
    holds(firsts(other) != first_epoch, "seeds 0 and 1 give one order")


@cache
def gpt2_tokenizer() -> Any:
    return reference.setup_tokenizer()


def tokenizer(code: Any) -> Iterator[str]:
    yield "special tokens: five new ids, after GPT-2's own"
    made, expected = code.setup_tokenizer(), gpt2_tokenizer()
    names = set(expected.special_tokens) - {"<|endoftext|>"}
    missing = names - set(made.special_tokens)
    holds(not missing, f"special_tokens has no {sorted(missing)[:1]}")
    ids = sorted(made.special_tokens[name] for name in names)
    same(ids, list(range(50257, 50262)), "their ids, sorted")
    yield "plain text: special tokens that a text spells stay text"
    for text in TEXTS:
        special = [id for id in made.encode(text) if id > 50255]
        holds(not special, f"{text!r} is encoded with id {special[:1]}")
    yield "round trip: decode(encode(text)) is the text"
    for text in TEXTS:
        again = made.decode(made.encode(text))
        holds(again == text, f"{text!r} becomes {again!r}")
    yield "equality: ids are those of gptsmith"
    for text in TEXTS:
        same(made.encode(text), expected.encode(text), f"ids of {text!r}")


EXERCISES = {
    "1.12": Exercise("GPTDataset, set-up", ("GPTDataset",), dataset_setup),
    "1.13": Exercise("GPTDataset, item access", ("GPTDataset",), dataset_items),
    "1.14": Exercise("create_dataloader", ("create_dataloader",), dataloader),
    "1.15": Exercise("setup_tokenizer", ("setup_tokenizer",), tokenizer),
}
