"""The checks of the course: they accept right solutions, and name what is wrong with others."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import wrong_solutions
from wrong_solutions import Wrong

from course import check

ROOT = Path(__file__).resolve().parents[2]
COURSE, SOLUTIONS = ROOT / "course", Path(__file__).parent / "solutions"
STUBS = {path.name[4]: path for path in COURSE.glob("part*.py")}
EXERCISES = check.exercises()
WRONG = [wrong for n in "1234" for wrong in getattr(wrong_solutions, f"PART{n}")]


def part(number: str) -> str:
    return number.partition(".")[0]


@pytest.fixture(autouse=True)
def _gpt2_tables(real_data: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setenv("GPTSMITH_DATA", str(real_data))


@pytest.mark.parametrize("number", EXERCISES)
@pytest.mark.parametrize("whose", ["gptsmith's", "a student's"])
def test_right_solutions_pass(number: str, whose: str) -> None:
    folder = COURSE / "reference" if whose == "gptsmith's" else SOLUTIONS
    solution = check.load(folder / f"part{part(number)}.py")
    outcome = check.check(number, EXERCISES[number], solution)
    assert outcome.state == "passed", f"{outcome.property}\n{outcome.reason}"
    assert len(outcome.passed) == len(set(outcome.passed)) > 0


@pytest.mark.parametrize("number", EXERCISES)
def test_stubs_fail_with_their_number(number: str) -> None:
    outcome = check.check(number, EXERCISES[number], check.load(STUBS[part(number)]))
    assert outcome.state == "open"
    order = list(EXERCISES)  # a forward pass also needs the set-up before it
    assert order.index(outcome.reason.removeprefix("exercise ")) <= order.index(number)


@pytest.mark.parametrize("wrong", WRONG, ids=[f"{w.exercise} {w.property}" for w in WRONG])
def test_wrong_solutions_are_rejected_by_the_property_that_names_them(
    wrong: Wrong, tmp_path: Path
) -> None:
    text = (SOLUTIONS / f"part{part(wrong.exercise)}.py").read_text(encoding="utf-8")
    assert wrong.old in text
    file = tmp_path / "wrong.py"
    file.write_text(text.replace(wrong.old, wrong.new, 1), encoding="utf-8")
    outcome = check.check(wrong.exercise, EXERCISES[wrong.exercise], check.load(file))
    assert outcome.state == "failed", outcome
    assert outcome.property.startswith(wrong.property), (outcome.property, outcome.reason)
    assert outcome.reason
    assert "\n" not in outcome.reason


@pytest.mark.parametrize("number", EXERCISES)
def test_each_exercise_has_three_wrong_solutions(number: str) -> None:
    assert sum(wrong.exercise == number for wrong in WRONG) >= 3


def test_a_solution_that_exits_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import sys\nsys.exit()\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine.py ends the program when it is loaded"):
        check.load(file)
    text = (SOLUTIONS / "part1.py").read_text(encoding="utf-8")
    inside = text.replace("super().__init__()", "raise SystemExit(0)", 1)
    file.write_text(inside, encoding="utf-8")
    outcome = check.check("1.1", EXERCISES["1.1"], check.load(file))
    assert (outcome.state, outcome.reason) == ("failed", "SystemExit: 0 (line 17 of your file)")


def test_the_command_reports_each_exercise(tmp_path: Path) -> None:
    text = (SOLUTIONS / "part1.py").read_text(encoding="utf-8")
    file = tmp_path / "mine.py"
    file.write_text(text.replace("diagonal=1", "diagonal=2"), encoding="utf-8")
    command = [sys.executable, "-m", "course.check", str(file), "1.3", "1.4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["1.3", "MultiHeadAttention,", "set-up", "ok", "(2", "properties)"]
    assert lines[1].split() == ["1.4", "MultiHeadAttention,", "forward", "FAILED"]
    assert "      FAILS: causality: no position sees a later one" in lines
    assert "             the output at position 4 changes with position 5" in lines
    assert lines[-1] == "1 of 2 exercises pass"


def test_exercises_of_a_file_are_those_that_it_defines() -> None:
    """Part 2 imports gptsmith's GPTModel, which is no solution of part 1."""
    chosen = check.select([], check.load(SOLUTIONS / "part2.py"))
    assert [*chosen] == ["2.1", "2.2", "2.3", "2.4"]


def test_the_commands_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (COURSE / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m course\.check (.*)$", page, re.MULTILINE)
    assert len(commands) >= 2
    for words in commands:
        assert check.main(words.replace("course/", f"{COURSE}/").split()) == 1
        assert "not done yet" in capsys.readouterr().out
    for number in EXERCISES:
        assert f"| {number} |" in page


def test_wrong_calls_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.py").write_text("")
    for words, message in [
        ((tmp_path / "none.py",), "there is no such Python file"),
        ((COURSE / "part1_model.py", "9.9"), "there is no exercise 9.9: they are 1.1, 1.2"),
        ((tmp_path / "empty.py",), "has none of the classes and functions of the course"),
        ((tmp_path / "empty.py", "1.4"), "has no MultiHeadAttention, which exercise 1.4 needs"),
    ]:
        with pytest.raises(SystemExit) as ended:
            check.main([*map(str, words)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
