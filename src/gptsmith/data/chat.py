"""Chat sets as training wants them: conversations or ready token ids -> examples, checked.

A set is read into memory, or once and for all written to a file that is mapped
(`gptsmith prepare --format chat`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from gptsmith.conversation import ChatTemplate
from gptsmith.data.conversations import (
    Columns,
    Counts,
    answer_ends,
    encode_conversations,
    fit,
    read_conversations,
)
from gptsmith.data.documents import Reader
from gptsmith.data.examples import Example, Examples, holds_examples, write_examples
from gptsmith.data.rows import row_files
from gptsmith.data.tokenized import LABELS, _rows, holds_ids
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.loss import IGNORE

FORMAT = 1  # of the file that write_chat makes
Labels = Literal["auto", "shifted", "unshifted"]


class ChatFiles(BaseModel):
    """How files of conversations are read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages_column: str | None = None
    """Column of the messages, where its name is not a usual one."""
    prompt_column: str | None = None
    """Column of the questions, in a table of questions and answers."""
    response_column: str | None = None
    """Column of the answers."""
    labels: Labels = "auto"
    """Of token ids that come with labels: unshifted (label i is the id at i) or shifted."""
    on_error: Literal["stop", "skip"] = "stop"
    """What is no conversation ends the command, or is left out and counted."""

    def reader(self) -> Reader:
        return Reader(skip=self.on_error == "skip")

    def columns(self) -> Columns:
        return Columns(self.messages_column, self.prompt_column, self.response_column)


def load_chat(
    sources: Sequence[str | Path],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    T: int,
    *,
    reader: Reader,
    columns: Columns | None = None,
    labels: Labels = "auto",
) -> tuple[Examples, Counts]:
    """The examples of a set for rows of T tokens: mapped if `write_chat` made the file, else read.

    ValueError, with place and remedy, for what training on it would not teach anything.
    """
    template.check()
    counts = Counts(T)
    if len(sources) == 1 and _is_prepared(Path(sources[0])):
        examples = _open_prepared(Path(sources[0]), template, tokenizer, T)
        counts.read = counts.kept = len(examples)
        return examples, counts
    examples = Examples(
        read_examples(sources, template, tokenizer, reader, counts, columns=columns, labels=labels)
    )
    _refuse_empty(sources, counts, reader)
    return examples, counts


def write_chat(
    sources: Sequence[str | Path],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    T: int,
    out: Path,
    *,
    reader: Reader,
    columns: Columns | None = None,
    labels: Labels = "auto",
    overwrite: bool = False,
) -> Counts:
    """Encode a set into a file for `load_chat`, in bounded memory and written durably.

    ValueError as from `load_chat`; FileExistsError for a file that is there and not to be replaced.
    """
    if out.suffix != ".arrow":
        raise ValueError(f"--out {out}: give it a name that ends in .arrow")
    if out.exists() and not overwrite:
        raise FileExistsError(f"--out {out}: is there already; --overwrite replaces it")
    template.check()
    counts = Counts(T)

    def examples() -> Iterator[Example]:
        yield from read_examples(
            sources, template, tokenizer, reader, counts, columns=columns, labels=labels
        )
        _refuse_empty(sources, counts, reader)

    out.parent.mkdir(parents=True, exist_ok=True)
    write_examples(out, examples(), _about(template, tokenizer, T))
    return counts


def read_examples(
    sources: Sequence[str | Path],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    reader: Reader,
    counts: Counts,
    *,
    columns: Columns | None = None,
    labels: Labels = "auto",
) -> Iterator[Example]:
    """Examples of conversations, or of tables of token ids and labels, in their order."""
    for source in sources:
        paths = row_files(source)
        ready = [p for p in paths if p.suffix.lower() in (".parquet", ".arrow") and holds_ids(p)]
        if not ready:
            conversations = read_conversations([source], reader, columns)
            yield from encode_conversations(conversations, template, reader, counts)
        elif len(ready) < len(paths):
            other = next(path for path in paths if path not in ready)
            raise ValueError(f"{ready[0]} holds token ids, {other} does not: name them apart")
        else:
            examples = token_examples(ready, labels, tokenizer.vocab_size, reader)
            for example in ended(examples, template, tokenizer):
                if (fitted := fit(example, counts)) is not None:
                    yield fitted


# --- token ids -----------------------------------------------------------------------------------


def token_examples(
    paths: Sequence[Path], labels: Labels, vocab_size: int, reader: Reader
) -> Iterator[Example]:
    """Rows of input_ids and labels as examples, whose labels stand at their own token.

    ValueError for ids outside the vocabulary, and if it cannot be told how the labels lie.
    """
    kind = _kind_of_labels(paths, reader) if labels == "auto" else labels
    for place, ids, targets in _labelled_rows(paths, reader):
        if kind == "shifted":  # the last label is a token more, unless it is no token
            ids = np.append(ids, targets[-1:][targets[-1:] != IGNORE])
            targets = np.concatenate([np.array([IGNORE]), targets])[: len(ids)]
        if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(
                f"{place}: token id {bad} is outside the tokenizer's 0..{vocab_size - 1}; give "
                "the tokenizer that made these ids"
            )
        if (targets != ids)[targets != IGNORE].any():
            raise ValueError(f"{place}: these labels are not {kind}, as --labels {labels} says")
        targets[:1] = IGNORE  # the first token follows nothing
        yield Example(ids.astype(np.int32), targets.astype(np.int32), place)


def _kind_of_labels(paths: Sequence[Path], reader: Reader) -> Literal["shifted", "unshifted"]:
    """Whether labels equal input_ids or the ids one further on, found by comparing all rows."""
    rows = unshifted = shifted = 0
    for place, ids, labels in _labelled_rows(paths, reader):
        scored = labels != IGNORE
        same = bool((labels == ids)[scored].all())
        ahead = bool((labels[:-1] == ids[1:])[scored[:-1]].all())
        if not same and not ahead:
            raise ValueError(f"{place}: labels are neither input_ids nor the ids one further on")
        rows, unshifted, shifted = rows + 1, unshifted + same, shifted + ahead
    if unshifted == rows and shifted < rows:
        return "unshifted"
    if shifted == rows and unshifted < rows:
        return "shifted"
    why = "both readings fit" if unshifted == rows else "some rows are, some are not"
    raise ValueError(
        f"{paths[0]}: cannot tell whether labels are shifted already ({why}); say --labels "
        "unshifted (each stands at its own token) or --labels shifted (one before it)"
    )


def _labelled_rows(
    paths: Sequence[Path], reader: Reader
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Place, ids and labels of every row, padding left out."""
    for place, ids, labels in _rows(paths, reader):
        if labels is None:
            raise ValueError(
                f"{place}: no column {LABELS!r}, so it is not said which tokens are learned; add "
                "one with -100 for the others, or give the conversations as text"
            )
        if len(labels) != len(ids):
            raise ValueError(f"{place}: {len(labels)} labels for {len(ids)} input_ids")
        yield place, ids, labels


def ended(
    examples: Iterable[Example], template: ChatTemplate, tokenizer: Tokenizer
) -> Iterator[Example]:
    """The examples as they are, after a look at where their answers end.

    ValueError if an answer's end token is outside the loss, at once, and if no answer at all ends
    with one: a model trained on these would not stop.
    """
    stops = np.array(template.stop_ids)
    name = tokenizer.decode(template.stop_ids[:1])
    place, answers, stopped = "", 0, 0
    for example in examples:
        ids, labels, here = example
        ends = answer_ends(labels)
        last = np.isin(ids[ends - 1], stops)
        following = np.isin(np.append(ids, -1)[ends], stops)
        if (following & ~last).any():
            raise ValueError(
                f"{here}: {name} after an answer is not learned (its label is -100): the model "
                "would never stop; score the end token, or give the conversations as text"
            )
        place, answers, stopped = place or here, answers + len(ends), stopped + int(last.sum())
        yield example
    if answers and not stopped:
        raise ValueError(
            f"{place}: none of the {answers:,} answers of this set ends with {name}: it was made "
            "with another chat template or tokenizer"
        )


# --- prepared files ------------------------------------------------------------------------------


def _is_prepared(path: Path) -> bool:
    return path.suffix.lower() == ".arrow" and path.is_file() and holds_examples(path)


def _about(template: ChatTemplate, tokenizer: Tokenizer, T: int) -> dict[str, str | int]:
    digest = hashlib.sha256(template.source.encode()).hexdigest()
    return {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "template": digest, "T": T}


def _open_prepared(path: Path, template: ChatTemplate, tokenizer: Tokenizer, T: int) -> Examples:
    examples = Examples(path)
    ours = _about(template, tokenizer, T)
    again = "prepare it again with --format chat --tokenizer RUN"
    if examples.about.get("format") != FORMAT:
        raise ValueError(f"{path}: made by another version of gptsmith; {again}")
    for name in ("tokenizer", "template"):
        if examples.about[name] != ours[name]:
            raise ValueError(f"{path}: made with another {name} than the run's; {again}")
    longest = int(examples.lengths.max(initial=0))
    if longest > T + 1:
        raise ValueError(
            f"{path}: cut for {examples.about['T']:,} tokens, the longest conversation has "
            f"{longest:,}, and rows are of {T:,} here; {again}"
        )
    return examples


def _refuse_empty(sources: Sequence[str | Path], counts: Counts, reader: Reader) -> None:
    """ValueError if nothing is left to learn from."""
    if counts.kept:
        return
    where = " ".join(map(str, sources))
    if counts.unscored.count == counts.read > 0:
        raise ValueError(f"{where}: every label is -100 (masked): training on it teaches nothing")
    left_out = ", ".join(f"{len(places)} {kind}" for kind, places in reader.left_out.items())
    left_out = f"; left out: {left_out}" if left_out else ""
    raise ValueError(f"{where}: no conversation is left: {counts}{left_out}")
