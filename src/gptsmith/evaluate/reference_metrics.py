"""Metrics of responses against references: exact match, ROUGE (rouge-score), BLEU (sacrebleu);
and reading the files that contain both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptsmith.data.columns import quoted
from gptsmith.data.rows import Row, read_rows
from gptsmith.evaluate.result import Result, Statistic
from gptsmith.evaluate.task_data import text
from gptsmith.run import digests, is_run

RESPONSES = "responses.json"  # in a run folder, written by instruction tuning
ROUGE = ("rouge1", "rouge2", "rougeL")

# Common names of the columns; the first one present is used.
_REFERENCE = ("output", "reference", "target", "answer", "expected")
_RESPONSE = ("response", "model_response", "prediction", "completion", "generated")
_QUESTION = ("instruction", "question", "prompt")


@dataclass(frozen=True)
class Entry:
    """A model's response, the question (empty if the file has none), and a reference response."""

    id: str
    question: str
    reference: str
    response: str


def read_responses(path: str | Path) -> list[Entry]:
    """The entries of a file of rows (data/rows.py), or of the responses.json of a run folder.

    A column `input` is part of the question. The id of an entry is its `id` column, else its
    number, from 1.
    ValueError naming file and row for a column that is missing or not text, and a blank reference.
    """
    path = Path(path)
    if is_run(path):
        path = path / RESPONSES
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; `gptsmith finetune instruct` writes it")
        digests.check(path.parent, RESPONSES)
    entries: list[Entry] = []
    for number, row in enumerate(read_rows(path), 1):
        if not entries:
            reference = _known_column(row, "reference", _REFERENCE)
            response = _known_column(row, "model's response", _RESPONSE)
        names = (next((name for name in _QUESTION if name in row.values), None), "input")
        parts = [text(row, name) for name in names if name and row.values.get(name) is not None]
        target = text(row, reference)
        if not target.strip():
            raise ValueError(f"{row.place}: the reference {reference!r} is blank: omit the row")
        entry_id = str(row.values.get("id", number))
        question = "\n\n".join(part for part in parts if part.strip())
        entries.append(Entry(entry_id, question, target, text(row, response)))
    if not entries:
        raise ValueError(f"{path}: no responses in it")
    return entries


def score(entries: Sequence[Entry]) -> Result:
    """Compare responses with their references.

    exact_match: equality, except for white space at the ends. rouge1, rouge2, rougeL (Lin 2004):
    F-measure, no stemming. bleu (Papineni et al. 2002): of the whole corpus, 0 to 100, with
    sacrebleu's defaults and its signature in the details. Without the extra `eval`, exact match
    alone, with a note.
    """
    items: list[dict[str, Any]] = [
        asdict(entry) | {"exact_match": float(entry.reference.strip() == entry.response.strip())}
        for entry in entries
    ]
    metrics, details, notes = ["exact_match"], {}, list[str]()
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        notes.append(
            f"no ROUGE and BLEU: {error.name} is not installed; pip install 'gptsmith[eval]'"
        )
    else:
        metrics += [*ROUGE, "bleu"]
        scorer, bleu = RougeScorer(ROUGE), BLEU()
        for item in items:
            found = scorer.score(item["reference"], item["response"])
            item |= {name: found[name].fmeasure for name in ROUGE}
            counts = bleu.corpus_score([item["response"]], [[item["reference"]]])
            item["bleu_counts"] = [
                *counts.counts, *counts.totals, counts.sys_len, counts.ref_len
            ]  # fmt: skip
        details["bleu_signature"] = str(bleu.get_signature())
        if unscored := sum(not re.search("[A-Za-z0-9]", entry.reference) for entry in entries):
            notes.append(
                f"ROUGE uses a-z and 0-9 only: {unscored:,} references have none and score 0"
            )
    return Result.from_items(
        "text", items, metrics, details=details, notes=notes, statistics={"bleu": CORPUS_BLEU},
        key=("question", "reference"),  # two runs may have answered in another order
    )  # fmt: skip


def _bleu(means: np.ndarray) -> np.ndarray:
    """BLEU of the corpus: its smoothing depends on the sums of counts (..., 10), not on means."""
    from sacrebleu.metrics import BLEU

    sums = np.rint(means[..., :10] * means[..., 10:]).reshape(-1, 10).astype(int).tolist()
    found = [BLEU.compute_bleu(s[:4], s[4:8], s[8], s[9], smooth_method="exp").score for s in sums]
    return np.reshape(found, means.shape[:-1])


# The counts of each item, and the number of items.
CORPUS_BLEU = Statistic(lambda items: [[*item["bleu_counts"], len(items)] for item in items], _bleu)


def _known_column(row: Row, what: str, known: Sequence[str]) -> str:
    found = next((column for column in known if column in row.values), None)
    if found is None:
        raise ValueError(
            f"{row.place}: no column for the {what}: expected one of {', '.join(known)}; it has "
            f"{quoted(row.values)}"
        )
    return found
