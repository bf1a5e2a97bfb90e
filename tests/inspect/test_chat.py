"""What `gptsmith inspect` says about a chat data set: counts, and its target tokens marked."""

import io
from pathlib import Path

import pytest
from chats import OURS, talk
from rich.console import Console
from tables import write

from gptsmith.data.chat import write_chat
from gptsmith.data.options import ChatFiles
from gptsmith.inspect.chat import ChatReport, chat_report, show_chat

T = 100


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    ask, reply = talk("Hi\x1b[2J", "Yo")
    silent = talk("", "")[1]
    rows = [[ask, reply], [ask, reply, ask], [ask, reply] * 9, [ask, silent], [ask, reply] * 2]
    return write(tmp_path / "chat.jsonl", *rows)


def report(path: Path, T: int = T) -> ChatReport:
    return chat_report([path], ChatFiles(on_error="skip"), OURS, T)


def shown(report: ChatReport, first: int = 3, colour: bool = False) -> str:
    file = io.StringIO()
    kind = "standard" if colour else None
    console = Console(file=file, width=100, force_terminal=colour, color_system=kind)  # type: ignore[arg-type]
    show_chat(report, console, first)
    return file.getvalue()


def test_counts(chat: Path) -> None:
    r = report(chat)
    assert (r.counts.kept, r.counts.remarks.counts()) == (
        4,
        {
            "divided into windows of at most 101 tokens": 1,
            "ending with a question, which was removed": 1,
        },
    )
    assert r.counts.report.skipped.counts() == {"empty answer": 1}
    turns = [1, 1, 8, 1, 2]
    assert r.counts.kept_answers == sum(turns)
    assert r.examples.tokens == 12 * sum(turns)  # four special tokens, six bytes and two
    assert r.examples.targets == 4 * sum(turns)
    text = shown(r)
    for words in (
        "5, 13 answers (2.6 each)", "156, 33.3% targets", "12 to 96, median 12",
        "rows of 100 tokens 2 when packed, 75.5% filled; 5 when padded, 30.2% filled",
        "used skipped: 1 of 5 rows (20.0%), empty answer: 1",
        "all 13 answers of 4 conversations are trained on; ending with a question",
        "divided into windows of at most 101 tokens: 1",
        "64-127",
    ):  # fmt: skip
        assert words in " ".join(text.split())
    assert not [line for line in text.split("\n") if line.endswith(" ")]


def test_target_tokens_are_marked(chat: Path) -> None:
    r = report(chat)
    plain = shown(r, first=2)
    line = "<|user|>Hi\\x1b[2J<|end|>⟦<|assistant|>Yo<|end|>⟧"
    assert plain.count(line) == 2
    assert "\x1b" not in plain
    colours = shown(r, first=1, colour=True)
    assert "⟦" not in colours
    assert "\x1b[2J" not in colours
    assert "\x1b[32mYo\x1b[0m" in colours
    assert colours.count("\x1b[35m<|") == 2
    assert "\x1b[2m<|user|>\x1b[0m" in colours


def test_long_conversations_are_truncated(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", talk("a", "b" * 900))
    assert "... 305 more tokens" in shown(report(path, 1000))


def test_prepared_files_and_sets_without_targets(chat: Path, tmp_path: Path) -> None:
    out = tmp_path / "chat.arrow"
    write_chat([chat], ChatFiles(on_error="skip"), OURS, T, out)
    assert report(out).counts.kept_answers == report(chat).counts.kept_answers
    with pytest.raises(ValueError, match="no conversation is left"):
        report(chat, 5)
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n\n")
    with pytest.raises(
        ValueError, match=r"blank\.jsonl: no conversation is left: there are no rows$"
    ):
        report(blank)
    with pytest.raises(ValueError, match=r":4: message 2 of 2: .*--on-error"):
        chat_report([chat], ChatFiles(), OURS, T)
