"""The report on a chat data set: its size, and which tokens the model is trained to predict.

A data set that training would reject is rejected here with the same error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from rich.console import RenderableType
from rich.padding import Padding

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.template import ChatTemplate
from gptsmith.console import Console, Text
from gptsmith.data.chat import ChatCounts, load_chat
from gptsmith.data.examples import Examples
from gptsmith.data.options import ChatFiles
from gptsmith.data.packing import PackedRows
from gptsmith.data.token_examples import check_stop_token_trained
from gptsmith.inspect import render
from gptsmith.terminal import counted
from gptsmith.tokenizer import Tokenizer

_MAX_TOKENS = 600  # shown of a conversation
_TARGET, _CONTEXT, _SPECIAL = "green", "dim", "magenta"
# around target tokens, and around what differs from another text, where there is no colour
_OPEN, _CLOSE = "⟦", "⟧"
_DIFFERS, _SAME = "«", "»"


@dataclass(frozen=True)
class ChatReport:
    """What `gptsmith inspect` shows of a chat set. packed: its rows of counts.T tokens."""

    name: str
    tokenizer: Tokenizer
    examples: Examples
    counts: ChatCounts
    packed: PackedRows


def chat_report(
    sources: Sequence[str | Path],
    files: ChatFiles,
    template: ChatTemplate,
    T: int,
) -> ChatReport:
    """The report on the set as training in rows of T tokens would use it.

    ValueError, as from load_chat, for a set without target tokens, for end tokens outside the
    loss, and for a template that differs between training and chatting.
    """
    examples, counts = load_chat(sources, files, template, T)
    for _ in check_stop_token_trained(examples, template):
        pass
    packed = PackedRows(examples, T, seed=0, pad_id=0)
    return ChatReport(" ".join(map(str, sources)), template.tokenizer, examples, counts, packed)


def show_chat(report: ChatReport, console: Console, first: int = 3) -> None:
    """Print the report and the first conversations, target tokens in green, special tokens in
    magenta; without colour, target tokens are enclosed in ⟦ ⟧."""
    plain = console.no_color or console.color_system is None
    render.print_report(_parts(report, first, plain), console)


def _parts(report: ChatReport, first: int, plain: bool) -> Iterator[RenderableType]:
    examples, counts, packed = report.examples, report.counts, report.packed
    n, answers = len(examples), counts.kept_answers
    yield render.title("chat set", report.name)
    yield render.properties(
        {
            "used": str(counts),
            "examples": f"{n:,}, {counted(answers, 'answer')} ({answers / n:.1f} each)",
            "tokens": f"{examples.tokens:,}, {examples.targets / examples.tokens:.1%} targets",
            "tokens per example": render.quantiles(examples.lengths),
            f"rows of {counts.T:,} tokens": f"{packed.per_epoch:,} when packed, "
            f"{packed.filled:.1%} filled; {n:,} when padded, "
            f"{(examples.lengths - 1).mean() / counts.T:.1%} filled",
        }
    )
    yield render.heading("lengths (tokens)")
    yield render.histogram_bars(examples.lengths)
    style = f"{_OPEN}in brackets{_CLOSE}" if plain else "in green"
    yield render.heading(f"the first conversations; target tokens {style}")
    for example in islice(examples, first):
        yield Text(example.name, "dim")
        is_target = example.labels != IGNORE_INDEX
        is_target[:1] = False  # the first token has no context to be predicted from
        text = marked(example.ids, is_target, report.tokenizer, plain)
        yield Padding(text, (0, 0, 1, 0))


def marked(
    ids: np.ndarray,
    is_target: np.ndarray,
    tokenizer: Tokenizer,
    plain: bool,
    differs: np.ndarray | None = None,
    colour: str = _TARGET,
) -> Text:
    """The text of ids, target tokens in colour, or in brackets if `plain`. differs: which tokens
    are in bold, or in other brackets."""
    total, ids, target = len(ids), ids[:_MAX_TOKENS], is_target[:_MAX_TOKENS]
    special = np.isin(ids, list(tokenizer.special_tokens.values()))
    text = Text(overflow="fold")
    bold = np.zeros(len(ids), bool) if differs is None else differs[:_MAX_TOKENS]
    kinds = target * 2 + special + 4 * bold
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
    for start, end in pairwise(borders):
        if plain and target[start] and not (start and target[start - 1]):
            text.append(_OPEN)
        if plain and bold[start] and not (start and bold[start - 1]):
            text.append(_DIFFERS)
        style = (_SPECIAL if special[start] else colour) if target[start] else _CONTEXT
        style = f"bold {style}" if bold[start] else style
        text.append(render.printable(tokenizer.decode(ids[start:end]), {}, allowed="\n"), style)
        if plain and bold[start] and not (end < len(ids) and bold[end]):
            text.append(_SAME)
        if plain and target[start] and not (end < len(ids) and target[end]):
            text.append(_CLOSE)
    if total > _MAX_TOKENS:
        text.append(f" ... {total - _MAX_TOKENS:,} more tokens", "italic")
    return text
