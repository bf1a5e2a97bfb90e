"""What `gptsmith inspect` says about preferences: sizes, what differs, and what is scored."""

import io
from pathlib import Path

import pytest
from chats import OURS
from rich.console import Console
from tables import write

from gptsmith import cli
from gptsmith.data.options import PreferenceFiles
from gptsmith.inspect.preference import preference_report, show_preferences

ROWS = [
    {"prompt": "Hi\x1b[2J", "chosen": "You two", "rejected": "You too, or not"},
    {"prompt": "Hi\x1b[2J", "chosen": "same", "rejected": "same"},
    {"prompt": "Hi\x1b[2J", "chosen": "longer", "rejected": "no"},
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs.jsonl", *ROWS)


def shown(path: Path, colour: bool = False) -> str:
    file = io.StringIO()
    kind = "standard" if colour else None
    console = Console(file=file, width=100, force_terminal=colour, color_system=kind)  # type: ignore[arg-type]
    show_preferences(preference_report([path], PreferenceFiles(), OURS, 60), console)
    return file.getvalue()


def test_what_is_left_out_comes_first_and_lengths_are_compared(pairs: Path) -> None:
    words = " ".join(shown(pairs).split())
    assert "used left out: 1 of 3 pairs (33.3%), with equal answers: 1 (" in words
    assert "pairs 2, 1 different question tokens" in words
    assert "the chosen answer is longer in 50% of the pairs, by -2.0 tokens on average" in words


def test_what_differs_and_what_is_scored_is_marked(pairs: Path) -> None:
    plain = shown(pairs)
    assert "\n<|user|>Hi\\x1b[2J<|end|>\n" in plain
    assert "⟦<|assistant|>You t«w»o<|end|>⟧" in plain
    assert "⟦<|assistant|>You to«o, or not»<|end|>⟧" in plain
    coloured = shown(pairs, colour=True)
    assert "\x1b[1;32mw" in coloured
    assert "\x1b[1;31mo" in coloured
    assert "\x1b[2J" not in coloured


def test_the_command_recognises_preferences(pairs: Path, tmp_path: Path, capsys) -> None:
    from runs import untrained

    from gptsmith.tokenizer import Tokenizer

    run = untrained(tmp_path / "run", Tokenizer.byte())
    assert cli.main(["inspect", str(pairs), "--tokenizer", str(run)]) == 0
    assert "preferences" in capsys.readouterr().out
    better = ["--prompt-column", "prompt", "--response-column", "chosen"]
    assert cli.main(["inspect", str(pairs), "--tokenizer", str(run), *better]) == 0
    assert "chat set" in capsys.readouterr().out
    named = write(tmp_path / "other.jsonl", {"q": "Hi", "good": "a", "bad": "b"})
    columns = ["--prompt-column", "q", "--chosen-column", "good", "--rejected-column", "bad"]
    assert cli.main(["inspect", str(named), "--tokenizer", str(run), *columns]) == 0
    assert "1 pair is trained on" in capsys.readouterr().out
