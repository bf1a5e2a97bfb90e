"""The report on a prepared corpus: tables for the terminal, and a figure."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.filesize import decimal as file_size
from rich.padding import Padding
from rich.table import Table

from gptsmith import files
from gptsmith.console import Console, Text
from gptsmith.inspect import render
from gptsmith.inspect.statistics import CorpusReport, SplitStatistics, TrainingPair
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.figure_text import figure_text, with_fonts


def show_corpus(report: CorpusReport, console: Console, top: int = 20) -> None:
    """Print the report; `top`: how many of the most frequent tokens."""
    render.print_report(_parts(report, top), console)


@with_fonts
def draw_corpus(report: CorpusReport, path: str | Path) -> Path:
    """Write a PNG with a histogram of document lengths and the token frequencies over their rank
    (a straight line in these axes is Zipf's law)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"{path}: the picture is a PNG; give it a name that ends in .png")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = {s.name: np.maximum(s.lengths, 1) for s in report.splits.values() if s.documents}
    decades = _decades(np.concatenate(list(lengths.values())))
    for name, split_lengths in lengths.items():
        # Shares, because val has far fewer documents.
        share = np.full(len(split_lengths), 1 / len(split_lengths))
        bins = np.geomspace(*decades, 40).tolist()
        left.hist(split_lengths, bins=bins, weights=share, histtype="step", label=name)
    left.set(title="document lengths", xlabel="tokens in a document", xscale="log", xlim=decades)
    left.set(ylabel="share of the documents")
    left.legend()
    frequencies = np.sort(report.counts[report.counts > 0])[::-1]
    right.loglog(np.arange(1, len(frequencies) + 1), frequencies, marker=".", markersize=3)
    right.set(title="token frequencies", xlabel="rank of the token", ylabel="occurrences")
    right.set(xlim=(1, max(10, len(frequencies))), ylim=_decades(frequencies))
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_formatter(NullFormatter())
    figure.suptitle(f"{figure_text(report.path.name, 80)}: {int(report.counts.sum()):,} tokens")
    files.write_figure(path, figure, dpi=120)
    return path


def _decades(numbers: np.ndarray) -> tuple[int, int]:
    """The powers of ten around positive numbers: a shorter axis would have no labels."""
    low, high = int(numbers.min()), int(numbers.max())
    return 10 ** (len(str(low)) - 1), 10 ** len(str(high))


def visible_token(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of one token, with spaces, line ends and incomplete characters made visible."""
    data = tokenizer.decode_bytes([token_id])
    try:
        return render.printable(data.decode())
    except UnicodeDecodeError:
        return repr(data)[2:-1]


def _parts(report: CorpusReport, top: int) -> Iterator[RenderableType]:
    manifest, tokenizer = report.manifest, report.tokenizer
    yield render.title(f"corpus {manifest.get('name') or report.path.name}", report.path)
    coverage = ", ".join(
        f"{report.ids_covering(share):,} make up {share:.0%}" for share in (0.5, 0.9, 0.99)
    )
    yield render.properties(
        {
            "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids ({manifest['dtype']})",
            "vocabulary in use": f"{report.used_ids:,} ids, "
            f"{report.used_ids / tokenizer.vocab_size:.1%}; {coverage}",
            "val tokens unseen in train": f"{report.unseen_share:.2%}",
            "val documents also in train": f"{report.contaminated:,}",
        }
    )
    yield _splits(report.splits.values())
    if report.splits["train"].documents > 1:
        yield render.heading("document lengths (train, tokens)")
        yield render.histogram_bars(report.splits["train"].lengths)
    total = int(report.counts.sum())
    yield render.heading(f"most frequent tokens of {total:,}")
    yield _frequencies(report, top, total)
    yield render.heading(
        "training pairs: the model reads x and predicts y, which is one token ahead"
    )
    for pair in report.pairs:
        yield _training_pair(pair, tokenizer)


def _splits(splits: Iterable[SplitStatistics]) -> Table:
    columns = []
    for split in splits:
        rate = split.duplicates / max(1, split.documents)
        columns.append(
            {
                "": split.name,
                "tokens": f"{split.tokens:,}",
                "shards": f"{split.shards:,}",
                "text": file_size(split.text_bytes),
                "bytes per token": f"{split.text_bytes / max(1, split.tokens):.3f}",
                "documents": f"{split.documents:,}",
                "exact duplicates": f"{split.duplicates:,} ({rate:.1%})",
                "tokens per document": render.quantiles(
                    split.lengths if split.documents else np.zeros(1)
                ),
            }
        )
    table = Table.grid(padding=(0, 2))
    for name in columns[0]:
        table.add_row(Text(name, "dim"), *(Text(column[name]) for column in columns))
    return table


def _frequencies(report: CorpusReport, top: int, total: int) -> Table:
    table = Table.grid(padding=(0, 3))
    rows = [
        Text.assemble(
            f"{rank:>3}  ",
            (visible_token(report.tokenizer, i), "bold"),
            (f"  {count / total:.2%}  id {i}", "dim"),
        )
        for rank, (i, count) in enumerate(report.most_frequent(top), start=1)
    ]
    height = -(-len(rows) // 2)
    for left in range(height):
        table.add_row(*rows[left::height])
    return table


def _training_pair(pair: TrainingPair, tokenizer: Tokenizer) -> RenderableType:
    """Both texts in full, then their first tokens in columns, target below input."""
    texts = Table.grid(padding=(0, 1))
    for name, ids in (("x", pair.x), ("y", pair.y)):
        text = render.printable(tokenizer.decode(ids), render.SHOW_LINE_ENDS)
        texts.add_row(Text(name, "bold cyan"), Text(text, overflow="fold"))
    aligned = Table.grid(padding=(0, 1))
    first = slice(0, 8)
    for name, ids in (("x", pair.x[first]), ("y", pair.y[first])):
        cells = [Text(visible_token(tokenizer, i), "reverse") for i in ids]
        aligned.add_row(Text(name, "bold cyan"), *cells, "…")
    place = Text(f"{pair.file}, token {pair.start:,}", "dim")
    return Padding(Group(place, texts, aligned), (0, 0, 1, 0))
