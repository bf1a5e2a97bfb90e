"""Checks of part 3: conversations."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from course.checks import chats, part2
from course.checks.chats import (
    ASSISTANT,
    CHATS,
    END,
    ONE_TURN,
    PAD,
    SPECIAL,
    TOKENIZER,
    TWO_TURNS,
    USER,
)
from course.checks.compare import covered_once, holds, same
from course.checks.exercise import Exercise
from course.checks.watch import forward_passes
from course.reference import part3 as reference

from gptsmith.batch import IGNORE_INDEX
from gptsmith.data.examples import write_examples

Example = tuple[Sequence[int], Sequence[int]]


def show(ids: Sequence[int]) -> str:
    return repr(TOKENIZER.decode(ids))


def encoding(code: Any) -> Iterator[str]:
    yield "form: <|role|>content<|end|> for each message, one special token each"
    ids, labels = code.encode_conversation(ONE_TURN, TOKENIZER)
    text = "<|user|>Hello<|end|><|assistant|>Hi!<|end|>"
    holds(TOKENIZER.decode(ids) == text, f"{show(ids)}, expected {text!r}")
    special = [id for id in ids if id in SPECIAL.values()]
    holds(special == [USER, END, ASSISTANT, END], f"the special tokens are {special}")
    yield "labels: one for each id, the id itself (not the next one) or -100"
    holds(len(labels) == len(ids), f"{len(labels)} labels of {len(ids)} ids")
    for at, (id, label) in enumerate(zip(ids, labels, strict=True)):
        holds(label in (id, IGNORE_INDEX), f"label {at} is {label}, the id there is {id}")
    two, of_two = code.encode_conversation(TWO_TURNS, TOKENIZER)
    for name, chat in (("one turn", ONE_TURN), ("two turns", TWO_TURNS)):
        ids, labels = code.encode_conversation(chat, TOKENIZER)
        spans = list(messages_of(ids))
        yield f"context, {name}: nothing of system and user is learned, not even their <|end|>"
        for start, end in spans:
            if ids[start] != ASSISTANT:
                learned = [at for at in range(start, end) if labels[at] != IGNORE_INDEX]
                what = show([ids[at] for at in learned[:1]])
                holds(not learned, f"label {learned[:1]} is {what}, in {show(ids[start:end])}")
        yield f"answer, {name}: <|assistant|> and the content are learned"
        for start, end in spans:
            if ids[start] == ASSISTANT:
                masked = [at for at in range(start, end - 1) if labels[at] == IGNORE_INDEX]
                holds(not masked, f"label {masked[:1]} is -100, in {show(ids[start:end])}")
        yield f"end, {name}: the <|end|> after an answer is learned, or the model never stops"
        for start, end in spans:
            if ids[start] == ASSISTANT:
                holds(labels[end - 1] == END, f"label {end - 1} is {labels[end - 1]}")
    yield "plain text: a content that spells <|end|> has no special token"
    expected, expected_labels = reference.encode_conversation(TWO_TURNS, TOKENIZER)
    holds(two.count(END) == 5, f"{two.count(END)} times <|end|> for five messages")
    yield "equality: ids and labels are those of gptsmith's chat template"
    same(list(two), expected, "ids")
    same(list(of_two), expected_labels, "labels")


def messages_of(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and end of each message, which ends after its <|end|>."""
    start = 0
    for at, id in enumerate(ids):
        if id == END:
            yield start, at + 1
            start = at + 1


def collation(code: Any) -> Iterator[str]:
    examples = [reference.encode_conversation(chat, TOKENIZER) for chat in CHATS[:3]]
    inputs, targets = code.collate(examples, PAD)
    yield "shape and type: (B, T) int64, T one less than the longest example"
    T = max(len(ids) for ids, _ in examples) - 1
    for name, x in (("inputs", inputs), ("targets", targets)):
        found = (tuple(x.shape), x.dtype)
        holds(found == ((3, T), torch.int64), f"{name} are {found}, expected {(3, T)}")
    yield "inputs: the ids from the left, padded on the right"
    for row, (ids, _) in enumerate(examples):
        n = len(ids) - 1
        expected = ids[:-1] + [PAD] * (T - n)
        same(inputs[row], expected, f"inputs[{row}]")
    yield "shift: target t is label t + 1, shifted once"
    for row, (ids, labels) in enumerate(examples):
        same(targets[row, : len(ids) - 1], labels[1:], f"targets[{row}]")
    yield "padding: it has no targets"
    for row, (ids, _) in enumerate(examples):
        beyond = targets[row, len(ids) - 1 :]
        same(beyond, torch.full_like(beyond, IGNORE_INDEX), f"targets[{row}] of the padding")
    yield "pad id: one that occurs in a conversation is still learned there"
    _, as_end = code.collate(examples, END)
    same(as_end, targets, "targets with <|end|> as pad id")
    yield "equality: inputs and targets are those of gptsmith's rows"
    for name, x, y in zip(
        ("inputs", "targets"), (inputs, targets), reference.collate(examples, PAD), strict=True
    ):
        same(x, y, name)


def generation(code: Any) -> Iterator[str]:
    H, i, a = TOKENIZER.encode("Hia")
    polite = {ASSISTANT: H, H: i, i: END, END: a}  # and after <|end|> a's without end
    found = code.generate_response(chats.chain_model(polite, 64), TOKENIZER, "Hello", 20, 64)
    yield "type: a text"
    holds(isinstance(found, str), f"the answer is a {type(found).__name__}")
    yield "answer: the assistant's text alone, without the prompt"
    holds("Hello" not in found, f"{found!r} has the question in it")
    yield "prompt: it ends with <|assistant|>"
    holds(found.startswith("Hi"), f"{found!r}: after <|assistant|>, this model writes 'Hi'")
    yield "stop: the answer ends before <|end|>"
    holds(found == "Hi", f"{found!r}, expected 'Hi'")
    yield "limit: at most max_new_tokens tokens"
    found = code.generate_response(chats.chain_model({ASSISTANT: a}, 64), TOKENIZER, "Hello", 5, 64)
    holds(found == "aaaaa", f"{found!r}, expected 'aaaaa' with max_new_tokens 5")
    yield "context: prompt and answer together have at most context_length tokens"
    model = chats.chain_model({ASSISTANT: a}, 16)
    found = code.generate_response(model, TOKENIZER, "Hello", 50, 16)
    holds(found == "a" * 8, f"{found!r} after a prompt of 8 tokens, with context_length 16")
    yield "mode: evaluation mode, no gradients"
    model = chats.random_model(0, 64).train()
    with forward_passes(model) as seen:
        code.generate_response(model, TOKENIZER, "Hello", 3, 64)
    holds(not any(seen.training), "the model is in training mode")
    holds(not any(seen.records_gradients), "the forward pass records gradients")
    yield "conversation: earlier messages are part of the prompt"
    model = chats.random_model(1, 128)
    answers = [
        code.generate_multi_turn_response(
            model, TOKENIZER, [*chats.conversation(first, "Good."), *ONE_TURN[:1]], 12, 128
        )
        for first in ("How are you?", "1 + 1 = ?")
    ]
    holds(answers[0] != answers[1], "two conversations with the same last message have one answer")
    yield "equality: answers are those of gptsmith"
    for seed in range(3):
        arguments = (chats.random_model(seed, 128), TOKENIZER, TWO_TURNS[:-1], 12, 128)
        answer = code.generate_multi_turn_response(*arguments)
        expected = reference.generate_multi_turn_response(*arguments)
        holds(answer == expected, f"{answer!r}, expected {expected!r}")


def datasets(code: Any) -> Iterator[str]:
    slow = code.ConversationDataset(CHATS, TOKENIZER, 200)
    expected = reference.ConversationDataset(CHATS, TOKENIZER, 200)
    yield "slow: example i is conversation i, with its labels"
    compare(slow, expected)
    yield "long conversations: no answer is cut, and none without an answer is kept"
    long = [[*TWO_TURNS, *TWO_TURNS[1:]], *CHATS, TWO_TURNS[:-1]]
    for max_length in (28, 40, 60):
        compare(
            code.ConversationDataset(long, TOKENIZER, max_length),
            reference.ConversationDataset(long, TOKENIZER, max_length),
            f" with max_length {max_length}",
        )
    yield "fast: the file has the same examples"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.arrow"
        write_examples(path, [reference.as_stored(e, str(i)) for i, e in enumerate(expected)], {})
        compare(code.ArrowDataset(path), expected)

    def epoch(loader: Any) -> list[int]:  # of each conversation, its number
        rows = [row.tolist() for inputs, _ in loader for row in inputs]
        return [int(chr(row[TOKENIZER.encode("\0Question ").__len__()])) for row in rows]

    yield "loader: every example once, the last batch may be smaller"
    loader = code.create_tuning_loader(expected, 3, PAD)
    first, second = epoch(loader), epoch(loader)
    covered_once(first, range(7), "conversation")
    yield "order: shuffled anew in each epoch, or as in the data set"
    holds(first != sorted(first), "the conversations come in their order with shuffle=True")
    holds(first != second, f"two epochs have one order, {first}")
    plain = code.create_tuning_loader(expected, 3, PAD, shuffle=False)
    same(epoch(plain), list(range(7)), "conversations with shuffle=False")
    yield "batches: those of collate"
    for number, (batch, (inputs, targets)) in enumerate(
        zip(plain, reference.create_tuning_loader(expected, 3, PAD, shuffle=False), strict=True)
    ):
        same(batch[0], inputs, f"inputs of batch {number}")
        same(batch[1], targets, f"targets of batch {number}")


def compare(found: Any, expected: Any, where: str = "") -> None:
    holds(len(found) == len(expected), f"{len(found)} examples{where}, expected {len(expected)}")
    for i in range(len(expected)):
        for name, a, b in zip(("ids", "labels"), found[i], expected[i], strict=True):
            same(torch.as_tensor(a), b, f"{name} of example {i}{where}")


def conversation_batches() -> list[part2.Batch]:
    examples = reference.ConversationDataset(CHATS, TOKENIZER, 200)
    return list(reference.create_tuning_loader(examples, 3, PAD, shuffle=False))


LOADING = ("ConversationDataset", "ArrowDataset", "create_tuning_loader")
GENERATION = ("generate_response", "generate_multi_turn_response")
EXERCISES = {
    "3.1": Exercise("conversation to ids and labels", ("encode_conversation",), encoding),
    "3.2": Exercise("collator", ("collate",), collation),
    "3.3": Exercise("generation", GENERATION, generation),
    "3.4": Exercise(
        "validation loss", ("validation_loss", "collate"),
        partial(part2.validation, batches=conversation_batches),
    ),
    "3.5": Exercise("tuning loader", LOADING, datasets),
}  # fmt: skip
