"""A multiple-choice file of one's own: columns, choices, answers in the forms that people use."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from gptsmith.data.report import ReadReport
from gptsmith.evaluate.multiple_choice import Question, load, load_task

Row = dict[str, Any]

ASK = {"question": "Which is wet?"}
CHOICES = ["sand", "water", "iron"]
COLUMNS = {"A": "sand", "B": "water", "C": "iron"}


def jsonl(folder: Path, *rows: Row, name: str = "quiz.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(folder: Path, *rows: Row) -> Path:
    with (folder / "quiz.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*dict.fromkeys(name for row in rows for name in row)])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "quiz.csv"


def texts(question: Question) -> list[str]:
    return [text for _, text in question.choices]


@pytest.mark.parametrize(
    "row",
    [
        ASK | {"choices": CHOICES, "answer": "B"},
        ASK | {"choices": CHOICES, "answer": "b)"},
        ASK | {"choices": CHOICES, "answer": "water"},
        ASK | {"options": CHOICES, "label": " Water "},
        ASK | {"choices": {"text": CHOICES, "label": ["A", "B", "C"]}, "answerKey": "B"},
        ASK | {"choices": {"text": CHOICES, "label": ["1", "2", "3"]}, "answerKey": "2"},
        ASK | {"choices": {"text": CHOICES, "label": ["x", "y", "z"]}, "answer": "y"},
        ASK | {"choices": [{"text": t, "label": a} for t, a in zip(CHOICES, "ABC", strict=True)],
               "answerKey": "B"},
        ASK | {"options": COLUMNS, "answer": "water", "answer_idx": "B"},
        ASK | {"options": [f"{a}) {t}" for a, t in COLUMNS.items()], "correct": "B"},
        ASK | {"options": [f"{a}) {t}" for a, t in COLUMNS.items()], "correct": "B) water"},
        ASK | COLUMNS | {"answer": "B"},
        ASK | {f"option_{a.lower()}": t for a, t in COLUMNS.items()} | {"answer": "option_b"},
        ASK | {f"op{a.lower()}": t for a, t in COLUMNS.items()} | {"answer": "Option B"},
        ASK | {f"Choice {i}": t for i, t in enumerate(CHOICES, 1)} | {"Correct Answer": "water"},
        ASK | {"answerA": "sand", "answerB": "water", "answerC": "iron", "label": "B"},
        {"query": "Question: Which is wet?\n", "choices": CHOICES, "answer": "B"},
        {"q": "Which is wet?", "a": "sand", "b": "water", "c": "iron", "ans": ["b"]},
        {"question": {"stem": "Which is wet?", "choices": [
            {"text": t, "label": n} for n, t in enumerate(CHOICES, 1)]}, "answerKey": 2},
    ],
)  # fmt: skip
def test_forms_of_choices_and_answers(row: Row, tmp_path: Path) -> None:
    (question,) = load(str(jsonl(tmp_path, row)))
    assert question.choices[0] == ("Question: Which is wet?\nAnswer:", " sand")
    assert texts(question) == [" sand", " water", " iron"]
    assert question.answer == 1


@pytest.mark.parametrize(
    ("cell", "answer"),
    [
        ('["sand", "water", "iron"]', "B"),
        ("['sand', 'water', 'iron']", "water"),
        ("{'text': ['sand', 'water', 'iron'], 'label': ['A', 'B', 'C']}", "B"),
        ('{"A": "sand", "B": "water", "C": "iron"}', "B"),
        ("['sand' 'water' 'iron']", "water"),  # numpy
        ("['sand' 'water'\n 'iron']", "B"),
        ("{'text': array(['sand', 'water', 'iron'], dtype=object), "
         "'label': array(['A', 'B', 'C'])}", "B"),
        ("[sand, water, iron]", "water"),
        ("sand|water|iron", "water"),
        ("A. sand\nB. water\nC. iron", "B"),
    ],
)  # fmt: skip
def test_choices_in_a_cell_of_a_csv(cell: str, answer: str, tmp_path: Path) -> None:
    (question,) = load(str(table(tmp_path, ASK | {"choices": cell, "answer": answer})))
    assert texts(question) == [" sand", " water", " iron"]
    assert question.answer == 1


def test_texts_in_a_list_of_a_csv_are_those_that_were_written(tmp_path: Path) -> None:
    lists = (['it\'s "wet"', "a\nb\\n", "50%"], ["1/2", "é", " - "], ["[x]", "#y", "z: 1"])
    for written in (str, json.dumps):
        for choices in lists:
            row = ASK | {"choices": written(choices), "answer": "A"}
            (question,) = load(str(table(tmp_path, row)))
            assert texts(question) == [f" {choice.strip()}" for choice in choices]


def test_json_in_a_cell_of_a_csv_is_read_as_written(tmp_path: Path) -> None:
    cell = '{"A": "\\ud83d\\ude00", "B": 0.50, "C": 1e3, "D": null}'
    (question,) = load(str(table(tmp_path, ASK | {"choices": cell, "answer": "B"})))
    assert texts(question) == [" \N{GRINNING FACE}", " 0.50", " 1e3"]


def test_wrong_answers_beside_the_right_one(tmp_path: Path) -> None:
    columns = {"correct_answer": "water", "distractor1": "sand", "distractor2": "iron"}
    listed = {"answer": "water", "incorrect_answers": ["sand", "iron"]}
    for row in (columns, listed):
        (question,) = load(str(jsonl(tmp_path, ASK | row)))
        assert texts(question) == [" sand", " iron", " water"]
        assert question.answer == 2


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([0, 1, 2], [0, 1, 2]),
        ([1, 2, 3], [0, 1, 2]),
        (["0", "1", "1"], [0, 1, 1]),
        (["3", "1", "1"], [2, 0, 0]),
        ([2.0, 0.0, 1.0], [2, 0, 1]),
    ],
)
def test_numbers_from_0_and_from_1_are_told_apart(
    answers: list[Any], expected: list[int], tmp_path: Path
) -> None:
    rows = [ASK | {"choices": CHOICES, "answer": answer} for answer in answers]
    path = jsonl(tmp_path, *rows)
    assert [q.answer for q in load(str(path))] == expected
    # the whole file tells, even where only a part of it is used
    assert [q.answer for q in load(str(path), limit=1)] == expected[:1]


def test_uncertain_numbers_need_an_option(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path, *(ASK | {"choices": CHOICES, "answer": n} for n in (1, 2, 1))))
    with pytest.raises(ValueError, match=r"quiz.jsonl:1: the answer 1 can be read as numbers from "
                       "0 or as numbers from 1, .*: --first-choice 0 or 1"):  # fmt: skip
        load(path)
    assert [q.answer for q in load_task(path, first_choice=0)[1]] == [1, 2, 1]
    assert [q.answer for q in load_task(path, first_choice=1)[1]] == [0, 1, 0]


def test_choices_that_are_numbers(tmp_path: Path) -> None:
    """A text that could be an index: the rest of the file tells."""
    rows = [
        {"question": "1 + 1", "choices": ["1", "2", "3", "4"], "answer": "2"},
        {"question": "3 + 4", "choices": ["5", "6", "7", "8"], "answer": "7"},
    ]
    assert [q.answer for q in load(str(jsonl(tmp_path, *rows)))] == [1, 2]
    with pytest.raises(ValueError, match="can be read as texts or as numbers from 0"):
        load(str(jsonl(tmp_path, rows[0])))


def test_numbers_of_choices_differ_between_rows(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "A": "x", "B": "y", "C": "z", "D": "w", "answer": "D"},
        {"question": "b", "A": "x", "B": "y", "C": "", "D": "", "answer": "A"},
    ]
    assert [len(q.choices) for q in load(str(table(tmp_path, *rows)))] == [4, 2]
    with pytest.raises(ValueError, match=r"quiz.csv:3: the answer 'C' is none of the 2 choices"):
        load(str(table(tmp_path, rows[0], rows[1] | {"answer": "C"})))
    with pytest.raises(ValueError, match=r"quiz.csv:3: the choices are \['x', '', 'z'\]"):
        load(str(table(tmp_path, rows[0], rows[1] | {"B": "", "C": "z"})))


def test_context_is_part_of_the_prompt_and_unused_columns_are_named(tmp_path: Path) -> None:
    row = ASK | COLUMNS | {"answer": "B", "passage": "It rains.", "why": "rain", "level": 3}
    task, (question,) = load_task(str(jsonl(tmp_path, row)))
    assert question.choices[0][0] == "It rains.\nQuestion: Which is wet?\nAnswer:"
    [note] = task.notes
    assert note.endswith("columns that are not used: why, level")


def test_piqa_in_two_files(tmp_path: Path) -> None:
    rows = [{"goal": "Which is wet?", "sol1": "sand", "sol2": "water", "id": n} for n in range(3)]
    jsonl(tmp_path, *rows, name="valid.jsonl")
    (tmp_path / "valid-labels.lst").write_text("1\n0\n1\n")
    for name, where in (("piqa", tmp_path), ("piqa", tmp_path / "valid.jsonl"),
                        (str(tmp_path / "valid.jsonl"), None)):  # fmt: skip
        questions = load(name, where)
        assert [q.answer for q in questions] == [1, 0, 1]
        assert texts(questions[0]) == [" sand", " water"]
        assert questions[0].choices[0][0] == "Question: Which is wet?\nAnswer:"
    (tmp_path / "valid-labels.lst").write_text("1\n0\n")
    with pytest.raises(ValueError, match=r"has 3 questions, .*valid-labels.lst 2 labels"):
        load("piqa", tmp_path, limit=1)
    (tmp_path / "valid-labels.lst").unlink()
    with pytest.raises(ValueError, match=r"with its -labels.lst beside it"):
        load("piqa", tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": CHOICES, "answer": "B"}, "no column for the question, only 'choices', 'ans"),
        (ASK | {"answer": "B"}, "no column for the choices, .*: call it choices, with a list, or"),
        (ASK | COLUMNS, "no column for the answer, .*: call it answer"),
        (ASK | {"choices": CHOICES, "answer": "D"}, "the answer 'D' is none of the 3 choices"),
        (ASK | {"choices": CHOICES, "answer": None}, "it has no answer in 'answer'"),
        (ASK | {"choices": CHOICES, "answer": True}, "the answer True is none of the 3 choices"),
        (ASK | {"choices": ["sand"], "answer": "A"}, r"the choices are \['sand'\], not two or"),
        (
            ASK | {"choices": "sand, water", "answer": "A"},
            r"the choices 'sand, water' are one text: separate them by \|",
        ),
        (ASK | {"choices": ["a", None], "answer": "A"}, "the choices are"),
        (ASK | {"choices": ["a", "\ud800"], "answer": "A"}, "'choice' is not Unicode"),
        ({"question": 3, "choices": CHOICES, "answer": "A"}, "'question' is 3, not text"),
    ],
)
def test_bad_row_is_one_line_with_its_place(row: Row, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"quiz.jsonl:1: {message}") as error:
        load(str(jsonl(tmp_path, row)))
    assert "\n" not in str(error.value)


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    good = ASK | {"choices": CHOICES, "answer": "B"}
    path = jsonl(tmp_path, good, good | {"answer": "E"}, good | {"choices": []}, good)
    task, questions = load_task(str(path), report=ReadReport("skip"))
    assert len(questions) == 2
    assert any("unusable row: 1 (" in note for note in task.notes)
    assert any("answer that is no choice: 1 (" in note for note in task.notes)


def test_ids_are_unique(tmp_path: Path) -> None:
    row = ASK | {"choices": CHOICES, "answer": "B", "id": "x"}
    assert [q.id for q in load(str(jsonl(tmp_path, row, row, row)))] == ["x", "x (2)", "x (3)"]
