"""Evaluation tasks as jobs, which are prepared before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gptsmith.config import flatten
from gptsmith.data.classification import encode_labelled
from gptsmith.data.dataset import validation_batches, validation_windows
from gptsmith.data.labelled import read_labelled
from gptsmith.data.options import ReadOptions
from gptsmith.data.report import ReadReport
from gptsmith.data.shards import Corpus
from gptsmith.data.sources import encode_source
from gptsmith.evaluate import (
    accuracy,
    classification,
    gsm8k,
    judge,
    multiple_choice,
    perplexity,
    reference_metrics,
    skills,
)
from gptsmith.evaluate.options import EvaluateOptions
from gptsmith.evaluate.result import Result
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.gpt import GPTModel
from gptsmith.model.target_leakage import first_target
from gptsmith.progress import progress
from gptsmith.recognize import is_corpus
from gptsmith.run import Run, is_run
from gptsmith.tokenizer import DocumentTokens
from gptsmith.train.runtime import Precision, choose_precision

QUANTIZABLE = ("perplexity", "skills", "gsm8k")  # tasks that the kernels can compute
WITH_EXAMPLES = ("gsm8k", *(t.name for t in multiple_choice.TASKS.values() if t.shots))
SEED = 0  # of the questions on skills: the same ones each time

Job = Callable[[], Result]


def names(options: EvaluateOptions, run: Run) -> tuple[str, ...]:
    """The tasks of the options, by default the one that suits the run."""
    labels = run.model_config.labels
    found = options.tasks or (("classify",) if labels else ("perplexity",))
    if labels and found != ("classify",):
        raise ValueError(
            f"{run.path} is a classifier, which has no task but classify: omit --tasks, or give a "
            "language model"
        )
    if not labels and "classify" in found:
        raise ValueError(
            f"{run.path} is a language model without classes: gptsmith finetune classify makes a "
            "classifier of it"
        )
    return found


def prepare(
    options: EvaluateOptions, run: Run, model: Callable[[], GPTModel] | None = None
) -> list[Job]:
    """A job for each task, in the order of the options.

    Questions and texts are read now, so that wrong input is reported before hours of evaluation.
    model: returns the model when the first job needs it; by default it is loaded from the run.
    """
    model = model or cache(lambda: options.load(run))
    found = names(options, run)
    for flag, value, able in (
        ("--quantize", options.quantize, QUANTIZABLE),
        ("--shots", options.shots, WITH_EXAMPLES),
    ):
        if value and (others := [name for name in found if name not in able]):
            raise ValueError(
                f"{flag} {value} is for {', '.join(able)}, not {', '.join(others)}: measure these"
                " without it"
            )
    jobs = [_job(name, options, run, model) for name in found]
    weights = options.quantize or options.dtype
    if weights == "auto":
        return jobs
    return [
        job if name in ("text", "judge") else _with_weights(job, weights)
        for name, job in zip(found, jobs, strict=True)
    ]


def compare_responses(options: EvaluateOptions, runs: Sequence[Run]) -> Result:
    """The judge's comparison of the responses of two runs."""
    first, second = (_responses(options, run) for run in runs)
    return judge.compare(first, second, options.judge, cache=_verdicts(options))


def _job(name: str, options: EvaluateOptions, run: Run, model: Callable[[], GPTModel]) -> Job:
    match name:
        case "perplexity":
            return _perplexity(options, run, model)
        case "classify":
            return _classify(options, run, model)
        case "skills":
            return lambda: skills.score(
                model(), run.tokenizer, run.chat_template, SEED, options.per_skill,
                options.engine_weights,
            )  # fmt: skip
        case "text":
            return partial(reference_metrics.score, _responses(options, run))
        case "judge":
            entries = _responses(options, run)
            judge.Endpoint(options.judge).close()  # checks the options; nothing is sent
            return partial(judge.score, entries, options.judge, cache=_verdicts(options))
        case "gsm8k":
            default = gsm8k.SHOTS if run.template is None else 0
            shots = default if options.shots is None else options.shots
            problems, examples = gsm8k.load(options.task_data, options.limit, shots)
            return lambda: gsm8k.score(
                model(), run.tokenizer, run.template, problems, examples,
                weights=options.engine_weights,
            )  # fmt: skip
        case _:
            report = ReadReport(options.on_error)
            task, questions = multiple_choice.load_task(
                name, options.task_data, options.limit, options.shots,
                report=report, form=options, first_choice=options.first_choice,
            )  # fmt: skip
            return lambda: accuracy.score(model(), run.tokenizer, task, questions, progress=True)


def _with_weights(job: Job, weights: str) -> Job:
    """The job, whose result says what the weights were converted to or rounded to."""

    def measured() -> Result:
        result = job()
        return replace(result, conditions={**result.conditions, "weights": weights})

    return measured


def _responses(options: EvaluateOptions, run: Run) -> list[reference_metrics.Entry]:
    return reference_metrics.read_responses(options.responses or run.path)[: options.limit]


def _verdicts(options: EvaluateOptions) -> Path:
    """Where the judge's verdicts are stored, so that a rerun repeats no request."""
    return options.run / "verdicts"


# --- classification ------------------------------------------------------------------------------


def _classify(options: EvaluateOptions, run: Run, model: Callable[[], GPTModel]) -> Job:
    """Labelled texts, read, truncated and measured as the test split of tuning."""
    if options.data is None:
        raise ValueError(f"{run.path} is a classifier: give labelled texts with --data FILE")
    labels = run.model_config.labels
    report = ReadReport(options.on_error)
    data = Path(options.data)
    rows = []
    for row in read_labelled(data, options, report):
        if row.label in labels:
            rows.append(row)
        else:
            problem = f"label {row.label!r} is none of {run.path}'s ({', '.join(labels)})"
            report.reject("label that the classifier does not have", row.place, problem)
    if not rows:
        raise ValueError(f"{data}: no text with a label of {run.path}'s ({', '.join(labels)})")
    rows = rows[: options.limit]
    context = classification.max_length(run)
    texts = encode_labelled(run.tokenizer, rows, labels, context)
    precision, _ = _precision(options, run)
    notes = [*report.hints, *(f"{data}: {line}" for line in report.lines())]
    if texts.truncated:
        share = texts.truncated / len(rows)
        notes.insert(
            0,
            f"{data}: {texts.truncated:,} of {len(rows):,} texts ({share:.0%}) are truncated to "
            f"{context} tokens",
        )

    def job() -> Result:
        classifier = model()
        assert isinstance(classifier, GPTClassifier)
        B = options.batch_size or 32
        log_p = classification.log_probabilities(classifier, texts.ids, precision, batch_size=B)
        return classification.result(labels, rows, log_p, texts.classes, notes)

    return job


# --- perplexity ----------------------------------------------------------------------------------


def _perplexity(options: EvaluateOptions, run: Run, model: Callable[[], GPTModel]) -> Job:
    if options.quantize and options.precision != "auto":
        raise ValueError(
            f"--precision {options.precision}: with --quantize {options.quantize} there is no"
            " choice: omit --precision"
        )
    precision, why = _precision(options, run)
    c = run.model_config
    T = options.window or min(c.context_length, 2048)
    if T > c.context_length:
        raise ValueError(f"--window {T} is more than the model's context of {c.context_length}")
    stride = options.stride or T
    if stride > T:
        raise ValueError(f"--stride {stride} is more than the window of {T}: it would skip tokens")
    text = _read_text(options, run)
    documents = text.document_tokens if run.config.get("document_mask") else None
    skipped = text.document_tokens.context_only
    B, limit = options.batch_size or max(1, 8192 // T), options.limit and options.limit * stride

    def job() -> Result:
        start = first_target(model().mask, T, c.n_head, c.n_layer)
        batches = validation_batches(
            text.streams, T, B, documents, limit, stride, start, context_only=skipped
        )
        windows = validation_windows(text.streams, T, limit, stride)
        sizes = perplexity.target_bytes(run.tokenizer, text.streams, text.text_bytes, skipped)
        shown = progress(batches, "perplexity", -(-len(windows) // B))
        scores = perplexity.evaluate(model(), shown, precision, sizes, options.quantize)
        weights = model().head_weight.dtype
        name, because = precision.name, why
        if options.quantize:
            name, because = options.quantize, "as requested"
        elif weights != torch.float32 and name == "fp32":  # half-precision weights stay as they are
            name, because = str(weights).removeprefix("torch."), "that of the weights"
        values = {metric: value for metric, value in scores.fields().items() if value is not None}
        conditions = {
            "on": text.name,
            "window": T,
            "stride": stride,
            "precision": name,
            "tokenizer": run.tokenizer.fingerprint[:16],
        }
        items = [
            {"id": f"{shard}:{first}", **sums}
            for (shard, first), sums in zip(windows, scores.windows, strict=True)
        ]
        n = int(values.pop("tokens"))
        return Result(
            "perplexity", n, values, {}, items, details={"precision_reason": because},
            notes=text.notes, conditions=conditions, statistics=perplexity.STATISTICS,
        )  # fmt: skip

    return job


class _Text(NamedTuple):
    """Text to predict: streams of tokens, their document tokens, and its number of UTF-8 bytes."""

    streams: Sequence[np.ndarray]
    document_tokens: DocumentTokens
    text_bytes: int
    name: str
    notes: list[str]


def _read_text(options: EvaluateOptions, run: Run) -> _Text:
    data = options.data
    if data is not None and not is_corpus(Path(data)):
        if is_run(Path(data)):
            raise ValueError(f"--data {data} is a run: give a corpus or text")
        report = ReadReport("skip")
        names = ("text_column", "encoding", "delimiter")
        read_options = ReadOptions(**{name: getattr(options, name) for name in names})
        stream, text_bytes = encode_source(data, run.tokenizer, read_options, report)
        notes = [*report.hints, *(f"{data}: {line}" for line in report.skipped.lines())]
        return _Text([stream], run.tokenizer.special_ids.document, text_bytes, data, notes)
    data = data or run.config.get("data")
    on_corpus = run.stage in ("pretrain", "text")  # the stages that train on a prepared corpus
    if not isinstance(data, str) or (options.data is None and not on_corpus):
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
    text_bytes = int(corpus.manifest["splits"]["val"]["bytes"])
    name = f"the validation split of {corpus.path}"
    return _Text(corpus.val, corpus.document, text_bytes, name, [])


def _precision(options: EvaluateOptions, run: Run) -> tuple[Precision, str]:
    """The precision of the measurement, and why this one."""
    device = options.torch_device()
    if options.precision != "auto":
        return choose_precision(options.precision, device), "as requested"
    trained = flatten(run.config).get("train.precision")
    if trained is None:
        return choose_precision("fp32", device), "that of the weights"
    if trained == "fp16" and device.type == "cpu":
        return choose_precision("fp32", device), "because the fp16 of its training is for GPUs"
    if trained == "fp8":  # a format of training only
        return choose_precision("bf16", device), "as in training's own evaluations"
    return choose_precision(trained, device), "as in training"
