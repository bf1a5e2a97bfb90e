"""Chat data sets: conversations, or tables of token ids, to checked training examples.

A data set is read into memory, or encoded once into a file that is memory-mapped afterwards
(`gptsmith prepare --format chat`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gptsmith.arguments import check_several
from gptsmith.chat_template.message import turn_starts
from gptsmith.chat_template.template import ChatTemplate
from gptsmith.data.chat_windows import Window, conversation_windows, token_windows
from gptsmith.data.conversations import Conversation, read_conversations
from gptsmith.data.examples import Example, Examples, answer_ends, is_chat_set, write_examples
from gptsmith.data.options import ChatFiles
from gptsmith.data.report import ReadReport, Tally
from gptsmith.data.rows import find_tables
from gptsmith.data.token_examples import check_stop_token_trained, token_examples
from gptsmith.data.token_tables import find_token_tables
from gptsmith.files import check_format
from gptsmith.terminal import counted

FORMAT = 1  # of the file that write_chat makes


@dataclass
class ChatCounts:
    """How the answers of a data set are used, in examples of at most T + 1 tokens.

    report         rows that are not conversations (not counted in `read`), and hints about files
    divide         whether long conversations are divided; otherwise only their beginning is used
    read           conversations read
    kept           conversations with at least one target
    answers        answers that should be targets
    kept_answers   those that fit and are targets; the others are left out
    too_long       conversations with an answer that is left out because its turn is too long
    remarks        conversations that are changed, or that have no targets
    prepared       the summary from when the set was prepared, if it is used unchanged
    """

    T: int
    report: ReadReport = field(default_factory=ReadReport)
    divide: bool = True
    read: int = 0
    kept: int = 0
    answers: int = 0
    kept_answers: int = 0
    too_long: Tally = field(default_factory=Tally)
    remarks: Tally = field(default_factory=Tally)
    prepared: str = ""

    def count(self, windows: Iterable[Window], answers: int, place: str) -> Iterator[Example]:
        """Yield the examples of a conversation's windows and count them.

        answers: how many answers of the conversation should be targets.
        """
        found, limit = list(windows), f"{self.T + 1:,} tokens"
        if not self.divide:
            found = [window for window in found[:1] if window.turn == 0]
        kept_answers = sum(window.answers for window in found)
        self.read, self.kept = self.read + 1, self.kept + bool(found)
        self.answers, self.kept_answers = self.answers + answers, self.kept_answers + kept_answers
        if not answers:
            self.remarks.add("conversation without an answer to train on", place)
        if kept_answers < answers:
            what = "a turn" if self.divide else "the conversation"
            self.too_long.add(f"{what} is longer than {limit}", place)
        if len(found) > 1:
            self.remarks.add(f"divided into windows of at most {limit}", place)
        yield from (window.example for window in found)

    def __str__(self) -> str:
        """A summary: first what is left out, then what is trained on."""
        if self.prepared:
            return self.prepared
        left_out, kept = [], ""
        if left := self.answers - self.kept_answers:
            share = f"{left:,} of {self.answers:,} answers ({left / self.answers:.1%})"
            left_out = [f"left out: {share}, as {line}" for line in self.too_long.lines()]
        if self.kept:
            answers = counted(self.kept_answers, "answer")
            kept = f"{answers} of {counted(self.kept, 'conversation')}"
        return self.report.usage(self.read, left_out, kept, self.kept_answers == 1, self.remarks)


def load_chat(
    sources: Sequence[str | Path],
    files: ChatFiles,
    template: ChatTemplate,
    T: int,
) -> tuple[Examples, ChatCounts]:
    """The examples of a data set for rows of T tokens: memory-mapped if `write_chat` made the file.

    ValueError, with place and remedy, for a data set without targets.
    """
    examples, counts = _read(sources, files, template, T)
    if len(sources) == 1 and is_chat_set(Path(sources[0])):
        return _open_prepared(Path(sources[0]), template, counts)
    return Examples(examples), counts


def write_chat(
    sources: Sequence[str | Path],
    files: ChatFiles,
    template: ChatTemplate,
    T: int,
    out: Path,
    *,
    overwrite: bool = False,
) -> ChatCounts:
    """Encode a data set into a file for `load_chat`, in bounded memory and written durably.

    ValueError as from `load_chat`; FileExistsError for an existing file without `overwrite`.
    """
    if out.suffix != ".arrow":
        raise ValueError(f"--out {out}: give it a name that ends in .arrow")
    if out.exists() and not overwrite:
        raise FileExistsError(f"--out {out}: already exists; --overwrite replaces it")
    examples, counts = _read(sources, files, template, T)
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = _provenance(template, T)
    write_examples(out, examples, facts, lambda: {"said": str(counts)})
    return counts


def _read(
    sources: Sequence[str | Path],
    files: ChatFiles,
    template: ChatTemplate,
    T: int,
) -> tuple[Iterator[Example], ChatCounts]:
    """Examples of conversations, or of tables of token ids and labels, in order, and their counts,
    which are complete once all were read.

    Raises ValueError after the last one if there are no targets.
    """
    check_several(sources, "sources")
    template.check_prefix_preserving()
    report = ReadReport(files.on_error)
    counts = ChatCounts(T, report, files.windows)

    def examples() -> Iterator[Example]:
        for source in sources:
            paths = find_tables(source).files
            if prepared := next(filter(is_chat_set, paths), None):
                raise ValueError(
                    f"{prepared} is a prepared set: name it alone, or prepare all at once"
                )
            if tables := find_token_tables(paths):
                found = token_examples(tables, files.labels, template.tokenizer.vocab_size, report)
                checked = check_stop_token_trained(found, template)
                yield from divide(checked, template, counts)
            else:
                conversations = read_conversations([source], files, report)
                yield from encode_conversations(conversations, template, counts)
        check_any_target(" ".join(map(str, sources)), counts)

    return examples(), counts


def check_any_target(where: str, counts: ChatCounts) -> None:
    """ValueError if nothing of a data set is left to train on. where: where it is from."""
    if not counts.kept and counts.read and not counts.answers:
        raise ValueError(
            f"{where}: every label is -100 (masked), or every weight 0: training on it teaches "
            "nothing"
        )
    if not counts.kept:
        raise ValueError(f"{where}: no conversation is left: {counts}")


# --- encoding ------------------------------------------------------------------------------------


def encode_conversations(
    conversations: Iterable[Conversation], template: ChatTemplate, counts: ChatCounts
) -> Iterator[Example]:
    """Examples of at most counts.T + 1 tokens; `counts` records what is left out."""
    for conversation in conversations:
        messages, place, kept_answers, _ = conversation
        try:
            windows = list(conversation_windows(conversation, template, counts.T + 1))
        except ValueError as error:
            kind = "conversation that the template rejects"
            counts.report.reject(kind, place, str(error))
            continue
        for name in template.ignored_fields(messages):
            counts.report.hint(f"field {name!r} of messages is not used")
        if messages[turn_starts(messages)[0]]["role"] == "assistant":
            counts.remarks.add("beginning with a message of the assistant", place)
        if messages[-1]["role"] == "user":
            counts.remarks.add("ending with a question, which was removed", place)
        answers = conversation.answers if kept_answers is None else kept_answers
        yield from counts.count(windows, len(answers), place)


def divide(
    examples: Iterable[Example], template: ChatTemplate, counts: ChatCounts
) -> Iterator[Example]:
    """Divide examples into ones of at most counts.T + 1 tokens."""
    tokens = template.turn_tokens()
    for example in examples:
        windows = token_windows(example, tokens, counts.T + 1)
        yield from counts.count(windows, len(answer_ends(example, tokens)), example.name)


# --- prepared files ------------------------------------------------------------------------------


def _provenance(template: ChatTemplate, T: int) -> dict[str, str | int]:
    digest = hashlib.sha256(template.source.encode()).hexdigest()
    tokenizer = template.tokenizer.fingerprint
    return {"format": FORMAT, "tokenizer": tokenizer, "template": digest, "T": T}


def _open_prepared(
    path: Path, template: ChatTemplate, counts: ChatCounts
) -> tuple[Examples, ChatCounts]:
    examples = Examples(path)
    facts, expected = examples.metadata, _provenance(template, counts.T)
    remedy = "prepare it again with --format chat --tokenizer RUN"
    check_format(f"{path}: format", facts.get("format"), FORMAT, remedy)
    for name in ("tokenizer", "template"):
        if facts.get(name) != expected[name]:
            raise ValueError(f"{path}: made with another {name} than the run's; {remedy}")
    said = str(facts.get("said", ""))
    divided = divide(examples, template, counts)
    if int(examples.lengths.max(initial=0)) <= counts.T + 1:
        for _ in divided:  # counts the answers
            pass
        counts.prepared = said  # absent if an earlier version made it
        return examples, counts
    if said:
        counts.report.hint(f"when it was prepared: {said}")
    examples = Examples(divided)
    if not len(examples):
        raise ValueError(f"{path}: no conversation is left: {counts}")
    return examples, counts
