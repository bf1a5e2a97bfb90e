"""Checks of part 4: the parts of a tuning script."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from course.checks import part2
from course.checks.chats import SPECIAL, TOKENIZER, conversation
from course.checks.compare import covered_once, holds, same
from course.checks.exercise import Exercise
from course.checks.part2 import UNEVEN, Batch, Trained
from course.checks.watch import OptimizerSteps, forward_passes, small_model
from course.reference import part3, part4
from torch import Tensor, nn

from gptsmith.batch import IGNORE_INDEX
from gptsmith.model.gpt import GPTModel
from gptsmith.run import Run
from gptsmith.run.create import create_from_weights
from gptsmith.tokenizer import Tokenizer

CHATS = [conversation(f"Question {n:02d}?", "No. " * (1 + n % 3)) for n in range(20)]


def loaders(code: Any) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        lines = (json.dumps({"messages": messages}) + "\n" for messages in CHATS)
        path.write_text("".join(lines), encoding="utf-8")
        yield from split(partial(code.create_loaders, path, TOKENIZER, 64, 3))


def split(create: Any) -> Iterator[str]:
    yield "split: every conversation is in one of the two loaders"
    train, val = create(val_fraction=0.2)
    held_out = numbers(val)
    covered_once([*numbers(train), *held_out], range(20), "conversation")
    yield "share: val_fraction of the conversations, at least one"
    holds(3 <= len(held_out) <= 5, f"{len(held_out)} of 20 with val_fraction 0.2")
    one = len(numbers(create(val_fraction=0.01)[1]))
    holds(one == 1, f"{one} of 20 with val_fraction 0.01")
    yield "chance: the split is random, and depends on the seed alone"
    n = len(held_out)
    for name, part in (("first", range(n)), ("last", range(20 - n, 20))):
        holds(sorted(held_out) != [*part], f"the {name} {n} conversations are for validation")
    again, other = (sorted(numbers(create(val_fraction=0.2, seed=s)[1])) for s in (0, 1))
    holds(again == sorted(held_out), f"{again} after {sorted(held_out)} with the same seed")
    holds(other != again, f"{again} with seeds 0 and 1")
    yield "order: training has a new one in each epoch, validation always the same"
    first, second = numbers(train), numbers(train)
    holds(first != second, f"two epochs of training have one order, {first}")
    holds(numbers(val) == held_out, f"{numbers(val)} after {held_out} in validation")
    yield "equality: rows are those of gptsmith: answers alone are targets"
    for inputs, targets in (*train, *val):
        for row, targets_of_row in zip(inputs, targets, strict=True):
            ids, labels = part3.encode_conversation(CHATS[number(row)], TOKENIZER)
            n = len(ids) - 1
            same(row[:n], ids[:-1], f"inputs of conversation {number(row)}")
            expected = labels[1:] + [IGNORE_INDEX] * (len(row) - n)
            same(targets_of_row, expected, f"targets of conversation {number(row)}")


def number(row: Tensor) -> int:
    text = TOKENIZER.decode(row.tolist())
    found = re.search(r"Question (\d\d)\?", text)
    holds(found, f"a row is {text!r}, which is none of the file's conversations")
    return int(found[1]) if found else -1


def numbers(loader: Any) -> list[int]:
    return [number(row) for inputs, _ in loader for row in inputs]


def forward(code: Any) -> Iterator[str]:
    model, (inputs, targets) = small_model(), part2.batch(3, masked=5, seed=1)
    yield "type: a tensor of one number with a gradient, and a count"
    loss, count = code.batch_loss(model, inputs, targets)
    holds(isinstance(loss, Tensor), f"the loss is a {type(loss).__name__}")
    holds(loss.dim() == 0, f"the loss has shape {tuple(loss.shape)}")
    holds(loss.requires_grad, "the loss has no gradient")
    yield "count: the targets that are not -100"
    holds(int(count) == 9, f"{int(count)} of 3 rows of 8, of which 5 are masked")
    logits = model(inputs).detach()
    yield "shift: targets are used as they are, not shifted once more"
    shifted = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="sum"
    )
    holds(abs(loss.item() - shifted) > 1e-3, "the loss at t is that of targets[t + 1]")
    yield "context: masked positions have no gradient"
    seen: list[Tensor] = []
    handle = model.final_norm.register_forward_hook(lambda module, args, out: seen.append(out))
    loss, _ = code.batch_loss(model, inputs, targets)
    handle.remove()
    [gradient] = torch.autograd.grad(loss, seen)
    same(gradient[:, :5], torch.zeros_like(gradient[:, :5]), "the gradient before the answers")
    yield "sum: of the losses, not their mean"
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    holds(abs(loss.item() - expected / 9) > 1e-3, f"{loss.item():.4g} is the mean of nine losses")
    same(loss, expected, "the loss")
    yield "precision: in bfloat16 the products are, and the loss is float32"
    with forward_passes(model) as passes:
        low, _ = code.batch_loss(model, inputs, targets, dtype=torch.bfloat16)
    holds(set(passes.dtypes) == {torch.bfloat16}, f"products in {passes.dtypes[:1]}")
    holds(low.dtype == torch.float32, f"the loss is {low.dtype}")
    yield "equality: loss and gradients are those of gptsmith"
    parameters = list(model.parameters())
    found, theirs = (each.batch_loss(model, inputs, targets)[0] for each in (code, part4))
    same(found, theirs, "the loss")
    for (name, _), a, b in zip(
        model.named_parameters(), torch.autograd.grad(found, parameters),
        torch.autograd.grad(theirs, parameters), strict=True,
    ):  # fmt: skip
        same(a, b, f"the gradient of {name}")


def backward(code: Any) -> Iterator[str]:
    run = partial(stepped, code)
    yield "steps: one of the optimizer, at the given rate"
    _, seen, records = run(UNEVEN, accumulation=3)
    same(seen.rates, [0.01], "the rate of step", 1e-6)
    yield "loss: the mean over all targets of the step, a float"
    inputs, targets = part2.joined(UNEVEN)
    expected = F.cross_entropy(small_model()(inputs).flatten(0, 1), targets.flatten()).item()
    holds(isinstance(records[0]["loss"], float), f"it is a {type(records[0]['loss']).__name__}")
    same(records[0]["loss"], expected, "the loss")
    yield from part2.gradients(run)
    yield "empty: a step without targets has loss 0, and changes no weight"
    nothing = (inputs, torch.full_like(targets, IGNORE_INDEX))
    model, _, records = run([nothing])
    same(records[0]["loss"], 0.0, "the loss")
    for (name, p), q in zip(model.named_parameters(), small_model().parameters(), strict=True):
        same(p, q, name)
    yield "equality: weights after some steps are those of gptsmith's training step"
    ours, theirs = (
        torch.nn.utils.parameters_to_vector(
            stepped(each, UNEVEN, accumulation=3, steps=4)[0].parameters()
        )
        for each in (code, part4)
    )
    same(ours, theirs, "the weights, as one vector,", 1e-4)


def stepped(
    code: Any,
    batches: Sequence[Batch],
    *,
    model: nn.Module | None = None,
    steps: int = 1,
    accumulation: int = 1,
    peak: float = 0.01,
    max_grad_norm: float = 1e9,
) -> Trained:
    """As part2.trained, by the solution's tuning_step."""
    model, endless = model or small_model(), cycle(batches)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen, records = OptimizerSteps(optimizer), []
    for _ in range(steps):
        given = list(islice(endless, accumulation))
        loss = code.tuning_step(model, given, optimizer, peak, max_grad_norm)
        records.append({"loss": loss})
    return model, seen, records


def pretrained(code: Any) -> Iterator[str]:
    tokenizer, V = Tokenizer.byte(), 257
    base = small_model(vocab_size=V)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        create_from_weights(
            path, {"import": "random numbers"}, base.config, tokenizer,
            iter(base.state_dict().items()), torch.float32, None,
        )  # fmt: skip
        yield from loaded(code, path, Run.open(path).load_model())


def loaded(code: Any, path: Path, base: GPTModel) -> Iterator[str]:
    V = base.config.vocab_size
    yield "tokens: five new ids after the old ones; text is encoded as before"
    model, tokenizer = code.load_pretrained(path)
    new = {name: id for name, id in tokenizer.special_tokens.items() if id >= V}
    holds(set(new) == set(SPECIAL) - {"<|endoftext|>"}, f"the new special tokens are {[*new]}")
    same(sorted(new.values()), list(range(V, V + 5)), "their ids, sorted,")
    same(tokenizer.encode("a<|end|>"), list(b"a<|end|>"), "ids of 'a<|end|>'")
    yield "size: the embedding has a row for each id"
    rows = model.embedding.token.weight
    same(list(rows.shape), [V + 5, base.config.n_embd], "its (V, C)")
    yield "old: logits of the old ids are those of the base run"
    ids = torch.arange(24).view(3, 8) * 10
    same(model.eval()(ids)[..., :V], base(ids), "logits")
    yield "new: rows of the new ids are the mean of the old ones"
    same(rows[V:], rows[:V].mean(0).expand(5, -1), "the new rows")
    yield "head: it shares its matrix with the embedding, as before"
    holds(model.head_weight is rows, "the head has a matrix of its own")
    yield "training: training mode, and every parameter needs gradients"
    model, _ = code.load_pretrained(path)
    holds(model.training, "the model is in evaluation mode")
    fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
    holds(not fixed, f"{fixed[:1]} needs none")
    yield "equality: the weights are those of gptsmith's fine-tuning"
    expected = dict(part4.load_pretrained(path)[0].named_parameters())
    for name, p in model.named_parameters():
        same(p, expected[name], name)


EXERCISES = {
    "4.1": Exercise("loaders", ("create_loaders",), loaders),
    "4.2": Exercise("forward pass and loss", ("batch_loss",), forward),
    "4.3": Exercise("backward pass and step", ("tuning_step",), backward),
    "4.4": Exercise("loading a pretrained model", ("load_pretrained",), pretrained),
}
