"""`gptsmith evaluate RUN`: how well a model predicts text, answers questions and follows
instructions, beside another run if one is named."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator
from rich.console import Console

from gptsmith import files, settings
from gptsmith.commands.weights import WeightOptions
from gptsmith.conversation import ChatTemplate
from gptsmith.data.batches import validation_batches
from gptsmith.data.documents import Reader
from gptsmith.data.shards import Corpus
from gptsmith.data.stream import text_stream
from gptsmith.evaluate import choices, gsm8k, judge, perplexity, results, skills, tasks, text
from gptsmith.evaluate.endpoint import JudgeOptions
from gptsmith.evaluate.results import Result
from gptsmith.flags import nearest
from gptsmith.model.gpt import GPTModel
from gptsmith.model.leakage import first_scored
from gptsmith.run import Run, is_run
from gptsmith.train.loss import score_from
from gptsmith.train.precision import Name, Precision, choose
from gptsmith.train.trackers import flatten

SEED = 0  # of the questions on skills: the same ones each time
NAMES = ("perplexity", "skills", *tasks.NAMES, "gsm8k", "text", "judge")


class EvaluateOptions(WeightOptions):
    """What to measure, and on what."""

    tasks: tuple[str, ...] = ("perplexity",)
    """perplexity on a corpus or text; skills: held-out items of the built-in chat set; hellaswag,
    arc_easy, arc_challenge, piqa, winogrande, lambada, mmlu: multiple choice; gsm8k; text and
    judge: the answers that `finetune instruct` wrote. With commas, or repeated."""
    limit: int | None = Field(None, ge=1)
    """Only so many questions of a task, the first; perplexity: windows, evenly from the whole."""
    compare: Path | None = None
    """Another run, measured in the same way; a chart shows both."""
    out: Path | None = None
    """Write the results here, JSON; beside it every item (.items.jsonl) and a chart."""
    data: str | None = None
    """perplexity: a prepared corpus (its validation split is scored), or any text that `prepare`
    takes (all of it is). Default: the corpus that the run was trained on."""
    window: int | None = Field(None, ge=2)
    """perplexity: tokens that the model sees at once (default: its context, at most 2048)."""
    stride: int | None = Field(None, ge=1)
    """perplexity: tokens from one window to the next (default: a window, they are disjoint); each
    token is scored once, behind at least window - stride others."""
    batch_size: int | None = Field(None, ge=1)
    """perplexity: windows that go through the model at once (default: 8192 tokens)."""
    precision: Name = "auto"
    """perplexity: number format of matrix products; auto takes that of the run's training."""
    task_data: Path | None = None
    """File or folder of a task's questions (default: $GPTSMITH_DATA, else the Hub)."""
    shots: int | None = Field(None, ge=0)
    """Worked examples before a question (default: 5 for mmlu and gsm8k, else none)."""
    per_skill: int = Field(50, ge=1)
    """skills: questions for each."""
    responses: Path | None = None
    """text, judge: file of answers with their references (default: the run's responses.json)."""
    judge: JudgeOptions = JudgeOptions()

    @field_validator("tasks", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) else value
        names = [name.strip() for part in parts for name in str(part).split(",")]
        for name in names:
            if name not in NAMES:
                near = nearest(name, NAMES)
                hint = f"did you mean {near!r}?" if near else f"there are {', '.join(NAMES)}"
                raise ValueError(f"no task {name!r}: {hint}")
        return tuple(dict.fromkeys(names))


def main(argv: list[str]) -> None:
    options = settings.load(
        EvaluateOptions,
        argv,
        prog="gptsmith evaluate",
        description="Measure a trained model.",
        positional="run",
    )
    runs = {options.run.name: Run.open(options.run)}
    if options.compare is not None:
        if options.compare.resolve() == options.run.resolve():
            raise ValueError(f"--compare {options.compare} is the run itself: name another")
        same = options.compare.name == options.run.name
        runs[str(options.compare) if same else options.compare.name] = Run.open(options.compare)
    found = {name: measure(options, run) for name, run in runs.items()}
    own = next(iter(found.values()))
    if len(runs) > 1 and "judge" in options.tasks:
        first, second = (_responses(options, run) for run in runs.values())
        own.append(judge.compare(first, second, options.judge, cache=_verdicts(options)))
    console = Console(width=None if sys.stdout.isatty() else 120)
    if len(runs) > 1:
        console.print(results.comparison(found))
    elif shown := [r for r in own if r.task not in ("perplexity", "skills")]:
        console.print(results.table(shown))
    for name, some in found.items():
        for note in dict.fromkeys(note for result in some for note in result.notes):
            print(f"{name}: {note}" if len(found) > 1 else note, file=sys.stderr)
    write(options, found)


def measure(options: EvaluateOptions, run: Run) -> list[Result]:
    """The results of all tasks on one run, in the order asked for."""
    model: GPTModel | None = None
    if run.model_config.labels:
        raise ValueError(f"{run.path} is a classifier: gptsmith classify {run.path} --file TEXTS")
    if set(options.tasks) - {"text", "judge"}:
        model = options.load(run)
    found = []
    for name in options.tasks:
        if name == "text":
            found.append(text.score(_responses(options, run)))
        elif name == "judge":
            cache = _verdicts(options)
            found.append(judge.score(_responses(options, run), options.judge, cache=cache))
        else:
            assert model is not None
            found.append(_ask(name, options, run, model))
    return found


def _ask(name: str, options: EvaluateOptions, run: Run, model: GPTModel) -> Result:
    """Put one task to the model."""
    if name == "perplexity":
        return _perplexity(options, run, model)
    if name == "skills":
        return _skills(options, run, model)
    if name == "gsm8k":
        return gsm8k.score(
            model, run.tokenizer, run.template, options.task_data, options.limit, options.shots
        )
    questions = tasks.load(name, options.task_data, options.limit, options.shots)
    return choices.score(model, run.tokenizer, name, questions, progress=True)


def write(options: EvaluateOptions, found: Mapping[str, Sequence[Result]]) -> None:
    """--out: results of the run by task, those of the other under `compare`; items; chart."""
    stem = options.out.with_suffix("") if options.out else None
    if stem is None and options.compare is not None:
        stem = options.run / f"against-{options.compare.resolve().name}"
    if stem is None:
        return
    own, *other = ({r.task: r.fields() for r in some} for some in found.values())
    if options.out is not None:
        also = {"compare": {"run": str(options.compare), **other[0]}} if other else {}
        files.write_json(options.out, own | also)
        items = [
            {"run": name, "task": r.task, **item}
            for name, some in found.items()
            for r in some
            for item in r.items
        ]
        if items:
            lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            files.write_text(f"{stem}.items.jsonl", "".join(lines))
    results.draw(stem, found)
    print(f"{stem}.png, {stem}.pdf: the same as a picture")


def _responses(options: EvaluateOptions, run: Run) -> list[text.Entry]:
    return text.read_responses(options.responses or run.path)[: options.limit]


def _verdicts(options: EvaluateOptions) -> Path:
    """Where the judge's verdicts are kept, so that a rerun asks nothing twice."""
    return options.run / "verdicts"


def _skills(options: EvaluateOptions, run: Run, model: GPTModel) -> Result:
    if run.template is None:
        scores = skills.score_base(model, run.tokenizer, SEED, options.per_skill)
    else:
        template = ChatTemplate(run.template, run.tokenizer)
        scores = skills.score_chat(model, run.tokenizer, template, SEED, options.per_skill)
    print(f"{run.path} on {options.per_skill} questions a skill that training never shows")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(skills.table(scores))
    means = {name: skills.mean(column) for name, column in scores.items()}
    return Result("skills", options.per_skill, means, {}, details={"by_skill": scores})


def _perplexity(options: EvaluateOptions, run: Run, model: GPTModel) -> Result:
    arithmetic, why = _arithmetic(options, run)
    c = run.model_config
    T = options.window or min(c.context_length, 2048)
    if T > c.context_length:
        raise ValueError(f"--window {T} is more than the model's context of {c.context_length}")
    stride = options.stride or T
    if stride > T:
        raise ValueError(f"--stride {stride} is more than the window of {T}: it would skip tokens")
    start = first_scored(model.mask, T, c.n_head, c.n_layer)
    shards, what = _text(options, run)
    eos = run.tokenizer.eos_id if run.config.get("document_mask") else None
    B, limit = options.batch_size or max(1, 8192 // T), options.limit and options.limit * stride
    batches = validation_batches(shards, T, B, eos, limit, stride)
    scored = (score_from(batch, start) for batch in batches)
    token_bytes = torch.from_numpy(run.tokenizer.token_bytes())
    scores = perplexity.evaluate(model, scored, arithmetic, token_bytes)
    how = "" if stride == T else f", every {stride:,}"
    print(f"{run.path} on {what}, {scores.tokens:,} tokens, windows of {T:,}{how}")
    print(f"  precision     {arithmetic.name}, {why}")
    print(f"  loss          {scores.loss:.4f} nats per token")
    print(f"  perplexity    {scores.perplexity:,.2f}")
    if scores.bits_per_byte is not None:
        print(f"  bits per byte {scores.bits_per_byte:.4f}")
    print(f"  next token    {scores.top1:.1%} guessed first, {scores.top5:.1%} in five guesses")
    values = {name: value for name, value in scores.fields().items() if value is not None}
    return Result("perplexity", int(values.pop("tokens")), values, {})


def _text(options: EvaluateOptions, run: Run) -> tuple[Sequence[np.ndarray], str]:
    """Streams of tokens to be predicted, and what they are."""
    data = options.data
    if data is not None and not Corpus.is_at(data):
        if is_run(Path(data)):
            raise ValueError(f"--data {data} is a run: give a corpus or text")
        reader = Reader(skip=True)
        stream = text_stream(data, run.tokenizer, reader)
        for kind, places in reader.left_out.items():
            print(f"{data}: left out {len(places):,} x {kind}", file=sys.stderr)
        return [stream], data
    tuned = data is None and "from" in run.config
    data = data or run.config.get("data")
    if tuned or not isinstance(data, str):
        raise ValueError(
            f"{run.path} was not trained on a prepared corpus: give --data, or other --tasks"
        )
    try:
        corpus = Corpus.open(data)
    except FileNotFoundError as error:
        if options.data is not None:
            raise
        raise FileNotFoundError(f"{run.path} was trained on {error}; or give --data") from None
    if corpus.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise ValueError(
            f"{corpus.path} was made with another tokenizer than {run.path}: give the text itself "
            f"as --data, or prepare it with --tokenizer {run.path / 'tokenizer.json'}"
        )
    return corpus.val, f"the validation split of {corpus.path}"


def _arithmetic(options: EvaluateOptions, run: Run) -> tuple[Precision, str]:
    """The precision to measure in, and why that one."""
    device = options.where()
    if options.precision != "auto":
        return choose(options.precision, device), "as asked for"
    trained = flatten(run.config).get("train.precision", "fp32")
    if trained == "fp16" and device.type == "cpu":
        return choose("fp32", device), "because the fp16 of its training is for GPUs"
    return choose(trained, device), "as in training"
