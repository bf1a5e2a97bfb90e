"""Chat sets for training: conversations or ready token ids -> examples, checked.

A set is read into memory, or written once to a file that is then memory-mapped
(`gptsmith prepare --format chat`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template import ChatTemplate
from gptsmith.data import columnar
from gptsmith.data.conversations import Conversation, read_conversations
from gptsmith.data.examples import Example, Examples, answer_ends, holds_examples, write_examples
from gptsmith.data.options import ChatFiles
from gptsmith.data.paths import has_suffix
from gptsmith.data.report import ReadReport, Tally
from gptsmith.data.rows import row_files
from gptsmith.data.token_examples import check_stop_token_trained, token_examples
from gptsmith.data.tokenized import holds_ids
from gptsmith.tokenizer import Tokenizer

FORMAT = 1  # of the file that write_chat makes


@dataclass
class ChatCounts:
    """What became of the conversations of a set, in examples of at most T + 1 tokens.

    truncated    lost their last exchanges, at the end of a turn
    too_long     were dropped, because their first exchange alone is longer
    no_targets   were dropped, because nothing in them is learned
    unanswered   end with a question, which teaches nothing and was removed
    skipped      rows that are not conversations, by kind (not counted in `read`)
    """

    T: int
    read: int = 0
    kept: int = 0
    truncated: Tally = field(default_factory=Tally)
    too_long: Tally = field(default_factory=Tally)
    no_targets: Tally = field(default_factory=Tally)
    unanswered: Tally = field(default_factory=Tally)
    skipped: Tally = field(default_factory=Tally)

    @property
    def dropped(self) -> int:
        return self.too_long.total + self.no_targets.total

    def __str__(self) -> str:
        parts = [f"{self.kept:,} of {self.read:,} conversations are used"]
        tallies = (self.truncated, self.too_long, self.no_targets, self.unanswered)
        parts += [line for tally in tallies for line in tally.lines()]
        return "; ".join([*parts, *(f"skipped, {line}" for line in self.skipped.lines())])


def load_chat(
    sources: Sequence[str | Path],
    files: ChatFiles,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    T: int,
) -> tuple[Examples, ChatCounts]:
    """The examples of a set for rows of T tokens: mapped if `write_chat` made the file, else read.

    ValueError, with place and remedy, for a set that would teach nothing.
    """
    template.check_prefix_preserving()
    if len(sources) == 1 and _is_prepared(Path(sources[0])):
        examples = _open_prepared(Path(sources[0]), template, tokenizer, T)
        return examples, ChatCounts(T, read=len(examples), kept=len(examples))
    report = ReadReport(files.on_error)
    counts = ChatCounts(T, skipped=report.skipped)
    examples = Examples(_read_examples(sources, files, template, tokenizer, report, counts))
    return examples, counts


def write_chat(
    sources: Sequence[str | Path],
    files: ChatFiles,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    T: int,
    out: Path,
    *,
    overwrite: bool = False,
) -> ChatCounts:
    """Encode a set into a file for `load_chat`, in bounded memory and written durably.

    ValueError as from `load_chat`; FileExistsError for an existing file without `overwrite`.
    """
    if out.suffix != ".arrow":
        raise ValueError(f"--out {out}: give it a name that ends in .arrow")
    if out.exists() and not overwrite:
        raise FileExistsError(f"--out {out}: already exists; --overwrite replaces it")
    template.check_prefix_preserving()
    report = ReadReport(files.on_error)
    counts = ChatCounts(T, skipped=report.skipped)
    out.parent.mkdir(parents=True, exist_ok=True)
    examples = _read_examples(sources, files, template, tokenizer, report, counts)
    write_examples(out, examples, _about(template, tokenizer, T))
    return counts


def _read_examples(
    sources: Sequence[str | Path],
    files: ChatFiles,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    report: ReadReport,
    counts: ChatCounts,
) -> Iterator[Example]:
    """Examples of conversations, or of tables of token ids and labels, in order.

    ValueError at the end if there was nothing to learn from.
    """
    for source in sources:
        paths = row_files(source)
        if prepared := next(filter(_is_prepared, paths), None):
            raise ValueError(f"{prepared} is a prepared set: name it alone, or prepare all at once")
        tables = [p for p in paths if has_suffix(p, *columnar.SUFFIXES) and holds_ids(p)]
        if not tables:
            conversations = read_conversations([source], files, report)
            yield from encode_conversations(conversations, template, report, counts)
        elif len(tables) < len(paths):
            other = next(path for path in paths if path not in tables)
            raise ValueError(f"{tables[0]} holds token ids, {other} does not: use them separately")
        else:
            examples = token_examples(tables, files.labels, tokenizer.vocab_size, report)
            for example in check_stop_token_trained(examples, template, tokenizer):
                yield from truncate(example, counts)
    if not counts.kept:
        where = " ".join(map(str, sources))
        if counts.no_targets.total == counts.read > 0:
            raise ValueError(
                f"{where}: every label is -100 (masked): training on it teaches nothing"
            )
        raise ValueError(f"{where}: no conversation is left: {counts}")


# --- encoding ------------------------------------------------------------------------------------


def encode_conversations(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    report: ReadReport,
    counts: ChatCounts,
) -> Iterator[Example]:
    """Their examples, of at most counts.T + 1 tokens; `counts` records what is cut or dropped."""
    for messages, place in conversations:
        try:
            encoded = template.encode(messages)
        except ValueError as error:
            report.reject("conversation that the template refuses", place, str(error))
            continue
        ids = np.array(encoded.ids, np.int32)
        labels = np.where(encoded.is_target, ids, np.int32(IGNORE_INDEX))
        if messages[-1]["role"] == "user":
            counts.unanswered.add("ending with a question, which was removed", place)
        yield from truncate(Example(ids, labels, place), counts)


def truncate(example: Example, counts: ChatCounts) -> Iterator[Example]:
    """The example up to the end of its last answer within counts.T + 1 tokens; none if it has none.

    An answer is never cut. What follows the last answer is removed, as nothing in it is learned.
    """
    ids, labels, place = example
    limit = counts.T + 1
    counts.read += 1
    ends = answer_ends(labels)
    within = ends[ends <= limit]
    if not len(ends):
        counts.no_targets.add("dropped, as nothing in them is learned", place)
    elif not len(within):
        counts.too_long.add(f"dropped, as one exchange is longer than {limit:,} tokens", place)
    else:
        if len(within) < len(ends):
            counts.truncated.add(f"cut to {limit:,} tokens", place)
        counts.kept += 1
        yield Example(ids[: within[-1]], labels[: within[-1]], place)


# --- prepared files ------------------------------------------------------------------------------


def _is_prepared(path: Path) -> bool:
    return path.suffix.lower() == ".arrow" and path.is_file() and holds_examples(path)


def _about(template: ChatTemplate, tokenizer: Tokenizer, T: int) -> dict[str, str | int]:
    digest = hashlib.sha256(template.source.encode()).hexdigest()
    return {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "template": digest, "T": T}


def _open_prepared(path: Path, template: ChatTemplate, tokenizer: Tokenizer, T: int) -> Examples:
    examples = Examples(path)
    expected = _about(template, tokenizer, T)
    remedy = "prepare it again with --format chat --tokenizer RUN"
    if examples.about.get("format") != FORMAT:
        raise ValueError(f"{path}: made by another version of gptsmith; {remedy}")
    for name in ("tokenizer", "template"):
        if examples.about[name] != expected[name]:
            raise ValueError(f"{path}: made with another {name} than the run's; {remedy}")
    longest = int(examples.lengths.max(initial=0))
    if longest > T + 1:
        raise ValueError(
            f"{path}: cut for {examples.about['T']:,} tokens, the longest conversation has "
            f"{longest:,}, and rows are of {T:,} here; {remedy}"
        )
    return examples
