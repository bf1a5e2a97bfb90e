"""Tuning a trained model to tell classes of text apart; `classify` is the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from rich.console import Console

from gptsmith.data.classification import (
    EncodedTexts,
    LabelledRows,
    LabelledSet,
    encode_labelled,
    load_labelled,
)
from gptsmith.data.options import LabelledConfig
from gptsmith.evaluate import classification as measure
from gptsmith.evaluate.classification_plots import draw_confusion, draw_history
from gptsmith.files import write_json, write_text
from gptsmith.model.classifier import GPTClassifier
from gptsmith.recipes import finetune, loop, options
from gptsmith.recipes.finetune import FinetuneConfig
from gptsmith.recipes.options import EvalConfig, TrainConfig
from gptsmith.recipes.report import write_report
from gptsmith.run import Run
from gptsmith.train import runtime
from gptsmith.train.loss import classification_loss
from gptsmith.train.monitor import read_events

# Left in the run folder by the test at the end; pictures as .png and .pdf.
RESULTS, PREDICTIONS = "test.json", "test-predictions.jsonl"
CONFUSION, HISTORY = "confusion", "history"
SEEN = 256  # training texts that are measured beside the validation texts, to show over-fitting


class ClassifyConfig(FinetuneConfig, LabelledConfig):
    """Tune a trained model to name the class of a text."""

    default_epochs: ClassVar[float] = 4

    trained: Literal["head", "last-block", "all"] | None = None
    """What is trained: the new head, head + last block + final norm (default), or all weights; with
    --lora.rank, head and adapters."""
    context_length: int | None = Field(None, ge=1)
    """Tokens of a text; what is longer is cut at its end (default: the model's context)."""
    texts_per_step: int = Field(32, ge=1)
    """Texts of one optimizer step; a multiple of train.batch_size, and more than it, because
    micro-batches of similar length need little padding."""
    train: TrainConfig = TrainConfig(batch_size=16, compile="off")
    eval: EvalConfig = EvalConfig(interval=50)


def main(argv: Sequence[str], started: float | None = None) -> int:
    """`gptsmith finetune classify [RECIPE.yaml] --from RUN --data FILE --out RUN2`."""
    return options.command("finetune classify", ClassifyConfig, classify, argv, started)


def classify(config: ClassifyConfig, started: float | None = None) -> int:
    """Tune as the config says, then test; returns the exit code, 0 or loop.STOPPED.

    started: time.perf_counter() from which `seconds` counts. Raises ValueError for data, a run or a
    configuration that cannot be used, before anything is written.
    """
    if config.eval.tasks:
        raise ValueError("--eval.tasks asks a language model; a classifier answers no questions")
    data = load_labelled(config)
    source = finetune.origin(config)
    config = choose_trained(config, source.model_config.n_layer)
    begin = finetune.start(config, source, labels=data.labels)
    model, tokenizer = begin.model, begin.tokenizer
    assert isinstance(model, GPTClassifier)
    labels, context = data.labels, finetune.longest(config.context_length, begin)
    pad_id = begin.pad_id
    train, val, held_out = (
        encode_labelled(tokenizer, part, labels, context)
        for part in (data.train, data.val, data.test)
    )
    T = max(map(len, train.ids))
    samples = LabelledRows(
        train, T, config.train.seed, pad_id,
        step=config.texts_per_step, documents=not model.mask.facts.inside_causal,
    )  # fmt: skip
    config, plan, notes = finetune.resolve(_in_texts(config, T), begin, samples)
    notes[2:2] = data.notes
    if cut := train.cut + val.cut + held_out.cut:
        notes.insert(2, f"{cut:,} texts are longer than {context} tokens and were cut at the end")
    arithmetic = runtime.choose_precision(config.train.precision, model.score.weight.device)

    def scores(texts: EncodedTexts) -> measure.Scores:
        log_p = measure.log_probabilities(model, texts.ids, arithmetic, pad_id)
        return measure.score(labels, log_p, texts.classes)

    def assess(tokens: int | None) -> Mapping[str, float | int | None]:
        share = 1.0 if tokens is None else tokens / val.tokens
        unseen, seen = scores(val.take(round(share * len(val.ids)))), scores(train.take(SEEN))
        return {
            "val_loss": unseen.loss, "accuracy": unseen.accuracy, "macro_f1": unseen.macro_f1,
            "sample_loss": seen.loss, "sample_accuracy": seen.accuracy,
        }  # fmt: skip

    run = finetune.create(
        config, begin, source, corpus=data.fingerprint,
        fixed=("context_length", "trained", "texts_per_step"),
    )  # fmt: skip
    task = loop.Task(model, classification_loss, samples, assess, val.tokens)
    code = loop.train(run, task, config, plan, notes, started)
    if code == 0:
        test(run, data, held_out, config, pad_id)
    return code


def choose_trained(config: ClassifyConfig, n_layer: int) -> ClassifyConfig:
    """Turn `trained` into patterns of what is frozen, beside those that are given.

    ValueError when LoRA and a part are both asked for.
    """
    if config.lora.rank:
        if config.trained:
            raise ValueError(
                f"--trained {config.trained} and --lora.rank {config.lora.rank}: LoRA trains the "
                "head and its adapters; give one of the two"
            )
        return config
    body = ("embedding.*", *(f"blocks.{i}.*" for i in range(n_layer)), "final_norm.*")
    frozen = {"head": body, "last-block": body[:-2], "all": ()}[config.trained or "last-block"]
    if config.trained is None and config.freeze:
        frozen = ()  # the patterns alone say it
    return config.model_copy(update=dict(freeze=tuple(dict.fromkeys((*config.freeze, *frozen)))))


def _in_texts(config: ClassifyConfig, T: int) -> ClassifyConfig:
    """The step's size, which the loop wants in tokens; and no compiling by `auto`, which pays for
    batches of one shape only."""
    train, texts = config.train, config.texts_per_step
    if texts % train.batch_size:
        raise ValueError(
            f"texts_per_step {texts} is not a multiple of train.batch_size {train.batch_size}"
        )
    if train.total_batch_tokens not in (None, texts * T) and not config.resume:
        raise ValueError("train.total_batch_tokens: say --texts-per-step here")
    compiled = "off" if train.compile == "auto" else train.compile
    train = train.model_copy(update=dict(total_batch_tokens=texts * T, compile=compiled))
    return config.model_copy(update=dict(train=train))


def test(
    run: Run, data: LabelledSet, texts: EncodedTexts, config: ClassifyConfig, pad_id: int
) -> None:
    """Measure the finished run on the test split: table, pictures, every prediction, report."""
    model = run.lock().load_model("last", config.train.device, trust_code=True)
    assert isinstance(model, GPTClassifier)
    arithmetic = runtime.choose_precision(config.train.precision, model.score.weight.device)
    log_p = measure.log_probabilities(model, texts.ids, arithmetic, pad_id)
    scores = measure.score(data.labels, log_p, texts.classes)
    name = run.path.resolve().name
    write_json(run.path / RESULTS, scores.fields())
    write_text(run.path / PREDICTIONS, "".join(_predictions(data, log_p)))
    draw_confusion(run.path / CONFUSION, scores, f"{name}, test split")
    draw_history(run.path / HISTORY, read_events(run.metrics), name)
    summary = (
        f"Test split: accuracy {scores.accuracy:.2%}, macro-F1 {scores.macro_f1:.3f} over "
        f"{len(data.test):,} texts (always the most frequent class: {scores.majority:.2%})"
    )
    lines = [
        "## Test", "", f"{summary}.", "", *measure.markdown(scores), "",
        f"![confusion matrix]({CONFUSION}.png)", "", f"![loss and accuracy]({HISTORY}.png)", "",
        f"Every prediction is in [{PREDICTIONS}]({PREDICTIONS}).", "",
    ]  # fmt: skip
    write_report(run, lines)
    run.close()
    Console().print(measure.table(scores))
    print(summary)


def _predictions(data: LabelledSet, log_p: np.ndarray) -> Iterator[str]:
    """Lines of JSON, in the order of the test split."""
    for row, p in zip(data.test, np.exp(log_p), strict=True):
        found = measure.prediction(data.labels, p)
        yield json.dumps({**row._asdict(), **found}, ensure_ascii=False) + "\n"
