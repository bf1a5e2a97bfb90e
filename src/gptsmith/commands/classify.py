"""`gptsmith classify RUN TEXT...`: the classes of texts, from the command line or a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from gptsmith import files, terminal
from gptsmith.config import load_config
from gptsmith.evaluate.options import ClassifyOptions

if TYPE_CHECKING:
    from gptsmith.data.row import Row

CHUNK = 4096  # texts of a file that are in memory at once

Prediction = dict[str, Any]  # evaluate.classification.prediction
Classify = Callable[[Sequence[str]], list[Prediction]]


def main(argv: Sequence[str]) -> None:
    given = list(argv)
    if given and not given[0].startswith("-"):  # the run; the other arguments are texts
        given.insert(0, "--run")
    options = load_config(ClassifyOptions, given, prog="gptsmith classify RUN", positional="text")
    if bool(options.text) == bool(options.file):
        raise ValueError('give either texts (gptsmith classify RUN "some text") or --file FILE')
    if options.out and not options.file:
        raise ValueError("--out is for the predictions of a --file")
    if options.out and options.out.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"--out {options.out}: predictions are written as .csv or .jsonl")
    if options.out:
        files.check_not_read(options.out, [options.file])
    classify = _classifier(options)
    if options.file is None:
        texts = [files.read_standard_input("-") if t == "-" else t for t in options.text]
        show(texts, classify(texts))
        return
    rows = predictions(options, classify)
    if options.out is None:
        for row, found in rows:
            terminal.write(_json(row, found))
        return
    with (
        files.atomic_path(options.out) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        table, count = csv.writer(file, lineterminator="\n"), 0
        names: list[str] = []
        for count, (row, found) in enumerate(rows, 1):
            if options.out.suffix == ".jsonl":
                file.write(f"{_json(row, found)}\n")
                continue
            p = found["probabilities"]
            if count == 1:
                names = list(row.values)
                table.writerow([*names, "predicted", *(f"p({label})" for label in p)])
            values = [row.values.get(name) for name in names]
            table.writerow([*values, found["predicted"], *p.values()])
    terminal.say(f"{terminal.counted(count, 'prediction')} in {options.out}")


def _classifier(options: ClassifyOptions) -> Classify:
    """The run as a function from texts to predictions. It reports truncated texts on stderr."""
    from gptsmith.evaluate.classification import max_length, predict  # imports torch
    from gptsmith.model.classifier import GPTClassifier
    from gptsmith.run import Run
    from gptsmith.train.runtime import choose_precision

    run = Run.open(options.run)
    if not run.model_config.labels:
        raise ValueError(
            f"{run.path} is a language model without classes: gptsmith finetune classify "
            f"--from {run.path} --data FILE --out RUN2 makes a classifier of it"
        )
    model = options.load(run)
    assert isinstance(model, GPTClassifier)
    precision, T = choose_precision(options.precision, options.torch_device()), max_length(run)

    def classify(texts: Sequence[str]) -> list[Prediction]:
        found, truncated = predict(model, run.tokenizer, texts, T, precision, options.batch_size)
        if truncated:
            terminal.note(f"{truncated} of the texts truncated to {T} tokens")
        return found

    return classify


def predictions(options: ClassifyOptions, classify: Classify) -> Iterator[tuple[Row, Prediction]]:
    """The rows of the file in order, each with the prediction for its text."""
    from gptsmith.data.labelled import read_texts
    from gptsmith.data.report import ReadReport

    assert options.file is not None
    report = ReadReport()
    rows = read_texts(options.file, options.text_column, report, options)
    while chunk := list(islice(rows, CHUNK)):
        while report.hints:
            terminal.note(report.hints.popitem()[0])
        first = chunk[0][1]
        if taken := {"predicted", "probabilities"} & first.values.keys():
            raise ValueError(
                f"{first.place}: there is a column {taken.pop()!r} already, which the predictions "
                "would overwrite: rename it"
            )
        found = classify([text for text, _ in chunk])
        for (_, row), prediction in zip(chunk, found, strict=True):
            yield row, prediction


def _json(row: Row, found: Prediction) -> str:
    """default: dates and bytes of a table have no JSON, so they become text."""
    return json.dumps({**row.values, **found}, ensure_ascii=False, default=str)


def show(texts: Sequence[str], found: Sequence[Prediction]) -> None:
    """For one text all classes, for several the likeliest class of each."""
    p = found[0]["probabilities"]
    width = max(len(terminal.visible(label)) for label in p)
    if len(texts) == 1:
        for label in sorted(p, key=lambda label: -p[label]):
            terminal.say(f"{terminal.visible(label):<{width}}  {p[label]:7.2%}")
        return
    for text, prediction in zip(texts, found, strict=True):
        line = " ".join(text.split())
        line = line if len(line) <= 70 else f"{line[:69]}…"
        label = prediction["predicted"]
        share = prediction["probabilities"][label]
        terminal.say(f"{terminal.visible(label):<{width}}  {share:7.2%}  {line}")
