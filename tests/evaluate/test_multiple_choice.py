"""Multiple-choice tasks: every documented form of row, prompts, and errors of bad rows.

test_harness.py tests that the prompts are those of lm-evaluation-harness.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from data_sets import complete_data

from gptsmith.evaluate.multiple_choice import TASKS, Question, load

HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof repair",
    "ctx_a": "A man is on a roof [title] He works.",
    "ctx_b": "he",
    "ctx": "A man is on a roof [title] He works. he",
    "endings": ["sings.", "[step] pulls  tiles.", "sleeps.", "flies."],
    "label": "1",
}
COMMON = {"query": "Question: Which is wet?", "choices": ["sand", "water"], "gold": 1}
ARC = {
    "id": "Mercury_1",
    "question": "Which is wet?",
    "choices": {"text": ["sand", "water"], "label": ["1", "2"]},
    "answerKey": "2",
}
AI2 = {
    "id": "Mercury_1",
    "question": {
        "stem": "Which is wet?",
        "choices": [{"text": "sand", "label": "A"}, {"text": "water", "label": "B"}],
    },
    "answerKey": "B",
}
PIQA = {"goal": "Which is wet?", "sol1": "sand", "sol2": "water", "label": 1}
WINOGRANDE = {
    "sentence": "The cup does not fit the box because the _ is too big.",
    "option1": "box",
    "option2": "cup",
    "answer": "2",
}
FOUNDRY = {
    "context_options": [f"The cup does not fit the box because the {x}" for x in ("box", "cup")],
    "continuation": "is too big.",
    "gold": 1,
}
# Questions in the complete files of the tasks whose real files are tested.
COMPLETE = {
    "hellaswag": 1000, "hellaswag_gpt2": 1000, "arc_easy": 2376, "arc_challenge": 1150,
    "piqa": 1838, "winogrande": 1267, "lambada": 5153, "mmlu": 14042,
}  # fmt: skip

Row = dict[str, Any]


def put(path: Path, *rows: Row) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "row"),
    [("arc_easy", ARC), ("arc_challenge", AI2), ("arc_easy", COMMON), ("piqa", PIQA)],
)
def test_question_and_answer_prompts(name: str, row: Row, tmp_path: Path) -> None:
    (question,) = load(name, put(tmp_path / "rows.jsonl", row))
    context = "Question: Which is wet?\nAnswer:"
    assert question.choices == ((context, " sand"), (context, " water"))
    assert question.answer == 1
    assert question.id == row.get("id", "rows.jsonl:1")


def test_hellaswag(tmp_path: Path) -> None:
    path = put(tmp_path / "rows.jsonl", HELLASWAG)
    (question,) = load("hellaswag", path)
    context = "Roof repair: A man is on a roof. He works. He"
    assert question.choices[0] == (context, " sings.")
    assert question.choices[1] == (
        context,
        "  pulls tiles.",
    )  # [step] leaves its space, as in the harness
    assert (question.id, question.answer) == ("24", 1)
    (plain,) = load("hellaswag_gpt2", path)
    assert plain.choices[1] == (HELLASWAG["ctx"], " [step] pulls  tiles.")


@pytest.mark.parametrize("row", [WINOGRANDE, FOUNDRY])
def test_winogrande(row: Row, tmp_path: Path) -> None:
    (question,) = load("winogrande", put(tmp_path / "rows.jsonl", row))
    start = "The cup does not fit the box because the"
    assert question.choices == ((f"{start} box", " is too big."), (f"{start} cup", " is too big."))
    assert question.answer == 1


@pytest.mark.parametrize(
    "row", [{"text": "He said: go home"}, {"context": "He said: go", "continuation": "home"}]
)
def test_lambada(row: Row, tmp_path: Path) -> None:
    (question,) = load("lambada", put(tmp_path / "rows.jsonl", row))
    assert question.choices == (("He said: go", " home"),)


def mmlu(folder: Path) -> Path:
    for split in ("test", "dev"):
        (folder / split).mkdir(parents=True)
        for subject in ("world_religions", "anatomy"):
            lines = [f'"{subject} {split} {i}, is it?",w,x,y,"z, z",{"ABCD"[i]}' for i in range(3)]
            (folder / split / f"{subject}_{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_mmlu_shows_examples_and_alternates_subjects(tmp_path: Path) -> None:
    questions = load("mmlu", mmlu(tmp_path), 3, shots=2)
    assert [q.id for q in questions] == [
        "anatomy_test.csv:1", "world_religions_test.csv:1", "anatomy_test.csv:2",
    ]  # fmt: skip
    options = "A. w\nB. x\nC. y\nD. z, z\nAnswer:"
    context = (
        "The following are multiple choice questions (with answers) about world religions.\n\n"
        f"world_religions dev 0, is it?\n{options} A\n\n"
        f"world_religions dev 1, is it?\n{options} B\n\n"
        f"world_religions test 0, is it?\n{options}"
    )
    assert questions[1].choices == tuple((context, f" {letter}") for letter in "ABCD")
    assert [q.answer for q in questions] == [0, 0, 1]
    assert len(load("mmlu", tmp_path, shots=0)) == 6
    with pytest.raises(ValueError, match=r"3 worked examples of anatomy in dev, 5 wanted"):
        load("mmlu", tmp_path)


def test_mmlu_in_the_form_of_the_hub(tmp_path: Path) -> None:
    row = {"question": " Why? ", "choices": ["w", "x", "y", "z"], "answer": 3}
    put(tmp_path / "dev" / "all.jsonl", row | {"subject": "global_facts"})
    put(tmp_path / "test" / "global_facts_test.jsonl", row)
    (question,) = load("mmlu", tmp_path, shots=1)
    asked = "Why?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    assert question.choices[0][0].endswith(f"about global facts.\n\n{asked} D\n\n{asked}")
    assert question.answer == 3


def test_limit_reads_no_further_rows(tmp_path: Path) -> None:
    path = put(tmp_path / "rows.jsonl", PIQA, PIQA, {"broken": 1})
    assert len(load("piqa", path, 2)) == 2


def subjects(questions: list[Question]) -> set[str]:
    return {question.id.partition("_test.csv")[0] for question in questions}


def test_real_files_are_found_by_name(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTSMITH_DATA", str(real_data))
    counts = {name: len(load(name)) for name in COMPLETE if name != "mmlu"}
    assert counts == dict.fromkeys(counts, 30)
    questions = load("mmlu")
    assert len(questions) == 30 + 3 * 8 + 3
    assert subjects(questions[:5]) == subjects(questions)
    assert len(subjects(questions)) == 5
    files = ("lambada/lambada_test.jsonl", "llm_foundry/lambada_openai.jsonl")  # in two forms
    first, second = (load("lambada", real_data / "eval" / file) for file in files)
    assert [question.choices for question in first] == [question.choices for question in second]


def test_complete_sets_are_read_completely() -> None:
    sizes = {
        "hellaswag/hellaswag_val_1000.jsonl": 747_257,
        "eval/arc/ARC-Challenge-Test.jsonl": 484_168,
        "eval/lambada/lambada_test.jsonl": 1_819_752,
        "eval/llm_foundry/arc_easy.jsonl": 636_665,
        "eval/llm_foundry/piqa.jsonl": 533_992,
        "eval/llm_foundry/winogrande.jsonl": 312_369,
        "eval/mmlu/test/*.csv": 6_366_061,
    }
    folder = complete_data(sizes)
    assert {name: len(load(name, folder)) for name in COMPLETE} == COMPLETE
    assert len(subjects(load("mmlu", folder, 57))) == 57


def test_folder_that_contains_the_file(tmp_path: Path) -> None:
    put(tmp_path / "piqa.jsonl", PIQA)
    put(tmp_path / "other.jsonl", ARC)
    assert len(load("piqa", tmp_path)) == 1
    with pytest.raises(FileNotFoundError, match=r"winogrande is not here as eval/llm_foundry/wino"):
        load("winogrande", tmp_path)
    with pytest.raises(FileNotFoundError, match="mmlu is not here as eval/mmlu/dev or mmlu/dev"):
        load("mmlu", tmp_path)


@pytest.mark.parametrize("name", TASKS)
def test_without_network_the_message_says_which_file_to_put_where(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GPTSMITH_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"put \S+ into a folder and set GPTSMITH_DATA"):
        load(name)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("piqa", ARC, "rows.jsonl:2: no column 'goal'; it has 'id', 'question'"),
        ("piqa", PIQA | {"sol1": None}, "rows.jsonl:2: 'sol1' is None, not text"),
        ("piqa", PIQA | {"label": 2}, "rows.jsonl:2: the answer is none of the 2 choices"),
        ("hellaswag", HELLASWAG | {"label": ""}, "'label' is '', not the number of a choice; a"),
        (
            "hellaswag",
            HELLASWAG | {"endings": "one"},
            "'endings' is 'one', not a list of two or more texts",
        ),
        ("arc_easy", ARC | {"answerKey": "E"}, "the answer is none of the 2 choices"),
        ("arc_easy", ARC | {"choices": {"text": ["a", "b"]}}, "'label' is None, not a list"),
        (
            "arc_easy",
            AI2 | {"question": {"stem": "x"}},
            "'label' is \\[\\], not a list of two or more",
        ),
        ("winogrande", WINOGRANDE | {"sentence": "Nothing."}, "'sentence' has no _"),
        ("winogrande", WINOGRANDE | {"answer": ""}, "'answer' is '', not the number"),
        ("winogrande", WINOGRANDE | {"answer": "0"}, "none of the 2 choices"),
        ("lambada", {"text": 3}, "'text' is 3, not text"),
        ("lambada", {"text": "ends in a space "}, "no last word after a text"),
        ("lambada", {"context": "a", "continuation": ""}, "no last word after a text"),
        ("lambada", {"text": "\ud800 b"}, "'text' is not Unicode at character 0"),
        ("hellaswag", HELLASWAG | {"endings": ["a", "\udfff"]}, "'endings' is not Unicode"),
        ("hellaswag", HELLASWAG | {"endings": ["a"]}, "not a list of two or more texts"),
        ("arc_easy", COMMON | {"gold": True}, "'gold' is True, not the number"),
    ],
)
def test_bad_row_is_named_by_file_and_line(
    name: str, row: Row, message: str, tmp_path: Path
) -> None:
    good = {"piqa": PIQA, "hellaswag": HELLASWAG, "arc_easy": ARC, "winogrande": WINOGRANDE}
    path = put(tmp_path / "rows.jsonl", good.get(name, {"text": "a b"}), row)
    with pytest.raises(ValueError, match=message) as error:
        load(name, path)
    assert "rows.jsonl:2: " in str(error.value)
    assert len(str(error.value).replace(str(tmp_path), "")) < 300


def test_unknown_task_missing_file_and_bad_csv(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no task 'boolq': choose among hellaswag, "):
        load("boolq")
    with pytest.raises(FileNotFoundError, match=r"no such file"):
        load("piqa", tmp_path / "missing.jsonl")
    mmlu(tmp_path / "m")
    (tmp_path / "m" / "test" / "anatomy_test.csv").write_text("only,three,fields\n")
    with pytest.raises(ValueError, match=r"anatomy_test.csv:1: 3 fields where the header has 6"):
        load("mmlu", tmp_path / "m", shots=1)
    (tmp_path / "m" / "test" / "anatomy_test.csv").write_text("q,a,b,c,d,E\n")
    with pytest.raises(
        ValueError, match=r"anatomy_test.csv:1: the answer is none of the 4 choices"
    ):
        load("mmlu", tmp_path / "m", shots=1)
