"""Chat sets as training wants them: conversations or ready token ids -> examples, checked.

A set is read into memory, or once and for all written to a file that is mapped
(`gptsmith prepare --format chat`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptsmith.chat_template import ChatTemplate
from gptsmith.data.conversations import (
    Counts,
    encode_conversations,
    fit,
    read_conversations,
)
from gptsmith.data.examples import Example, Examples, holds_examples, write_examples
from gptsmith.data.options import ChatColumns, Labels
from gptsmith.data.report import ReadReport
from gptsmith.data.rows import row_files
from gptsmith.data.token_examples import ended, token_examples
from gptsmith.data.tokenized import holds_ids
from gptsmith.tokenizer import Tokenizer

FORMAT = 1  # of the file that write_chat makes


def load_chat(
    sources: Sequence[str | Path],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    T: int,
    *,
    report: ReadReport,
    columns: ChatColumns | None = None,
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
        read_examples(sources, template, tokenizer, report, counts, columns=columns, labels=labels)
    )
    _settle(sources, counts, report)
    return examples, counts


def write_chat(
    sources: Sequence[str | Path],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    T: int,
    out: Path,
    *,
    report: ReadReport,
    columns: ChatColumns | None = None,
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
            sources, template, tokenizer, report, counts, columns=columns, labels=labels
        )
        _settle(sources, counts, report)

    out.parent.mkdir(parents=True, exist_ok=True)
    write_examples(out, examples(), _about(template, tokenizer, T))
    return counts


def read_examples(
    sources: Sequence[str | Path],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    report: ReadReport,
    counts: Counts,
    *,
    columns: ChatColumns | None = None,
    labels: Labels = "auto",
) -> Iterator[Example]:
    """Examples of conversations, or of tables of token ids and labels, in their order."""
    for source in sources:
        paths = row_files(source)
        if prepared := next(filter(_is_prepared, paths), None):
            raise ValueError(f"{prepared} is a prepared set: name it alone, or prepare all at once")
        ready = [p for p in paths if p.suffix.lower() in (".parquet", ".arrow") and holds_ids(p)]
        if not ready:
            conversations = read_conversations([source], report, columns)
            yield from encode_conversations(conversations, template, report, counts)
        elif len(ready) < len(paths):
            other = next(path for path in paths if path not in ready)
            raise ValueError(f"{ready[0]} holds token ids, {other} does not: name them apart")
        else:
            examples = token_examples(ready, labels, tokenizer.vocab_size, report)
            for example in ended(examples, template, tokenizer):
                if (fitted := fit(example, counts)) is not None:
                    yield fitted


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


def _settle(sources: Sequence[str | Path], counts: Counts, report: ReadReport) -> None:
    """Complete the counts; ValueError if nothing is left to learn from."""
    counts.left_out = report.skipped.counts()
    if counts.kept:
        return
    where = " ".join(map(str, sources))
    if counts.unscored.count == counts.read > 0:
        raise ValueError(f"{where}: every label is -100 (masked): training on it teaches nothing")
    raise ValueError(f"{where}: no conversation is left: {counts}")
