"""The report on preferences: their sizes, and what differs between the answers of a pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
from rich.console import RenderableType
from rich.padding import Padding

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.template import ChatTemplate
from gptsmith.console import Console, Text
from gptsmith.data.options import PreferenceFiles
from gptsmith.data.pairs import Pairs, load_pairs
from gptsmith.data.preferences import PairCounts
from gptsmith.inspect import render
from gptsmith.inspect.chat import marked
from gptsmith.terminal import counted
from gptsmith.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreferenceReport:
    """What `gptsmith inspect` shows of preferences."""

    name: str
    tokenizer: Tokenizer
    pairs: Pairs
    counts: PairCounts


def preference_report(
    sources: Sequence[str | Path], files: PreferenceFiles, template: ChatTemplate, T: int
) -> PreferenceReport:
    """The report on the pairs as training in rows of T tokens would use them; ValueError as from
    load_pairs."""
    pairs, counts = load_pairs(sources, files, template, T)
    return PreferenceReport(" ".join(map(str, sources)), template.tokenizer, pairs, counts)


def show_preferences(report: PreferenceReport, console: Console, first: int = 3) -> None:
    """Print the report and the first pairs: chosen answers in green, rejected ones in red, what
    differs in bold. Without colour, target tokens are enclosed in ⟦ ⟧, what differs in « »."""
    plain = console.no_color or console.color_system is None
    render.print_report(_parts(report, first, plain), console)


def _parts(report: PreferenceReport, first: int, plain: bool) -> Iterator[RenderableType]:
    pairs = report.pairs
    examples, n = pairs.examples, len(pairs)
    answers = examples.target_lengths.reshape(-1, 2)
    longer = answers[:, 0] > answers[:, 1]
    yield render.title("preferences", report.name)
    yield render.properties(
        {
            "used": str(report.counts),
            "pairs": f"{n:,}, {counted(len({*pairs.questions}), 'different question')}",
            "tokens": f"{pairs.tokens:,}, {examples.targets / pairs.tokens:.1%} of them targets",
            "chosen answers (tokens)": render.quantiles(answers[:, 0]),
            "rejected answers (tokens)": render.quantiles(answers[:, 1]),
            "the chosen answer is longer": f"in {longer.mean():.0%} of the pairs, by "
            f"{(answers[:, 0] - answers[:, 1]).mean():+,.1f} tokens on average over all",
        }
    )
    yield render.heading("lengths of pairs (tokens of the longer conversation)")
    yield render.histogram_bars(pairs.lengths)
    style = "target tokens ⟦in brackets⟧, what differs «so»" if plain else "what differs is bold"
    yield render.heading(f"the first pairs, chosen and rejected; {style}")
    for i in range(min(first, n)):
        chosen, rejected = examples[2 * i], examples[2 * i + 1]
        start = int(np.argmax(chosen.labels != IGNORE_INDEX))
        yield Text(chosen.name, "dim")
        question = np.zeros(start, bool)
        yield marked(chosen.ids[:start], question, report.tokenizer, plain)
        for side, other, colour in ((chosen, rejected, "green"), (rejected, chosen, "red")):
            ids, is_target = side.ids[start:], side.labels[start:] != IGNORE_INDEX
            differs = _differences(ids, other.ids[start:])
            text = marked(ids, is_target, report.tokenizer, plain, differs, colour)
            below = 0 if side is chosen else 1
            yield Padding(text, (0, 0, below, 2))


def _differences(ids: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Which ids of an answer are not in the other one, by the longest common runs."""
    differs = np.ones(len(ids), bool)
    for block in SequenceMatcher(None, ids.tolist(), other.tolist(), False).get_matching_blocks():
        differs[block.a : block.a + block.size] = False
    return differs
