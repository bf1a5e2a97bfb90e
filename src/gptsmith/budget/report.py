"""What `gptsmith plan` prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

from rich.filesize import decimal as file_size
from rich.table import Table

from gptsmith.budget import rules
from gptsmith.budget.estimate import Budget, Estimate
from gptsmith.budget.machine import Machine
from gptsmith.budget.scaling_law import ScalingLaw
from gptsmith.console import Text
from gptsmith.model.flops import parameters


def about(machine: Machine, chosen: Estimate) -> str:
    """The machine, and how much of it a step uses."""
    peak, share = machine.cluster.peak, machine.share(chosen.design.model)
    if not machine.shares:
        return (
            f"{machine.name}, an estimate: {peak / 1e12:,.0f} TFLOP/s each by the data sheet, of "
            f"which a step of this model is assumed to reach {share:.0%}"
        )
    return (
        f"{machine.name}: {peak / 1e9:,.0f} GFLOP/s in matrix products, of which a step of this "
        f"model reaches {share:.0%}; memory {machine.cluster.memory / 1e9:,.0f} GB/s"
    )


def table(
    found: Sequence[Estimate], chosen: Estimate, machine: Machine, price_per_hour: float | None
) -> Table:
    """A column for each run, so that it fits a terminal; the chosen one is marked."""
    rows: dict[str, Callable[[Estimate], str]] = {
        "": lambda each: "*" if each is chosen else "",
        "layers x width": lambda each: f"{each.design.model.n_layer} x {each.design.model.n_embd}",
        "parameters": lambda each: short(parameters(each.design.model)),
        "tokens": lambda each: short(each.design.tokens),
        "batch, tokens": lambda each: short(each.design.batch_tokens),
        "micro-batch": lambda each: (
            f"{each.design.batch_size} x {each.design.model.context_length}"
        ),
        "peak rate": lambda each: f"{each.design.learning_rate:g}",
        "tokens/s": lambda each: short(each.tokens_per_second),
        "time": lambda each: duration(each.seconds),
        "memory": lambda each: file_size(each.memory),
        "disk": lambda each: file_size(each.disk),
    }
    if price_per_hour:
        rows["cost"] = lambda each: f"{_cost(each, machine, price_per_hour):,.2f}"
    rows["loss"] = expected
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for name, cell in rows.items():
        grid.add_row(*map(Text, [name, *map(cell, found)]))
    for column in grid.columns[1:]:
        column.justify = "right"
    return grid


def as_json(
    found: Sequence[Estimate],
    chosen: Estimate,
    machine: Machine,
    price_per_hour: float | None,
    remarks: Sequence[str],
) -> str:
    """The same runs and remarks for a program; the chosen run is an index."""
    runs = [
        {
            "depth": each.design.depth,
            "parameters": parameters(each.design.model),
            "vocab_size": each.design.model.vocab_size,
            "steps": each.design.steps,
            "tokens": each.design.tokens,
            "tokens_per_parameter": each.design.tokens_per_parameter,
            "share_of_peak": machine.share(each.design.model),
            **{f.name: getattr(each, f.name) for f in fields(each) if f.name != "design"},
            **({"cost": _cost(each, machine, price_per_hour)} if price_per_hour else {}),
            "recipe": each.design.recipe(),
        }
        for each in found
    ]
    about = {
        "machine": machine.name,
        "flops_per_second": machine.cluster.peak,
        "memory_bytes_per_second": machine.cluster.memory,
    }
    return json.dumps(
        {**about, "runs": runs, "chosen": found.index(chosen), "remarks": remarks},
        indent=2,
        ensure_ascii=False,
    )


def _cost(each: Estimate, machine: Machine, price_per_hour: float) -> float:
    return price_per_hour * machine.ranks * each.seconds / 3600


def expected(each: Estimate) -> str:
    """The expected loss with its error; a dash where none is known."""
    if each.loss is None or each.loss_error is None:
        return "-"
    return f"{each.loss:.3f} ±{each.loss_error:.0%}"


def remarks(chosen: Estimate, budget: Budget, law: ScalingLaw | None) -> Iterator[str]:
    """Why this run, and what limits it."""
    d = chosen.design
    ratio = f"{d.tokens_per_parameter:,.1f} tokens per parameter"
    wanted = f"the rule is {rules.TOKENS_PER_PARAMETER}"
    if budget.corpus_tokens is not None:
        epochs = d.tokens / budget.corpus_tokens
        read = "the corpus is read {:.1f} times" if epochs >= 1 else "{:.0%} of the corpus is read"
        most = f", at most {rules.MAX_EPOCHS} times" if epochs >= 1 else ""
        yield f"* {ratio} ({wanted}); {read.format(epochs)}{most}"
    else:
        yield f"* {ratio} ({wanted})"
    if budget.parameters is not None and 2 * parameters(d.model) < budget.parameters:
        yield (
            f"{short(budget.parameters)} parameters do not fit: this is the largest model that "
            f"does, with at most {rules.MAX_DEPTH} layers"
        )
    if budget.tokens is not None and budget.tokens < d.batch_tokens:
        yield (
            f"--tokens {budget.tokens:,} is less than one step, which is planned: "
            f"{d.batch_tokens:,}"
        )
    if budget.vocab_size is None:
        size, tokenizer = rules.vocabulary(d.depth)
        yield f"vocabulary {size:,}: gptsmith prepare SOURCE --tokenizer {tokenizer} --out CORPUS"
    if d.checkpointing:
        yield "activation checkpointing, because of the memory: a third more time"
    if d.sharded:
        yield (
            "the model is divided among the devices (train.shard), because of the memory: each "
            "micro-batch moves the weights twice and the gradients once"
        )
    if law is None:
        probe = "--probe 60s" if budget.vocab_size else "--data CORPUS --probe 60s"
        yield (
            "loss: no scaling law is known for this corpus"
            + ("" if budget.corpus_tokens is None else f"; {probe} fits one")
        )
    elif chosen.loss is None:
        yield "loss: this run is outside the sizes that the scaling law was fitted to"


def summary(chosen: Estimate, machine: Machine) -> str:
    """The run in one line."""
    text = (
        f"{short(parameters(chosen.design.model))} parameters, {short(chosen.design.tokens)} "
        f"tokens; on {machine.name} about {duration(chosen.seconds)}, {file_size(chosen.memory)}"
    )
    return text if chosen.loss is None else f"{text}, loss {expected(chosen)}"


def short(number: float) -> str:
    """Three digits: 512, 4,096, 12.3M, 1.5B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e5, "k")):
        if number >= limit:
            size = 1e3 if unit == "k" else limit
            return f"{_three_digits(number / size)}{unit}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Two digits or three: 45 s, 29 min, 2.5 h, 12 days."""
    for limit, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * limit:
            return f"{_three_digits(seconds / limit)} {unit}"
    return f"{seconds:.0f} s"


def _three_digits(x: float) -> str:
    """Three digits, or all of those before the point: 1.5, 12.3, 1,157; never 1.16e+03."""
    return f"{x:.3g}" if x < 999.5 else f"{x:,.0f}"
