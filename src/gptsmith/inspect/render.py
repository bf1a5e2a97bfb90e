"""Text, tables and histograms for the reports, on a terminal or in a file."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table

from gptsmith.console import Console, Text
from gptsmith.terminal import escaped

_BAR = 40  # characters of the longest bar
SHOW_LINE_ENDS = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})
SHOW_SPACES = str.maketrans({" ": "·"}) | SHOW_LINE_ENDS


def print_report(parts: Iterable[RenderableType], console: Console) -> None:
    """Print the parts one below the other; in a file or pipe without the trailing spaces that rich
    pads lines with."""
    report = Group(*parts)
    if console.is_terminal:
        console.print(report)
        return
    with console.capture() as capture:
        console.print(report)
    lines = [line.rstrip(" ") for line in capture.get().split("\n")]
    console.out("\n".join(lines), end="", highlight=False)


def title(name: str, path: str | Path) -> RenderableType:
    return Text.assemble((name, "bold"), "  ", (str(path), "dim"))


def heading(text: str) -> Padding:
    return Padding(Text(text, "bold"), (1, 0, 0, 0))


def properties(values: Mapping[str, str]) -> Table:
    """A table of names and values, one pair per row."""
    table = Table.grid(padding=(0, 2))
    for name, value in values.items():
        table.add_row(Text(name, "dim"), Text(value))
    return table


def quantiles(lengths: np.ndarray) -> str:
    """`2 to 91, median 17, 90% up to 60` for lengths (n,), n > 0."""
    low, median, p90, high = (f"{q:,.0f}" for q in np.quantile(lengths, (0, 0.5, 0.9, 1)))
    return f"{low} to {high}, median {median}, 90% up to {p90}"


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, to, count) over bins 0, 1, 2-3, 4-7, 8-15 ... that cover `lengths` (n,), n > 0."""
    bins = np.frexp(lengths.astype(np.float64))[1]  # 0 for 0, k for 2^(k-1) <= length < 2^k
    counts = np.bincount(bins)
    first = int(np.flatnonzero(counts)[0])
    edges = [(0, 0)] + [(2 ** (k - 1), 2**k - 1) for k in range(1, len(counts))]
    return [(*edges[k], int(counts[k])) for k in range(first, len(counts))]


def histogram_bars(lengths: np.ndarray) -> Table:
    """The histogram of `lengths` (n,), n > 0, as horizontal bars."""
    table = Table.grid(padding=(0, 2))
    rows = histogram(lengths)
    most = max(count for *_, count in rows)
    for first, last, count in rows:
        bar = "█" * round(_BAR * count / most) or ("▏" if count else "")
        table.add_row(Text(f"{first:,}-{last:,}", justify="right"), bar, f"{count:,}")
    return table


def printable(text: str, replacements: Mapping[int, str] = SHOW_SPACES, allowed: str = "") -> str:
    """`text` with unprintable characters escaped, except those in `allowed`. This is stricter than
    `terminal.visible`: it also shows which token has a no-break space or a tab."""
    text = text.translate(replacements)
    return "".join(c if c.isprintable() or c in allowed else escaped(c) for c in text)
