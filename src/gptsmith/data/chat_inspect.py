"""`gptsmith inspect chat.jsonl --tokenizer RUN`: what a chat set holds, and which tokens of it are
learned. What would teach nothing is refused as it would be before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template import ChatTemplate
from gptsmith.data.chat import load_chat
from gptsmith.data.conversations import Counts, answer_ends
from gptsmith.data.examples import Example, Examples
from gptsmith.data.inspect import bars, printable
from gptsmith.data.options import ChatColumns, Labels
from gptsmith.data.packing import PackedRows
from gptsmith.data.report import ReadReport
from gptsmith.data.token_examples import ended
from gptsmith.tokenizer import Tokenizer

_LONGEST = 600  # tokens of a conversation that are shown
_LEARNED, _OTHER, _SPECIAL = "green", "dim", "magenta"
_OPEN, _CLOSE = "⟦", "⟧"  # around what is learned, where there is no colour


@dataclass(frozen=True)
class ChatReport:
    """answers: assistant turns; rows, filled: how the set packs into rows of counts.T tokens."""

    name: str
    tokenizer: Tokenizer
    examples: Examples
    counts: Counts
    answers: int
    rows: int
    filled: float


def chat_report(
    sources: Sequence[str | Path],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    T: int,
    *,
    report: ReadReport,
    columns: ChatColumns | None = None,
    labels: Labels = "auto",
) -> ChatReport:
    """The set as training in rows of T tokens would see it.

    ValueError, as from load_chat, for a set in which nothing is learned, for end tokens outside the
    loss, and for a template that differs between training and chatting.
    """
    examples, counts = load_chat(
        sources, template, tokenizer, T, report=report, columns=columns, labels=labels
    )
    answers = sum(len(answer_ends(e.labels)) for e in ended(examples, template, tokenizer))
    packed = PackedRows(examples, T, seed=0, pad_id=0)
    return ChatReport(
        name=" ".join(map(str, sources)),
        tokenizer=tokenizer,
        examples=examples,
        counts=counts,
        answers=answers,
        rows=packed.per_epoch,
        filled=packed.filled,
    )


def show(report: ChatReport, console: Console, first: int = 3) -> None:
    """Print the report and the first conversations, what is learned in green, special tokens in
    magenta; without colour, what is learned stands in ⟦ ⟧."""
    plain = console.no_color or console.color_system is None
    console.print(Group(*_parts(report, first, plain)))


def _parts(report: ChatReport, first: int, plain: bool) -> Iterator[RenderableType]:
    examples, counts = report.examples, report.counts
    n = len(examples)
    low, median, p90, high = (f"{q:,.0f}" for q in np.quantile(examples.lengths, (0, 0.5, 0.9, 1)))
    facts = {
        "conversations": f"{n:,}, {report.answers:,} answers ({report.answers / n:.1f} each)",
        "tokens": f"{examples.tokens:,}, {examples.scored / examples.tokens:.1%} learned",
        "tokens in one": f"{low} to {high}, median {median}, 90% up to {p90}",
        "rows of tokens": f"{report.rows:,} of {counts.T:,} when packed, {report.filled:.1%} "
        f"filled; {n:,} when padded, {(examples.lengths - 1).mean() / counts.T:.1%} filled",
        "used": str(counts),
    }
    yield Text.assemble(("chat set", "bold"), "  ", (report.name, "dim"))
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(Text(name, "dim"), Text(value))
    yield table
    yield _heading("lengths (tokens)")
    yield bars(examples.lengths)
    how = f"{_OPEN}so{_CLOSE}" if plain else "in green"
    yield _heading(f"the first conversations; what the model learns to write stands {how}")
    for example in islice(examples, first):
        yield Text(example.name, "dim")
        yield Padding(marked(example, report.tokenizer, plain), (0, 0, 1, 0))


def marked(example: Example, tokenizer: Tokenizer, plain: bool) -> Text:
    """The text of an example, its learned parts in colour, or in brackets if `plain`."""
    ids, scored = example.ids[:_LONGEST], example.labels[:_LONGEST] != IGNORE_INDEX
    scored[:1] = False  # nothing stands before it from which to predict it
    special = np.isin(ids, list(tokenizer.special_tokens.values()))
    text = Text(overflow="fold")
    kinds = scored * 2 + special
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
    for start, end in pairwise(borders):
        if plain and scored[start] and not (start and scored[start - 1]):
            text.append(_OPEN)
        style = (_SPECIAL if special[start] else _LEARNED) if scored[start] else _OTHER
        text.append(printable(tokenizer.decode(ids[start:end]), {}, keep="\n"), style)
        if plain and scored[start] and not (end < len(ids) and scored[end]):
            text.append(_CLOSE)
    if len(example.ids) > _LONGEST:
        text.append(f" ... {len(example.ids) - _LONGEST:,} more tokens", "italic")
    return text


def _heading(text: str) -> Padding:
    return Padding(Text(text, "bold"), (1, 0, 0, 0))
