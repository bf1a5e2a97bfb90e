"""The command line: output, exit codes, error messages. Real processes where it matters."""

import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import BaseModel

import gptsmith
from gptsmith import cli

GPTSMITH = [sys.executable, "-m", "gptsmith"]


def run(*argv: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*GPTSMITH, *argv], capture_output=True, text=True, **options)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The single line on stderr of a command that rejected its input."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.rstrip("\n")


def test_help_lists_every_verb_and_every_verb_exists() -> None:
    text = run("--help").stdout
    assert re.findall(r"^  (\w+) {2,}\S", text, re.MULTILINE) == list(cli.VERBS)
    assert run().stdout == run("help").stdout == run("-h").stdout == text
    for module, _ in cli.VERBS.values():
        assert callable(import_module(f"gptsmith.{module}").main)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb: str) -> None:
    done = run(verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"gptsmith {verb}" in done.stdout.partition("\n")[0]


def test_help_imports_the_standard_library_only() -> None:
    script = (
        "import sys; there = set(sys.modules); from gptsmith import cli; cli.main(['--help'])\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - there})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.splitlines()[-1].split()) - sys.stdlib_module_names == {"gptsmith"}


@pytest.mark.parametrize(
    "argv",
    [
        "prepare --help",
        "prepare --format chat --help",
        "prepare --worker 3",
        "inspect --to",
        "evaluate --help",
        "evaluate x --tasks helaswag",
        "classify --help",
        "generate --help",
        "chat --help",
        "demo --help",
        "doctor --help",
    ],
)
def test_help_and_wrong_flags_do_not_import_torch(argv: str) -> None:
    script = (
        "import sys; from gptsmith import cli; cli.main(sys.argv[1:]); "
        "raise SystemExit(sorted({'torch', 'pyarrow', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, *argv.split()], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_version() -> None:
    assert run("--version").stdout == f"gptsmith {gptsmith.__version__}\n"


def test_the_console_script_is_the_same_command() -> None:
    script = Path(sys.executable).with_name("gptsmith")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"gptsmith {gptsmith.__version__}\n"


def test_unknown_verb_suggests_the_nearest() -> None:
    assert complaint(run("pretain")) == "gptsmith: unknown verb 'pretain': did you mean pretrain?"
    assert complaint(run("eval")).endswith("did you mean evaluate?")
    assert "choose from demo, prepare" in complaint(run("zzz"))
    assert "unknown verb '--zzz'" in complaint(run("--zzz"))


# --- how a verb may end, seen through a verb of our own -----------------------------------------

Ending = BaseException | int | None


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch):
    """Makes `gptsmith probe` raise or return something; gives what main returns."""

    def end(how: Ending, *words: str) -> int:
        def probe(argv: list[str]) -> int | None:
            assert argv == [word for word in words if word != "--debug"]
            if isinstance(how, BaseException):
                raise how
            return how

        monkeypatch.setitem(sys.modules, "gptsmith.probe", SimpleNamespace(main=probe))
        monkeypatch.setitem(cli.VERBS, "probe", ("probe", "a test"))
        return cli.main(["probe", *words])

    return end


def bad_numbers() -> Exception:
    class Numbers(BaseModel):
        n: int
        m: int

    try:
        Numbers(n="x", m="y")
    except ValueError as error:
        return error
    raise AssertionError


def noted(error: BaseException) -> BaseException:
    error.add_note("nothing was saved")
    return error


@pytest.mark.parametrize(
    ("how", "code", "line"),
    [
        (None, 0, ""),
        (0, 0, ""),
        (75, 75, ""),
        (SystemExit(0), 0, ""),
        (ValueError("bad\n  thing"), 2, "gptsmith probe: bad thing\n"),
        (
            FileNotFoundError("no run runs/x: make one"),
            2,
            "gptsmith probe: no run runs/x: make one\n",
        ),
        (FileNotFoundError(2, "No such file", "x.txt"), 2, "gptsmith probe: x.txt: No such file\n"),
        (
            PermissionError(13, "Permission denied", "x"),
            2,
            "gptsmith probe: x: Permission denied\n",
        ),
        (FileExistsError("x is there"), 2, "gptsmith probe: x is there\n"),
        (IsADirectoryError(21, "Is a directory", "x"), 2, "gptsmith probe: x: Is a directory\n"),
        (OSError(36, "File name too long", "x"), 2, "gptsmith probe: x: File name too long\n"),
        (
            OSError(28, "No space left", "x"),
            1,
            "gptsmith probe: OSError: x: No space left (run "
            "again with --debug for the traceback)\n",
        ),
        (KeyboardInterrupt(), 130, "gptsmith probe: interrupted\n"),
        (noted(ValueError("bad")), 2, "gptsmith probe: bad; nothing was saved\n"),
        (noted(KeyboardInterrupt()), 130, "gptsmith probe: interrupted; nothing was saved\n"),
        (
            RuntimeError("odd"),
            1,
            "gptsmith probe: RuntimeError: odd (run again with --debug for the traceback)\n",
        ),
    ],
    ids=repr,
)
def test_exit_codes_and_one_line_messages(
    ending, capsys: pytest.CaptureFixture[str], how: Ending, code: int, line: str
) -> None:
    assert ending(how) == code
    assert capsys.readouterr() == ("", line)


def test_a_pydantic_error_is_one_line(ending, capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(bad_numbers()) == 2
    line = capsys.readouterr().err
    assert line.startswith("gptsmith probe: n: Input should be a valid integer")
    assert line.count("\n") == 1


def test_long_message_keeps_the_place_and_the_remedy(
    ending, capsys: pytest.CaptureFixture[str]
) -> None:
    message = f"data.csv:3: {'word ' * 200}: give --text-column"
    for long in (message, message.replace(" ", "_")):
        assert ending(ValueError(long)) == 2
        line = capsys.readouterr().err
        assert line.startswith("gptsmith probe: data.csv:3:")
        assert line.endswith("column\n")
        assert len(line) < 320
        assert " [... --debug shows all ...] " in line
        assert ending(ValueError(long), "--debug") == 2
        assert capsys.readouterr().err.endswith(f"gptsmith probe: {long}\n")
    assert ending(ValueError("x" * 300)) == 2
    assert capsys.readouterr().err == f"gptsmith probe: {'x' * 300}\n"


@pytest.mark.parametrize("words", [("--debug", "a"), ("a", "--debug"), ("a", "--debug", "--", "b")])
def test_debug_shows_the_traceback(
    ending, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert ending(ValueError("bad"), *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("gptsmith probe: bad\n")


def test_debug_after_a_double_dash_is_an_argument(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    monkeypatch.setitem(sys.modules, "gptsmith.demo", SimpleNamespace(main=seen.extend))
    cli.main(["demo", "--", "--debug"])
    assert seen == ["--", "--debug"]
    assert capsys.readouterr() == ("", "")


def test_closed_pipe_is_not_an_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*GPTSMITH, "--help"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(("stream", "word", "code"), [(1, "--version", 0), (2, "nonsense", 2)])
def test_closed_standard_streams_are_replaced(stream: int, word: str, code: int) -> None:
    script = f"from gptsmith import cli; raise SystemExit(cli.main(['{word}']))"
    command = f'{sys.executable} -c "{script}" {stream}>&-'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("word", ["--help", "recipes"])
def test_full_disk_behind_standard_output_is_reported(word: str, unbuffered: str) -> None:
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*GPTSMITH, word], stdout=full, stderr=subprocess.PIPE, text=True, env=env
        )
    assert done.returncode == 1
    assert "standard output: No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


def test_ctrl_c_exits_with_130_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(
        "import sys, time\n"
        "from gptsmith import cli\n"
        "def main(argv):\n"
        "    print('on', flush=True)\n"
        "    time.sleep(60)\n"
        "cli.VERBS['probe'], sys.modules['gptsmith.probe'] = ('probe', ''), sys.modules['probe']\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", "import probe; raise SystemExit(probe.cli.main(['probe']))"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "gptsmith probe: interrupted\n")
    assert process.returncode == 130
