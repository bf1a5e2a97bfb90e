"""Text for people cannot control the terminal: terminal.py, console.py, and who goes past them."""

import ast
import io
import logging
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text as RichText

from gptsmith import cli, terminal
from gptsmith.console import Console, Text
from gptsmith.terminal import visible

SRC = Path(__file__).resolve().parents[1] / "src" / "gptsmith"
EMOJI_AND_PERSIAN = "👩\u200d👩\u200d👧 ✌️ می\u200cخواهم \u06dd١"  # with joiners


def test_singular_and_plural() -> None:
    shown = [terminal.counted(n, "step") for n in (0, 1, 2000)]
    assert shown == ["0 steps", "1 step", "2,000 steps"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b2J", r"\x9b2J"),  # C1: the same as ESC [ in one character
        ("a\x08\x7f\x00", r"a\x08\x7f\x00"),
        ("done\rerror", r"done\rerror"),
        ("\x0b\x0c\x85\u2028\u2029", r"\x0b\x0c\x85\u2028\u2029"),
        ("\u202egnp.exe\u2066\u200f\u061c", r"\u202egnp.exe\u2066\u200f\u061c"),
        ("\u200b\ufeff\u00ad\U000e0041", r"\u200b\ufeff\xad\U000e0041"),
        ("\udcff\ud800", r"\udcff\ud800"),
        ("lines\nand\ttabs stay", "lines\nand\ttabs stay"),
        ("naïve Ωμέγα 模型 नमस्ते a\u00a0b\u3000c", "naïve Ωμέγα 模型 नमस्ते a\u00a0b\u3000c"),
        (
            "👩\u200d👩\u200d👧 ✌️ می\u200cخواهم \u06dd١",
            "👩\u200d👩\u200d👧 ✌️ می\u200cخواهم \u06dd١",
        ),
        ("C:\\x1b", "C:\\x1b"),
    ],
)
def test_control_characters_are_spelt_out(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown


def test_one_line_of_any_text() -> None:
    assert visible("a\nb\tc\r\n", keep="") == r"a\nb\tc\r\n"


@given(st.text(st.characters() | st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp"])))
def test_no_text_keeps_a_control_character(text: str) -> None:
    shown = visible(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    assert not set(shown) & {chr(c) for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
    if text.isprintable():
        assert shown == text


HOSTILE = "[b]x[/y] :smile: \x1b[31m\x9b\x07\x08\r\u202e"
SHOWN = r"[b]x[/y] :smile: \x1b[31m\x9b\x07\x08\r\u202e"


def test_tables_measure_what_they_show() -> None:
    table = Table("name", HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE, Text(HOSTILE, "bold"))
    table.add_row("short", Text.assemble(("a", "dim"), "b\x1b").append("\x07"))
    out = io.StringIO()
    Console(file=out, width=150).print(table)
    lines = out.getvalue().splitlines()
    assert out.getvalue().count(SHOWN) == 4
    assert r"ab\x1b\x07" in out.getvalue()
    assert len({len(line) for line in lines[1:]}) == 1
    assert out.getvalue() == visible(out.getvalue())


def test_a_console_shows_nothing_raw_whatever_made_the_text() -> None:
    out = io.StringIO()
    console = Console(file=out, width=150, force_terminal=True, color_system="standard")
    console.print(RichText(HOSTILE, "red"))
    console.rule(HOSTILE)
    with Progress(
        TextColumn("{task.description}"),
        TextColumn("{task.fields[status]}", markup=False),
        console=console,
        auto_refresh=False,
    ) as bar:
        bar.add_task("\x1b]0;x\x07", status=HOSTILE)
        console.print(HOSTILE, soft_wrap=True)
    console.out(HOSTILE)
    text = out.getvalue()
    assert "\x1b[31m[b]x" in text  # the console's own colours remain
    assert not {"\x9b", "\x07", "\x08", "\u202e"} & set(text)
    assert "\x1b]0;" not in text
    assert text.count("\x1b[31m") == 1


def test_a_console_spells_out_what_the_encoding_lacks() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=out, width=60).print("Ω", soft_wrap=True)
    out.flush()
    assert out.buffer.getvalue() == b"\\u03a9\n"


def test_width_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert Console(file=io.StringIO()).width == 120
    assert Console(file=io.StringIO(), width=70).width == 70
    monkeypatch.setenv("COLUMNS", "90")
    assert Console(file=io.StringIO()).width == 90


class Screen(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_messages_are_visible_and_data_is_exact_except_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.say("\x1bm")
    terminal.note("\x1bn")
    terminal.write("\x1b\r\u202e")
    assert capsys.readouterr() == ("\\x1bm\n\x1b\r\u202e\n", "\\x1bn\n")
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    for piece in ("\x1b", "]0;x\x07", "\n\t☃"):
        terminal.write(piece, end="", flush=True)
    assert screen.getvalue() == "\\x1b]0;x\\x07\n\t☃"


def test_data_is_rejected_where_the_encoding_lacks_a_character(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    terminal.say("☃")
    with pytest.raises(ValueError, match="standard output is latin-1, which has no '☃': set"):
        terminal.write("a☃")
    assert sys.stdout.buffer.getvalue() == b"\\u2603\n"  # type: ignore[attr-defined]


def test_warnings_and_log_records_of_libraries_are_visible() -> None:
    code = (
        "import logging, warnings; from gptsmith import terminal;"
        "terminal.show_library_messages();"
        "warnings.warn('font \\x1b[2J of \\x9b');"
        "log = logging.getLogger('some.library'); log.warning('name %s', '\\x1b]0;x\\x07');"
        "log.addHandler(logging.StreamHandler()); log.error('\\x9b again')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert r"UserWarning: font \x1b[2J of \x9b" in done.stderr
    assert "name \\x1b]0;x\\x07\n\\x9b again\n" in done.stderr
    assert not {"\x1b", "\x9b", "\x07"} & set(done.stderr)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What a verb that raises this prints, and its exit code."""

    def fail(error: BaseException, *words: str) -> tuple[int, str]:
        def probe(argv: list[str]) -> None:
            raise error

        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        factory = logging.getLogRecordFactory()
        monkeypatch.setitem(sys.modules, "gptsmith.probe", SimpleNamespace(main=probe))
        monkeypatch.setitem(cli.VERBS, "probe", ("probe", "a test"))
        try:
            code = cli.main(["probe", *words])
        finally:
            logging.setLogRecordFactory(factory)
        return code, capsys.readouterr().err

    return fail


class Panic(BaseException):
    """As a library in Rust raises it."""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("bad \x1b]0;x\x07\nname"), 2, r"bad \x1b]0;x\x07 name"),
        (ValueError("a  b\x85c\u2028d"), 2, r"a  b\x85c\u2028d"),
        (FileNotFoundError(2, "No such file", "a\nb\x1b.txt"), 2, r"a\nb\x1b.txt: No such file"),
        (FileNotFoundError(2, "No such file", "\udcff\u202e"), 2, r"\udcff\u202e: No such file"),
        (RuntimeError("\x9b\r"), 1, r"RuntimeError: \x9b\r (run again with --debug "),
        (SystemExit("no \x1b\nway"), 1, r"no \x1b way"),
        (Panic("\x1b\nat"), 1, r"Panic: \x1b at (run again with --debug "),
    ],
)
def test_an_error_is_one_visible_line(failing, error: BaseException, code: int, line: str) -> None:
    got, text = failing(error)
    assert got == code
    assert text.startswith(f"gptsmith probe: {line}")
    assert text.count("\n") == 1
    got, text = failing(error, "--debug")
    assert got == code
    assert text.startswith("Traceback") is not isinstance(error, SystemExit)
    assert text == visible(text)


@pytest.mark.parametrize("word", ["\x1b]0;x\x07", "\x9b2J", "\u202egenerate", "\udcff", "a\rb\nc"])
def test_an_unknown_verb_is_visible(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 2
    text = capsys.readouterr().err
    assert text == visible(text)
    assert text.count("\n") == 1


# --- nothing goes past it ------------------------------------------------------------------------

EXITS = {"terminal.py", "console.py"}
STREAMS = {"stdout", "stderr", "__stdout__", "__stderr__"}


def ways_past(tree: ast.AST) -> Iterator[ast.AST]:
    asked = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("isatty", "fileno")
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Name("print")):
                yield node
            case ast.Attribute(ast.Name("sys"), name) if name in STREAMS and id(node) not in asked:
                yield node
            case ast.ImportFrom("sys" | "builtins", names) if STREAMS | {"print"} & {
                alias.name for alias in names
            }:
                yield node
            case ast.ImportFrom("rich.console", names) if {"Console"} & {a.name for a in names}:
                yield node
            case ast.ImportFrom("rich" | "rich.text"):
                yield node
            case ast.Call(ast.Attribute(_, "print_exc" | "print_exception" | "print_stack")):
                yield node
            case ast.Call(ast.Attribute(ast.Name("os"), "write"), [ast.Constant(1 | 2), *_]):
                yield node
            case ast.Call(
                ast.Attribute(ast.Name("sys"), "exit") | ast.Name("exit" | "SystemExit"),
                [ast.JoinedStr() | ast.Constant(str())],
            ):
                yield node
            case ast.Call(ast.Name("track" | "Progress"), _, keywords) if "console" not in {
                keyword.arg for keyword in keywords
            }:
                yield node


@pytest.mark.parametrize("file", sorted(SRC.rglob("*.py")), ids=lambda f: str(f.relative_to(SRC)))
def test_everything_printed_goes_through_the_exit(file: Path) -> None:
    if str(file.relative_to(SRC)) not in EXITS:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert not [f"line {node.lineno}: {ast.unparse(node)}" for node in ways_past(tree)]


@pytest.mark.parametrize(
    "code",
    [
        "print('x')",
        "print('x', file=sys.stderr)",
        "sys.stdout.write('x')",
        "write(sys.stderr)",
        "from sys import stdout",
        "from rich.console import Console",
        "from rich import print",
        "from rich.text import Text",
        "traceback.print_exc()",
        "sys.exit(f'error: {e}')",
        "raise SystemExit('no')",
        "os.write(1, b'x')",
        "track(steps, 'title')",
    ],
)
def test_ways_past_the_exit_are_recognised(code: str) -> None:
    assert list(ways_past(ast.parse(code)))


def test_what_only_asks_a_stream_is_no_way_past() -> None:
    code = "sys.stdout.isatty() or sys.exit(1)\ntrack(steps, console=console)\nself.line.print('x')"
    assert not list(ways_past(ast.parse(code)))
