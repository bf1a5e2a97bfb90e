"""Texts with labels, the files that hold them, and the sets that are read from them."""

import csv
from pathlib import Path
from typing import Any

from gptsmith.data.classification import LabelledSet, load_labelled
from gptsmith.data.labelled import LabelledText
from gptsmith.data.options import LabelledConfig

WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "gorse", "heron")


def pairs(n: int = 40, labels: tuple[str, ...] = ("no", "yes")) -> list[tuple[str, str]]:
    """Different texts with alternating labels."""
    return [(f"{WORDS[i % 8]} {WORDS[i // 8 % 8]} {i}", labels[i % len(labels)]) for i in range(n)]


def as_csv(path: Path, header: list[str] | None, rows: list[tuple[Any, ...]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([header] if header else [])
        writer.writerows(rows)
    return path


def load(path: Path, **options: Any) -> LabelledSet:
    return load_labelled(LabelledConfig(data=path, **options))


def everything(data: LabelledSet) -> list[LabelledText]:
    return [*data.train, *data.val, *data.test]


def content(data: LabelledSet) -> list[tuple[str, str]]:
    return sorted((row.text, row.label) for row in everything(data))
