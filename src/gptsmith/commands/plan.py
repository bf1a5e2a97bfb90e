"""`gptsmith plan`: what to train with a budget, what it takes, and what it will reach."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from gptsmith import files, terminal
from gptsmith.config import Section, load_config

if TYPE_CHECKING:
    from gptsmith.budget.estimate import Budget
    from gptsmith.budget.machine import Machine
    from gptsmith.data.shards import Corpus

_NUMBER = r"(\d+\.?\d*|\.\d+)\s*"
_TIMES = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
_SIZES = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_COUNTS = {"k": 10**3, "m": 10**6, "b": 10**9}


def _seconds(text: str) -> float:
    text = text.strip().lower()
    part = rf"{_NUMBER}(min|[smhd])\s*"
    seconds = sum(float(n) * _TIMES[unit] for n, unit in re.findall(part, text))
    if re.fullmatch(_NUMBER, text):
        seconds = float(text)
    elif not re.fullmatch(f"(?:{part})+", text):
        seconds = 0
    if not seconds:
        raise ValueError("should be a number with a unit, such as 90s, 30m, 1h30m, 2h or 1d")
    return seconds


def _bytes(text: str) -> int:
    found = re.fullmatch(rf"{_NUMBER}(?:([kmgt])i?)?b?", text.strip().lower())
    if found is None or not float(found[1]):
        raise ValueError("should be a number with a unit, such as 800M or 4G")
    return int(float(found[1]) * _SIZES.get(found[2] or "", 1))


def _with_unit(value: object) -> object:
    """The number that 10M, 2.5k or 1B stands for; all else as it is."""
    found = isinstance(value, str) and re.fullmatch(rf"{_NUMBER}([kmb])", value.strip().lower())
    return round(float(found[1]) * _COUNTS[found[2]]) if found else value


def _check_time(text: str) -> str:
    _seconds(text)
    return text


def _check_memory(text: str) -> str:
    _bytes(text)
    return text


Time = Annotated[str, AfterValidator(_check_time)]
Memory = Annotated[str, AfterValidator(_check_memory)]
Count = Annotated[int, BeforeValidator(_with_unit), Field(ge=1)]


class PlanOptions(Section):
    """Say what to train with a budget, what it takes on this machine or another, and what loss it
    will reach; write a recipe for `gptsmith pretrain`. Without a budget: half an hour."""

    data: Path | None = None
    """Corpus made by `gptsmith prepare`."""
    corpus_tokens: Count | None = None
    """Training tokens of a corpus that is not here (default: no limit)."""
    time: Time | None = None
    """Budget: how long the command may take, such as 30m, 1h30m, 2h, 1d."""
    tokens: Count | None = None
    """Budget: training tokens, such as 1e9 or 300M."""
    params: Count | None = None
    """Budget: parameters of the model, about, such as 1e7 or 10M."""
    memory: Memory | None = None
    """Memory of this machine or of each device that may be used, such as 4G (default: all). Alone,
    it is the budget: the largest model that fits."""
    price_per_hour: float | None = Field(None, gt=0)
    """Price of a device, or of this machine, for an hour, in any currency; adds the cost."""
    device: str | None = None
    """Plan for a GPU that is not here, from its data sheet: h100, h200, a100, l40s, l4, a10g,
    rtx5090, rtx4090, rtx3090, v100, t4."""
    count: int = Field(1, ge=1, le=1024)
    """How many of them; more than 8 are in machines of 8. Each holds the whole model; where
    that does not fit, a part of it (train.shard)."""
    probe: Time | None = None
    """Train small models on --data here for so long (60s), to expect the loss on a text for which
    no scaling law is known."""
    out: Path | None = None
    """Recipe to write (.yaml)."""
    format: Literal["text", "json"] = "text"
    """What to print: a table with remarks, or the same as one JSON object, with times in seconds
    and sizes in bytes."""

    @model_validator(mode="after")
    def _check(self) -> PlanOptions:
        given = [name for name in ("time", "tokens", "params") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given: give one budget")
        if self.data is not None and self.corpus_tokens is not None:
            raise ValueError(
                "data and corpus_tokens are both given: the corpus says how long it is"
            )
        if self.count > 1 and self.device is None:
            raise ValueError(f"count {self.count} needs device: this machine is one")
        if self.probe is not None and self.data is None:
            raise ValueError("probe needs data: it trains on that corpus")
        if self.out is not None and self.out.suffix not in (".yaml", ".yml"):
            raise ValueError(f"out {str(self.out)!r} should end with .yaml")
        return self


def main(argv: Sequence[str], started: float | None = None) -> int:
    """started: time.perf_counter() at which the command began, default the start of this process;
    `pretrain` is taken to need as long until it trains."""
    options = load_config(PlanOptions, argv, prog="gptsmith plan")
    if options.out is not None and options.out.exists():
        raise FileExistsError(f"{options.out} exists: give another --out, or remove it")
    if options.out is not None and not options.out.parent.is_dir():
        raise FileNotFoundError(f"--out {options.out}: no such folder")
    from gptsmith.budget import devices, estimate, report
    from gptsmith.budget.machine import this_machine
    from gptsmith.budget.scaling_law import LAWS
    from gptsmith.console import Console
    from gptsmith.data.shards import Corpus
    from gptsmith.run import layout
    from gptsmith.train.monitor import command_start

    corpus = Corpus.open(options.data) if options.data is not None else None
    law = LAWS.get(corpus.fingerprint) if corpus is not None else None
    memory = _bytes(options.memory) if options.memory else None
    budget = _budget(options, corpus)
    began = command_start() if started is None else started
    if options.device is not None:
        machine = devices.published(options.device, options.count, memory)
    else:
        here = estimate.with_small_steps(this_machine(began, memory), budget)
        machine = estimate.calibrated(here, budget)
    if options.probe is not None:
        from gptsmith.budget.probe import probe

        assert corpus is not None
        if options.device is not None:  # the probe trains on this machine all the same
            here = estimate.with_small_steps(this_machine(began), budget)
        law = probe(corpus, _seconds(options.probe), here)
    found = estimate.candidates(budget, machine, law)
    chosen = estimate.choose(found, budget)
    near = [each for each in found if abs(each.design.depth - chosen.design.depth) <= 2]
    price = options.price_per_hour
    remarks = list(report.remarks(chosen, budget, law))
    if options.format == "json":
        terminal.write(report.as_json(near, chosen, machine, price, remarks))
    else:
        terminal.say(report.about(machine, chosen))
        Console().print(report.table(near, chosen, machine, price))
        for line in remarks:
            terminal.say(line)
    if options.out is not None:
        recipe = chosen.design.recipe()
        if machine.device_type == "cuda":
            recipe["pad_vocab_multiple"] = 64
        if options.data is not None:
            run = Path("runs") / f"{options.data.resolve().name}-{chosen.design.depth}"
            recipe = {"data": str(options.data), "out": str(run), **recipe}
        header = f"# gptsmith plan: {report.summary(chosen, machine)}\n"
        files.write_text(options.out, header + layout.yaml_text(recipe))
        terminal.note(f"wrote {options.out}; next: {_next(options, machine)}")
    return 0


def _next(options: PlanOptions, machine: Machine) -> str:
    """The command that trains by the recipe."""
    ranks, per_machine = machine.ranks, machine.cluster.per_machine
    words = ["gptsmith", "pretrain", shlex.quote(str(options.out))]
    words += [] if options.data is not None else ["--data", "CORPUS", "--out", "RUN"]
    if ranks > per_machine:
        nodes = str(ranks // per_machine)
        several = ["--nnodes", nodes, "--nproc-per-node", str(per_machine)]
        several += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500"]
        words = ["on each machine,", "torchrun", *several, "-m", *words]
    elif ranks > 1:
        words = ["torchrun", "--nproc-per-node", str(ranks), "-m", *words]
    return " ".join(words)


def _budget(options: PlanOptions, corpus: Corpus | None) -> Budget:
    from gptsmith.budget.estimate import Budget

    named = (options.time, options.tokens, options.params, options.memory)
    time = options.time or ("30m" if not any(named) else None)
    return Budget(
        seconds=_seconds(time) if time else None,
        tokens=options.tokens,
        parameters=options.params,
        corpus_tokens=options.corpus_tokens if corpus is None else corpus.train_tokens,
        vocab_size=None if corpus is None else corpus.tokenizer.vocab_size,
    )
