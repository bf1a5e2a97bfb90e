"""`gptsmith classify RUN TEXT...`: names the class of texts, from the command line or a file."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydantic import Field

from gptsmith.commands.weights import WeightOptions
from gptsmith.config import load_config
from gptsmith.data.classification import encode_texts
from gptsmith.data.labelled import read_texts
from gptsmith.data.rows import Row
from gptsmith.evaluate.classification import log_probabilities, named
from gptsmith.files import atomic_path
from gptsmith.model.classifier import GPTClassifier
from gptsmith.run import Run
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.options import PrecisionName
from gptsmith.train.runtime import choose_precision

PIECE = 4096  # texts of a file that are in memory at once


class ClassifyOptions(WeightOptions):
    """What to classify, and with which model."""

    text: tuple[str, ...] = ()
    """Texts to classify; `-` reads one from standard input."""
    file: Path | None = None
    """Texts from a table (csv, tsv, json, jsonl, parquet, arrow), or the lines of another file."""
    text_column: str | None = None
    """Column of the text, where it is not obvious."""
    out: Path | None = None
    """Predictions for `file`, as .csv or .jsonl: its columns, the class, and each probability
    (default: JSON lines on standard output)."""
    batch_size: int = Field(32, ge=1)
    """Texts that go through the model at once."""
    precision: PrecisionName = "fp32"
    """Number format of matrix products."""


def main(argv: Sequence[str]) -> None:
    words = list(argv)
    if words and not words[0].startswith("-"):  # the first word is the run, the others are texts
        words.insert(0, "--run")
    options = load_config(
        ClassifyOptions,
        words,
        prog="gptsmith classify RUN",
        description="Name the class of texts with a model that `finetune classify` made.",
        positional="text",
    )
    if bool(options.text) == bool(options.file):
        raise ValueError('give texts (gptsmith classify RUN "some text") or --file FILE, one of it')
    if options.out and not options.file:
        raise ValueError("--out is for the predictions of a --file")
    if options.out and options.out.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"--out {options.out}: predictions are written as .csv or .jsonl")
    run = Run.open(options.run)
    if not run.model_config.labels:
        raise ValueError(
            f"{run.path} is a language model and knows no classes: gptsmith finetune classify "
            f"--from {run.path} --data FILE --out RUN2 makes a classifier of it"
        )
    model = options.load(run)
    assert isinstance(model, GPTClassifier)
    if options.file is None:
        texts = [sys.stdin.read() if text == "-" else text for text in options.text]
        show(texts, classify(model, run.tokenizer, texts, options), model.config.labels)
        return
    rows = predictions(model, run.tokenizer, options)
    if options.out is None:
        write_jsonl(sys.stdout, rows)
        return
    write = write_csv if options.out.suffix == ".csv" else write_jsonl
    with (
        atomic_path(options.out) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        count = write(file, rows)
    print(f"{count:,} predictions in {options.out}")


def classify(
    model: GPTClassifier, tokenizer: Tokenizer, texts: Sequence[str], options: ClassifyOptions
) -> np.ndarray:
    """Probabilities of each class (N, L)."""
    ids, cut = encode_texts(tokenizer, texts, model.config.context_length)
    if cut:
        limit = model.config.context_length
        print(f"{cut} of the texts cut at the end, to {limit} tokens", file=sys.stderr)
    arithmetic = choose_precision(options.precision, options.where())
    return np.exp(log_probabilities(model, ids, arithmetic, batch_size=options.batch_size))


def predictions(
    model: GPTClassifier, tokenizer: Tokenizer, options: ClassifyOptions
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """The rows of the file in order, each with what is said of it."""
    assert options.file is not None
    rows = read_texts(options.file, options.text_column)
    while piece := list(islice(rows, PIECE)):
        if taken := {"predicted", "probabilities"} & piece[0][1].values.keys():
            raise ValueError(
                f"{piece[0][1].place}: has a column {taken.pop()!r} already, which the predictions "
                "would take: rename it"
            )
        found = classify(model, tokenizer, [text for text, _ in piece], options)
        for (_, row), p in zip(piece, found, strict=True):
            yield row, named(model.config.labels, p)


def write_jsonl(file: IO[str], rows: Iterable[tuple[Row, dict[str, Any]]]) -> int:
    count = 0
    for row, found in rows:  # of a table, dates and bytes have no JSON: their text is kept
        file.write(json.dumps({**row.values, **found}, ensure_ascii=False, default=str) + "\n")
        count += 1
    return count


def write_csv(file: IO[str], rows: Iterable[tuple[Row, dict[str, Any]]]) -> int:
    writer, count = csv.writer(file, lineterminator="\n"), 0
    names: list[str] = []
    for row, found in rows:
        p = found["probabilities"]
        if not count:
            names = list(row.values)
            writer.writerow([*names, "predicted", *(f"p({label})" for label in p)])
        values = [row.values.get(name) for name in names]
        writer.writerow([*values, found["predicted"], *p.values()])
        count += 1
    return count


def show(texts: Sequence[str], found: np.ndarray, labels: Sequence[str]) -> None:
    """For people: of one text all classes, of several the likeliest of each."""
    width = max(map(len, labels))
    if len(texts) == 1:
        for i in np.argsort(-found[0], kind="stable"):
            print(f"{labels[i]:<{width}}  {found[0, i]:7.2%}")
        return
    for text, p in zip(texts, found, strict=True):
        line = " ".join(text.split())
        line = line if len(line) <= 70 else f"{line[:69]}…"
        print(f"{labels[int(p.argmax())]:<{width}}  {p.max():7.2%}  {line}")
