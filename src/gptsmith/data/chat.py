"""Chat sets for training: conversations or ready token ids -> examples, checked.

A set is read into memory, or written once to a file that is then memory-mapped
(`gptsmith prepare --format chat`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gptsmith.arguments import check_several
from gptsmith.chat_template.template import ChatTemplate
from gptsmith.data import columnar
from gptsmith.data.conversations import Conversation, read_conversations
from gptsmith.data.examples import Example, Examples, answer_ends, is_chat_set, write_examples
from gptsmith.data.messages import unread_fields
from gptsmith.data.options import ChatFiles
from gptsmith.data.paths import has_suffix
from gptsmith.data.report import ReadReport, Tally
from gptsmith.data.rows import row_files
from gptsmith.data.token_examples import check_stop_token_trained, token_examples
from gptsmith.data.tokenized import holds_ids
from gptsmith.data.windows import Window, conversation_windows, token_windows
from gptsmith.tokenizer import Tokenizer

FORMAT = 1  # of the file that write_chat makes


@dataclass
class ChatCounts:
    """What became of the answers of a set, in examples of at most T + 1 tokens.

    read        conversations
    kept        conversations of which something is learned
    answers     answers to learn in them; `learned` of these are, the others are left out
    too_long    conversations with an answer that is left out, as its turn alone is longer
    divided     conversations that were divided into windows
    no_targets  conversations without an answer to learn
    unanswered  conversations that end with a question, which teaches nothing and was removed
    skipped     rows that are not conversations, by kind (not counted in `read`)
    hints       remarks on the files
    prepared    what was said when the set was prepared, if it is used as it is
    divide      whether long conversations are divided; otherwise only their beginning is used
    """

    T: int
    read: int = 0
    kept: int = 0
    answers: int = 0
    learned: int = 0
    too_long: Tally = field(default_factory=Tally)
    divided: Tally = field(default_factory=Tally)
    no_targets: Tally = field(default_factory=Tally)
    unanswered: Tally = field(default_factory=Tally)
    skipped: Tally = field(default_factory=Tally)
    hints: dict[str, None] = field(default_factory=dict)
    prepared: str = ""
    divide: bool = True

    @classmethod
    def of(cls, T: int, report: ReadReport, divide: bool = True) -> ChatCounts:
        """Counts that show what `report` skips."""
        return cls(T, skipped=report.skipped, hints=report.hints, divide=divide)

    def count(self, windows: Iterable[Window], answers: int, place: str) -> Iterator[Example]:
        """The examples of a conversation's windows, counted. answers: those to learn."""
        found, limit = list(windows), f"{self.T + 1:,} tokens"
        if not self.divide:
            found = [window for window in found[:1] if window.turn == 0]
        learned = sum(window.answers for window in found)
        self.read, self.kept = self.read + 1, self.kept + bool(found)
        self.answers, self.learned = self.answers + answers, self.learned + learned
        if not answers:
            self.no_targets.add("conversation without an answer to learn", place)
        if learned < answers:
            what = "a turn" if self.divide else "the conversation"
            self.too_long.add(f"{what} is longer than {limit}", place)
        if len(found) > 1:
            self.divided.add(f"divided into windows of at most {limit}", place)
        yield from (window.example for window in found)

    def __str__(self) -> str:
        """What is left out first, then what is learned."""
        if self.prepared:
            return self.prepared
        parts = []
        if left := self.answers - self.learned:
            share = f"{left:,} of {self.answers:,} answers ({left / self.answers:.1%})"
            parts += [f"left out: {share}, as {line}" for line in self.too_long.lines()]
        if skipped := self.skipped.total:
            rows = self.read + skipped
            lines = ", ".join(self.skipped.lines())
            parts.append(f"skipped: {skipped:,} of {rows:,} rows ({skipped / rows:.1%}), {lines}")
        which = "" if left else "all "
        parts.append(f"{which}{self.learned:,} answers of {self.kept:,} conversations are learned")
        for tally in (self.divided, self.no_targets, self.unanswered):
            parts += tally.lines()
        return "; ".join([*parts, *self.hints])

    def facts(self) -> dict[str, str]:
        """What a prepared file says about itself."""
        return {"said": str(self)}


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
    check_several(sources, "sources")
    template.check_prefix_preserving()
    if len(sources) == 1 and is_chat_set(Path(sources[0])):
        return _open_prepared(Path(sources[0]), files, template, tokenizer, T)
    report = ReadReport(files.on_error)
    counts = ChatCounts.of(T, report, files.windows)
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
    check_several(sources, "sources")
    template.check_prefix_preserving()
    report = ReadReport(files.on_error)
    counts = ChatCounts.of(T, report, files.windows)
    out.parent.mkdir(parents=True, exist_ok=True)
    examples = _read_examples(sources, files, template, tokenizer, report, counts)
    write_examples(out, examples, _made_by(template, tokenizer, T), counts.facts)
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
        if prepared := next(filter(is_chat_set, paths), None):
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
            checked = check_stop_token_trained(examples, template, tokenizer)
            yield from divide(checked, template, counts)
    if not counts.kept:
        where = " ".join(map(str, sources))
        if not counts.answers and counts.read:
            raise ValueError(
                f"{where}: every label is -100 (masked), or every weight 0: training on it teaches "
                "nothing"
            )
        raise ValueError(f"{where}: no conversation is left: {counts}")


# --- encoding ------------------------------------------------------------------------------------


def encode_conversations(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    report: ReadReport,
    counts: ChatCounts,
) -> Iterator[Example]:
    """Their examples, of at most counts.T + 1 tokens; `counts` records what is left out."""
    for conversation in conversations:
        messages, place, learned, _ = conversation
        answers = sum(message["role"] == "assistant" for message in messages)
        try:
            windows = list(conversation_windows(conversation, template, counts.T + 1))
        except ValueError as error:
            report.reject("conversation that the template refuses", place, str(error))
            continue
        for name in sorted(unread_fields(messages, template.reads)):
            report.hint(f"field {name!r} of messages is not used")
        if messages[-1]["role"] == "user":
            counts.unanswered.add("ending with a question, which was removed", place)
        yield from counts.count(windows, answers if learned is None else len(learned), place)


def divide(
    examples: Iterable[Example], template: ChatTemplate, counts: ChatCounts
) -> Iterator[Example]:
    """Examples of at most counts.T + 1 tokens from longer ones."""
    tokens = template.turn_tokens()
    for example in examples:
        windows = token_windows(example, tokens, counts.T + 1)
        yield from counts.count(windows, len(answer_ends(example.labels)), example.name)


# --- prepared files ------------------------------------------------------------------------------


def _made_by(template: ChatTemplate, tokenizer: Tokenizer, T: int) -> dict[str, str | int]:
    digest = hashlib.sha256(template.source.encode()).hexdigest()
    return {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "template": digest, "T": T}


def _open_prepared(
    path: Path, files: ChatFiles, template: ChatTemplate, tokenizer: Tokenizer, T: int
) -> tuple[Examples, ChatCounts]:
    examples = Examples(path)
    facts, expected = examples.metadata, _made_by(template, tokenizer, T)
    remedy = "prepare it again with --format chat --tokenizer RUN"
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path}: made by another version of gptsmith; {remedy}")
    for name in ("tokenizer", "template"):
        if facts.get(name) != expected[name]:
            raise ValueError(f"{path}: made with another {name} than the run's; {remedy}")
    counts, said = ChatCounts(T, divide=files.windows), str(facts.get("said", ""))
    if int(examples.lengths.max(initial=0)) > T + 1:
        counts.hints = {f"when it was prepared: {said}": None} if said else {}
        examples = Examples(divide(examples, template, counts))
        if not len(examples):
            raise ValueError(f"{path}: no conversation is left: {counts}")
        return examples, counts
    counts.answers = counts.learned = sum(len(answer_ends(e.labels)) for e in examples)
    counts.read = counts.kept = len(examples)
    counts.prepared = said  # absent if an earlier version made it
    return examples, counts
