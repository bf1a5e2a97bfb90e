"""Fine-tune a model to classify texts, and evaluate it on the test split."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np

from gptsmith import terminal
from gptsmith.console import Console
from gptsmith.data.classification import (
    EncodedTexts,
    LabelledRows,
    LabelledSet,
    encode_labelled,
    load_labelled,
)
from gptsmith.evaluate import classification as measure
from gptsmith.evaluate.charts import draw_confusion, draw_history
from gptsmith.files import write_json, write_text
from gptsmith.model.classifier import GPTClassifier
from gptsmith.recipes import finetune, loop
from gptsmith.recipes.job import TrainingJob
from gptsmith.recipes.options import ClassifyConfig
from gptsmith.recipes.plan import Note
from gptsmith.recipes.report import write_report
from gptsmith.run import Run
from gptsmith.train import distributed
from gptsmith.train.loss import classification_loss
from gptsmith.train.monitor import read_events
from gptsmith.train.runtime import Runtime

# Files that the test writes to the run folder; figures as .png and .pdf.
RESULTS, PREDICTIONS = "test.json", "test-predictions.jsonl"
CONFUSION, HISTORY = "confusion", "history"
NUM_TRAIN_TEXTS = 256  # training texts to evaluate as well, to show overfitting


def classify(config: ClassifyConfig, started: float | None = None) -> int:
    """`gptsmith finetune classify`: train, then test; the exit code, 0 or loop.STOPPED.

    started: time.perf_counter() at which `seconds` begins. Raises ValueError for data, a run or a
    configuration that cannot be used, before anything is written.
    """
    if config.eval.tasks:
        raise ValueError("--eval.tasks needs a language model; a classifier answers no questions")
    data = load_labelled(config)
    base = finetune.base_run(config)
    config = freeze_untrained(config, base.model_config.n_layer)
    prepared = finetune.prepare(config, base, labels=data.labels)
    model, tokenizer, pad_id = prepared.model, prepared.tokenizer, prepared.pad_id
    assert isinstance(model, GPTClassifier)
    context = finetune.max_length(config.context_length, prepared.model.config)
    train, val, test_texts = (
        encode_labelled(tokenizer, part, data.labels, context)
        for part in (data.train, data.val, data.test)
    )
    T = max(map(len, train.ids))
    rows = LabelledRows(
        train, T, config.train.seed, pad_id,
        step=config.texts_per_step, documents=not model.mask.is_causal,
    )  # fmt: skip
    config = finetune.with_samples_per_step(config, ["texts_per_step"], T, len(train.ids))
    plan = finetune.resolve(config, prepared, rows)
    notes = list(data.notes)
    if truncated := train.truncated + val.truncated + test_texts.truncated:
        notes.append(f"{truncated:,} texts are longer than {context} tokens and were truncated")

    def scores(texts: EncodedTexts) -> measure.Scores:
        log_p = measure.log_probabilities(model, texts.ids, plan.runtime.precision, pad_id)
        return measure.score(data.labels, log_p, texts.classes)

    def evaluate(tokens: int | None) -> Mapping[str, float | int | None]:
        share = 1.0 if tokens is None else tokens / val.tokens
        on_val = scores(val.take(round(share * len(val.ids))))
        on_train = scores(train.take(NUM_TRAIN_TEXTS))
        return {
            "val_loss": on_val.loss, "accuracy": on_val.accuracy, "macro_f1": on_val.macro_f1,
            "sample_loss": on_train.loss, "sample_accuracy": on_train.accuracy,
        }  # fmt: skip

    run = finetune.create_run(
        plan, prepared, corpus=data.fingerprint,
        fixed=("context_length", "trained", "texts_per_step"),
    )  # fmt: skip
    job = TrainingJob(model, classification_loss, rows, evaluate, val.tokens)
    plan = plan.with_notes(Note("data", text) for text in notes)
    code = loop.train(run, job, plan, started)
    if code == 0 and distributed.rank() == 0:
        with distributed.alone():
            test(run, data, test_texts, plan.runtime, pad_id)
    return code


def freeze_untrained(config: ClassifyConfig, n_layer: int) -> ClassifyConfig:
    """Add the parameters that `trained` excludes to the patterns in `freeze`.

    ValueError if `trained` is given with LoRA.
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
        frozen = ()  # the given patterns suffice
    return config.model_copy(update=dict(freeze=tuple(dict.fromkeys((*config.freeze, *frozen)))))


def test(run: Run, data: LabelledSet, texts: EncodedTexts, runtime: Runtime, pad_id: int) -> None:
    """Evaluate the finished run on the test split: table, figures, all predictions, report."""
    model = run.lock().load_model("last", runtime.device, trust_code=True)
    assert isinstance(model, GPTClassifier)
    log_p = measure.log_probabilities(model, texts.ids, runtime.precision, pad_id)
    scores = measure.score(data.labels, log_p, texts.classes)
    name = run.path.resolve().name
    write_json(run.path / RESULTS, scores.fields())
    write_text(run.path / PREDICTIONS, "".join(_predictions(data, log_p)))
    draw_confusion(run.path / CONFUSION, scores, f"{name}, test split")
    draw_history(run.path / HISTORY, read_events(run.metrics), name)
    summary = f"Test split: {measure.summary(scores)}"
    lines = [
        "## Test", "", f"{summary}.", "", *measure.markdown(scores), "",
        f"![confusion matrix]({CONFUSION}.png)", "", f"![loss and accuracy]({HISTORY}.png)", "",
        f"Every prediction is in [{PREDICTIONS}]({PREDICTIONS}).", "",
    ]  # fmt: skip
    write_report(run, lines)
    run.close()
    Console().print(measure.table(scores))
    terminal.say(summary)


def _predictions(data: LabelledSet, log_p: np.ndarray) -> Iterator[str]:
    """JSON lines, in the order of the test split."""
    for row, p in zip(data.test, np.exp(log_p), strict=True):
        prediction = measure.prediction(data.labels, p)
        yield json.dumps({**row._asdict(), **prediction}, ensure_ascii=False) + "\n"
