"""How close answers are to their references: exact match, ROUGE (rouge-score), BLEU (sacrebleu);
and the files that hold both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptsmith.data.columns import listed
from gptsmith.data.rows import Row, check_unicode, read_rows
from gptsmith.evaluate.report import Result, mean

RESPONSES = "responses.json"  # what instruction tuning leaves in a run folder
ROUGE = ("rouge1", "rouge2", "rougeL")

# Columns by the names that they have in files of responses, the first that is there.
_REFERENCE = ("output", "reference", "target", "answer", "expected")
_RESPONSE = ("response", "model_response", "prediction", "completion", "generated")
_QUESTION = ("instruction", "question", "prompt")


@dataclass(frozen=True)
class Entry:
    """An answer of a model, what was asked (empty if the file does not say), and a good answer."""

    id: str
    question: str
    reference: str
    response: str


def read_responses(
    path: str | Path, reference: str | None = None, response: str | None = None
) -> list[Entry]:
    """The answers in a file of rows (data/rows.py), or in the responses.json of a run folder.

    reference, response: their columns, if they have none of the usual names. A column `input` is
    part of the question. An entry is called by its `id`, else by its number, from 1.
    ValueError naming file and row for a column that is missing or no text, and a blank reference.
    """
    path = Path(path)
    if (path / "model.json").is_file():
        path = path / RESPONSES
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not there; `gptsmith finetune instruct` writes it")
    entries: list[Entry] = []
    for number, row in enumerate(read_rows(path), 1):
        if not entries:
            reference = reference or _named(row, "reference answer", _REFERENCE)
            response = response or _named(row, "model's answer", _RESPONSE)
        assert reference is not None
        assert response is not None
        names = (next((name for name in _QUESTION if name in row.values), None), "input")
        asked = [_text(row, name) for name in names if name and row.values.get(name) is not None]
        good = _text(row, reference)
        if not good.strip():
            raise ValueError(
                f"{row.place}: the reference {reference!r} is blank: leave the row out"
            )
        name = str(row.values.get("id", number))
        question = "\n\n".join(part for part in asked if part.strip())
        entries.append(Entry(name, question, good, _text(row, response)))
    if not entries:
        raise ValueError(f"{path}: no answers in it")
    return entries


def score(entries: Sequence[Entry]) -> Result:
    """Compare answers with their references.

    exact_match: equal but for white space around. rouge1, rouge2, rougeL (Lin 2004): F-measure, no
    stemming. bleu (Papineni et al. 2002): of the whole corpus, 0 to 100, by sacrebleu's defaults,
    its signature in the details. Without the extra `eval` there is exact match alone, and a note.
    ValueError without entries.
    """
    items: list[dict[str, Any]] = [
        {
            "id": entry.id,
            "question": entry.question,
            "reference": entry.reference,
            "response": entry.response,
            "exact_match": float(entry.reference.strip() == entry.response.strip()),
        }
        for entry in entries
    ]
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    notes: list[str] = []
    names = ["exact_match"]
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        notes.append(f"no ROUGE and BLEU: {error.name} is missing; pip install 'gptsmith[eval]'")
    else:
        names += ROUGE
        scorer, bleu = RougeScorer(ROUGE), BLEU()
        for item in items:
            found = scorer.score(item["reference"], item["response"])
            item |= {name: found[name].fmeasure for name in ROUGE}
        if unseen := sum(not any(map(_seen_by_rouge, entry.reference)) for entry in entries):
            notes.append(
                f"ROUGE reads a-z and 0-9 alone: {unseen:,} references hold none and count as 0"
            )
    means = {name: mean([item[name] for item in items]) for name in names}
    metrics |= {name: value for name, (value, _) in means.items()}
    if len(names) > 1:
        responses, references = [e.response for e in entries], [e.reference for e in entries]
        metrics["bleu"] = bleu.corpus_score(responses, [references]).score
        details["bleu_signature"] = str(bleu.get_signature())
    errors = {name: error for name, (_, error) in means.items()}
    return Result("text", len(items), metrics, errors, items, details, notes)


def _seen_by_rouge(letter: str) -> bool:
    return letter.isascii() and letter.isalnum()


def _named(row: Row, what: str, usual: Sequence[str]) -> str:
    found = next((column for column in usual if column in row.values), None)
    if found is None:
        raise ValueError(
            f"{row.place}: no column holds the {what}: none is called {', '.join(usual)}; there "
            f"are {listed(row.values)}"
        )
    return found


def _text(row: Row, name: str) -> str:
    if name not in row.values:
        raise ValueError(f"{row.place}: no column {name!r}; there are {listed(row.values)}")
    value = row.values[name]
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"{row.place}: the column {name!r} holds {kind} {value!r:.40}, not text")
    check_unicode(row, name, value)
    return value
    return value
