"""Checks of part 2: the parts of a pretraining script."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from course.checks.compare import covered_once, holds, same
from course.checks.exercise import Exercise
from course.checks.watch import OptimizerSteps, T, V, forward_passes, small_model
from course.reference import part2 as reference
from torch import Tensor, nn

from gptsmith.batch import IGNORE_INDEX
from gptsmith.data.examples import Example, write_examples

Batch = tuple[Tensor, Tensor]
Trained = tuple[nn.Module, OptimizerSteps, list[dict[str, Any]]]


def batch(B: int, masked: int = 0, seed: int = 0) -> Batch:
    """Random tokens; the first `masked` targets of each row are IGNORE_INDEX."""
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].clone()
    targets[:, :masked] = IGNORE_INDEX
    return ids[:, :-1], targets


UNEVEN = [batch(2, seed=1), batch(2, masked=6, seed=2), batch(1, masked=3, seed=3)]


def joined(batches: Sequence[Batch]) -> Batch:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


# --- 2.1, 2.2 ------------------------------------------------------------------------------------


def loaders(code: Any) -> Iterator[str]:
    rows = [np.arange(T + 1, dtype=np.int32) + 100 * n for n in range(10)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.arrow"
        write_examples(path, [Example(row, row, f"row {n}") for n, row in enumerate(rows)], {})
        yield from train_loader(code.create_train_loader(path, 4), code, path)
    yield from val_loader(code)


def train_loader(loader: Any, code: Any, path: Path) -> Iterator[str]:
    yield "training, shape and type: inputs and targets are int64 (B, T)"
    epoch = list(loader)
    for name, x in zip(("inputs", "targets"), epoch[0], strict=True):
        found = (tuple(x.shape), x.dtype)
        holds(found == ((4, T), torch.int64), f"{name} are {found}")
    yield "training, shift: each target is the token that follows in the same row"
    for inputs, targets in epoch:
        same(targets, inputs + 1, "targets")
    yield "training, last batch: one with fewer than batch_size rows is left out"
    sizes = [len(inputs) for inputs, _ in epoch]
    holds(sizes == [4, 4], f"batches of {sizes} rows from ten, with batch_size 4")
    yield "training, order: each epoch has another, and no row twice"
    orders = [
        [int(row[0]) // 100 for inputs, _ in each for row in inputs]
        for each in (epoch, list(loader), list(loader))
    ]
    for order in orders:
        covered_once(order, sorted(set(order)), "row")
        holds(order != sorted(order), "the rows come in the order of the file")
    holds(orders[0] != orders[1], f"two epochs have one order, {orders[0]}")
    yield "training, seed: the same seed gives the same epoch"
    again = [
        int(row[0]) // 100 for inputs, _ in code.create_train_loader(path, 4) for row in inputs
    ]
    holds(again == orders[0], f"{again} after {orders[0]}")


def val_loader(code: Any) -> Iterator[str]:
    text = list(range(100, 130))  # 30 tokens: three windows of 8, and one of 5
    loader = code.create_val_loader(text, T, 3)
    batches = list(loader)
    yield "validation, shape: inputs and targets are (B, T), padded where the text ends"
    shapes = [tuple(x.shape) for pair in batches for x in pair]
    holds(all(T == shape[1] for shape in shapes), f"shapes {shapes}")
    yield "validation, coverage: every token but the first is a target once"
    targets = [id for _, targets in batches for id in targets.flatten().tolist()]
    covered_once([id for id in targets if id != IGNORE_INDEX], text[1:], "target")
    yield "validation, shift: each target is the token that follows"
    for inputs, targets in batches:
        real = targets != IGNORE_INDEX
        same(targets[real], inputs[real] + 1, "targets")
    yield "validation, order: that of the text, each time"
    for name, other in (("a second iteration", list(loader)), ("gptsmith", expected_val(text))):
        for number, ((_, targets), (_, again)) in enumerate(zip(batches, other, strict=True)):
            same(targets, again, f"targets of batch {number}, compared with {name}")


def expected_val(text: list[int]) -> list[Batch]:
    return list(reference.create_val_loader(text, T, 3))


def validation(code: Any, batches: Callable[[], Sequence[Batch]] = lambda: UNEVEN) -> Iterator[str]:
    given = batches()
    sizes = {"vocab_size": 1 + max(int(inputs.max()) for inputs, _ in given)}
    sizes["context_length"] = max(inputs.shape[1] for inputs, _ in given)
    model = small_model(dropout=0.5, **sizes)
    yield "type: a float"
    with forward_passes(model.train()) as seen:
        loss = code.validation_loss(model, given)
    holds(isinstance(loss, float), f"the loss is a {type(loss).__name__}")
    yield "mode: dropout is off during validation"
    holds(not any(seen.training), "the model is in training mode")
    yield "mode afterwards: that of before"
    holds(model.training, "the model was in training mode, and is in evaluation mode afterwards")
    code.validation_loss(model.eval(), given)
    holds(
        not model.training, "the model was in evaluation mode, and is in training mode afterwards"
    )
    yield "gradients: none are recorded"
    holds(not any(seen.records_gradients), "the forward pass records gradients, which takes memory")
    yield "mean: per target over all batches, not the mean of the batches' means"
    model = model.eval()
    logits, targets = [], []
    with torch.no_grad():
        for inputs, labels in given:
            logits.append(model(inputs).flatten(0, 1))
            targets.append(labels.flatten())
    losses = [F.cross_entropy(x, y) for x, y in zip(logits, targets, strict=True)]
    of_means, apart = float(torch.stack(losses).mean()), 1e-4
    expected = float(F.cross_entropy(torch.cat(logits), torch.cat(targets)))
    holds(abs(loss - of_means) > apart, f"{loss:.6f} is the mean of the batches' means")
    same(loss, expected, "the loss")
    yield "empty: a batch without targets changes nothing"
    nothing = (given[0][0], torch.full_like(given[0][1], IGNORE_INDEX))
    same(code.validation_loss(model, [*given, nothing]), expected, "the loss")
    yield "equality: the loss is that of gptsmith"
    same(code.validation_loss(model, given), reference.validation_loss(model, given), "the loss")


# --- 2.3 -----------------------------------------------------------------------------------------


def loop(code: Any) -> Iterator[str]:
    yield from rates(code)
    yield "steps: one of the optimizer for each `accumulation` batches"
    model, seen, records = trained(code, UNEVEN, accumulation=3, steps=2)
    holds(len(seen.rates) == 2, f"{len(seen.rates)} steps of the optimizer for steps=2")
    yield "rates: step s of the optimizer has learning_rate(s); batches are not counted"
    _, longer, _ = trained(code, [batch(1)], accumulation=2, steps=6)
    expected = [code.learning_rate(s, 0.01, 1, 6) for s in range(6)]
    same(longer.rates, expected, "the rate of step", 1e-6)
    yield from gradients(partial(trained, code))
    yield "record: step, mean loss and rate, once for each step"
    numbers = [record["step"] for record in records]
    holds(numbers == [1, 2], f"records of steps {numbers}, expected [1, 2]")
    inputs, targets = joined(UNEVEN)
    loss = F.cross_entropy(small_model()(inputs).flatten(0, 1), targets.flatten()).item()
    same(float(records[0]["loss"]), loss, "the loss of step 1")
    same(float(records[0]["learning_rate"]), code.learning_rate(0, 0.01, 1, 2), "its rate")
    yield "precision: in bfloat16 the products are, and the weights stay float32"
    model = small_model()
    with forward_passes(model) as passes:
        trained(code, UNEVEN, model=model, dtype=torch.bfloat16)
    holds(set(passes.dtypes) == {torch.bfloat16}, f"products in {passes.dtypes[:1]}")
    kinds = {p.dtype for p in model.parameters()}
    holds(kinds == {torch.float32}, f"weights in {kinds}")
    yield "equality: weights after some steps are those of gptsmith's training step"
    ours, theirs = (
        torch.nn.utils.parameters_to_vector(
            trained(each, UNEVEN, accumulation=3, steps=4)[0].parameters()
        )
        for each in (code, reference)
    )
    same(ours, theirs, "the weights, as one vector,", 1e-4)


def gradients(trained: Callable[..., Trained]) -> Iterator[str]:
    """What holds for the gradient of every training step; `trained` is the function below."""
    yield "mode: the model is in training mode"
    model = small_model()
    with forward_passes(model) as passes:
        trained(UNEVEN, model=model.eval())
    holds(all(passes.training), "it is in evaluation mode")
    yield "gradient: that of the mean over all targets of a step, as if its batches were one"
    [accumulated] = trained(UNEVEN, accumulation=3)[1].gradients
    model = small_model()
    inputs, targets = joined(UNEVEN)
    F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    same(accumulated, whole, "the gradient")
    yield "clearing: the gradient of a step has nothing of the step before"
    first, second = trained([batch(2)], steps=2, peak=1e-12)[1].gradients
    same(second, first, "the gradient of the second step, on the same batch,")
    yield "clipping: the norm of the whole gradient is at most max_grad_norm"
    [clipped] = trained(UNEVEN, accumulation=3, max_grad_norm=0.01)[1].gradients
    same(float(clipped.norm()), 0.01, "the norm of the gradient", 1e-4)
    same(clipped / clipped.norm(), whole / whole.norm(), "the clipped gradient, scaled to norm 1")


def rates(code: Any) -> Iterator[str]:
    found = [code.learning_rate(s, 2.0, 4, 20, 0.1) for s in range(20)]
    yield "schedule, warm-up: equal steps up to the peak, first reached at step warmup_steps"
    same(found[:5], [0.4, 0.8, 1.2, 1.6, 2.0], "the rate of step", 1e-6)
    yield "schedule, decay: down from the peak to min_ratio of it at the end"
    rises = [s for s in range(4, 19) if found[s + 1] >= found[s]]
    holds(not rises, f"the rate does not fall after step {rises[:1]}")
    same(code.learning_rate(20, 2.0, 4, 20, 0.1), 0.2, "the rate at the end", 1e-6)
    same(code.learning_rate(12, 2.0, 4, 20, 0.1), 1.1, "the rate half-way", 1e-6)
    yield "schedule, equality: the rates are those of gptsmith"
    same(
        found,
        [reference.learning_rate(s, 2.0, 4, 20, 0.1) for s in range(20)],
        "rate of step",
        1e-6,
    )


def trained(
    code: Any, batches: Sequence[Batch], *, model: nn.Module | None = None, **changes: Any
) -> Trained:
    """A model after training with the solution's loop, what its optimizer saw, and the records."""
    model = model or small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen, records = OptimizerSteps(optimizer), []
    settings = dict(steps=1, accumulation=1, peak=0.01, warmup_steps=1, max_grad_norm=1e9)
    code.train(model, cycle(batches), optimizer, log=records.append, **{**settings, **changes})
    return model, seen, records


# --- 2.4 -----------------------------------------------------------------------------------------

WORDS = "--width 16 --layers 3 --heads 2 --context-length 8 --learning-rate 0.02 --batch-size 5"


def set_up(code: Any) -> Iterator[str]:
    yield "flags: every one has a default, and the value that is given"
    for name, value in reference.FLAGS.items():
        found = getattr(code.parse_arguments([]), name, None)
        kind = type(value)
        holds(
            isinstance(found, kind),
            f"the default of {name} is {found!r}, expected a {kind.__name__}",
        )
        given = code.parse_arguments([f"--{name.replace('_', '-')}", "3"])
        holds(getattr(given, name) == 3, f"{name} is {getattr(given, name)} where 3 is given")
    args = code.parse_arguments(WORDS.split())
    yield "model: it has the sizes of the flags"
    model = code.create_model(args, V)
    same(list(model.embedding.token.weight.shape), [V, 16], "(V, C) of the embedding")
    holds(len(model.blocks) == 3, f"{len(model.blocks)} blocks for --layers 3")
    yield "optimizer: every parameter is in one group, at the rate of the flags"
    optimizer = code.create_optimizer(model, args)
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    for name, p in model.named_parameters():
        count = sum(p is each for each in listed)
        holds(count == 1, f"{name} is in {count} groups")
    for group in optimizer.param_groups:
        same(float(group["lr"]), 0.02, "the rate of a group", 1e-6)
    yield "weight decay: on matrices alone"
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    for name, p in model.named_parameters():
        expected = args.weight_decay if p.dim() >= 2 else 0.0
        found = decay[id(p)]
        holds(found == expected, f"{name} {tuple(p.shape)} has {found}, expected {expected}")
    yield "checkpoint: training that is stopped and resumed ends with the same bits"
    inputs, targets = batch(3)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        step(model, optimizer)
        code.save_checkpoint(path, model, optimizer, 1)
        step(model, optimizer)
        torch.manual_seed(1)
        resumed = code.create_model(args, V)
        its_optimizer = code.create_optimizer(resumed, args)
        number = code.load_checkpoint(path, resumed, its_optimizer)
    step(resumed, its_optimizer)
    for (name, p), q in zip(model.named_parameters(), resumed.parameters(), strict=True):
        same(q, p, f"{name} after a resume and another step", 0.0)
    yield "step: load_checkpoint returns the one that was saved"
    holds(number == 1, f"{number!r}, saved was 1")


TRAIN = ("learning_rate", "train")
SET_UP = (
    "parse_arguments", "create_model", "create_optimizer", "save_checkpoint", "load_checkpoint"
)  # fmt: skip
EXERCISES = {
    "2.1": Exercise("loaders", ("create_train_loader", "create_val_loader"), loaders),
    "2.2": Exercise("validation loss", ("validation_loss",), validation),
    "2.3": Exercise("training loop", TRAIN, loop),
    "2.4": Exercise("model and optimizer, set-up", SET_UP, set_up),
}
