"""Files of instructions: rows and columns, and the split."""

import random
from pathlib import Path

import numpy as np
import pytest
from data_sets import complete_data
from instruction_rows import BPE, ROWS, encoded, row
from tables import write

from gptsmith.data.instructions import (
    Instruction,
    InstructionSplit,
    read_instructions,
    split_instructions,
)
from gptsmith.data.options import InstructionColumns, SplitConfig
from gptsmith.data.report import ReadReport
from gptsmith.tokenizer import Tokenizer


def read(path: Path, **columns: str) -> tuple[list[Instruction], ReadReport]:
    report = ReadReport()
    return list(read_instructions(path, InstructionColumns(**columns), report)), report


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_file_formats(tmp_path, name):
    path = write(tmp_path / name, *ROWS)
    rows, report = read(path)
    assert [(r.instruction, r.input, r.output) for r in rows] == [tuple(r.values()) for r in ROWS]
    assert all(r.place.startswith(str(path)) for r in rows)
    assert not report.skipped.total


def test_configured_columns(tmp_path):
    path = write(tmp_path / "qa.jsonl", {"question": "Why?", "answer": "So.", "context": "c"})
    rows, _ = read(path, instruction="question", output="answer")
    assert (rows[0].instruction, rows[0].input, rows[0].output) == ("Why?", "c", "So.")
    rows, _ = read(path, instruction="question", input="context", output="answer")
    assert rows[0].input == "c"


def test_blank_rows_are_counted_with_their_places(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "Do.", "output": " \n"},
        {"instruction": "", "input": "x", "output": "y"},
        {"instruction": "Do.", "input": None, "output": None},
        {"instruction": "Do.", "input": " ", "output": "y"},
    )
    rows, report = read(path)
    assert [r.input for r in rows] == [""]
    assert report.lines() == [
        "skipped 3 of 4 records (75.0%)",
        f"skipped, no answer: 2 ({path}:1, {path}:3)",
        f"skipped, no instruction: 1 ({path}:2)",
    ]


@pytest.mark.parametrize(
    ("line", "columns", "says"),
    [
        ('{"question": "a", "output": "b"}', {}, "--columns.instruction NAME"),
        ('{"instruction": "a", "answer": "b"}', {}, "'instruction', 'answer'"),
        ('{"instruction": "a", "output": "b"}', {"output": "reply"}, "no column 'reply'"),
        ('{"instruction": "a", "output": "b"}', {"input": "context"}, "'context'"),
        ('{"instruction": "a", "output": [5]}', {}, "'output' holds a list, not text: [5]"),
        ('{"instruction": "a", "input": {}, "output": {"b": 1}}', {}, "holds a struct, not text"),
        ('{"instruction": "a", "context": ["x"], "output": "b"}', {}, "'context' holds a list"),
        ('{"instruction": "a", "output": "b", "history": [["c", "d"]]}', {}, "finetune chat"),
        ('{"instruction": "a", "output": "b", "tools": [{"name": "c"}]}', {}, "it has tools"),
        ('{"instruction": "a", "output": "b", "weight": 0.5}', {}, "weight 0.5: an answer is"),
        ('{"instruction": "a", "output": "b", "image": "x.png"}', {}, "it has image"),
        ('{"instruction": "a", "output": "\\ud800"}', {}, "not Unicode at character 0"),
        ("[1, 2", {}, "not JSON"),
        ('{"input_ids": [1], "labels": [1]}', {}, "finetune chat trains on them"),
    ],
)
def test_errors_name_the_row(tmp_path, line, columns, says):
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: ") as error:
        read(path, **columns)
    assert says in str(error.value)


def test_cells_that_are_not_text(tmp_path):
    """Numbers are text; null and not-a-number are no text."""
    nan = float("nan")
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "Add.", "input": 0, "output": 5},
        {"instruction": "Add.", "input": nan, "output": 2.5},
        {"instruction": None, "output": "a"},
        {"instruction": nan, "output": "a"},
        {"instruction": "Add.", "output": nan},
        {"instruction": "Add.", "output": "a", "weight": 0},
    )
    found, report = read(path)
    assert [(r.instruction, r.input, r.output) for r in found] == [
        ("Add.", "0", "5"), ("Add.", "", "2.5"),
    ]  # fmt: skip
    assert report.skipped.counts() == {"no answer": 1, "no instruction": 2, "weight 0": 1}


def test_names_of_columns_in_any_case(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Instruction,INPUT,Output \nAdd.,2 3,5\n")
    (found,), report = read(path)
    assert (found.instruction, found.input, found.output) == ("Add.", "2 3", "5")
    assert not report.hints


def test_answers_marked_as_undesirable_are_no_targets(tmp_path):
    row = {"instruction": "Name a fruit.", "output": "Granite."}
    rows = [row | {"label": False}, row | {"label": "False"}, row | {"kto_tag": False}]
    good = [row | {"label": True}, row | {"kto_tag": True}, row | {"label": 0, "class": "no"}]
    found, report = read(write(tmp_path / "a.jsonl", *rows, *good))
    assert [int(r.place.rpartition(":")[2]) for r in found] == [4, 5, 6]
    assert report.skipped.counts() == {"weight 0": 3}
    assert list(report.hints) == [
        "answers of which column 'label' is false are not trained on",
        "answers of which column 'kto_tag' is false are not trained on",
        "column 'label' is not used",
        "column 'class' is not used",
    ]


@pytest.mark.parametrize("name", ["cot", "Complex_CoT", "rationale", "reasoning", "explanation"])
def test_reasoning_in_a_column_is_said_to_be_left_out(tmp_path, name):
    path = write(tmp_path / "a.jsonl", ROWS[0] | {name: "Red is one."}, ROWS[0] | {name: None})
    found, report = read(path)
    assert [r.output for r in found] == ["Red."] * 2
    assert list(report.hints) == [
        f"column {name!r} is not used: answers are trained on without this reasoning, unless you "
        "write it into them"
    ]


def test_columns_beside_the_instruction_are_used_or_mentioned(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "Who won?", "context": "Boat 2 won.", "output": "Boat 2.", "id": 7},
        {"instruction": "Who won?", "input": "Boat 3 won.", "output": "Boat 3.", "mood": "calm"},
        {"instruction": "Hi", "system": "Be brief.", "output": "Ho", "history": [], "tools": "[]"},
    )
    found, report = read(path)
    assert [(r.input, r.system) for r in found] == [
        ("Boat 2 won.", ""), ("Boat 3 won.", ""), ("", "Be brief."),
    ]  # fmt: skip
    assert list(report.hints) == ["column 'mood' is not used"]
    texts = [BPE.decode(example.ids) for _, example in encoded(found, BPE)[0]]
    assert "### Input:\nBoat 2 won." in texts[0]
    assert texts[2].startswith("Be brief.\n\n### Instruction:\nHi\n")


def test_columns_to_choose_from_are_spelled_as_in_the_file(tmp_path):
    path = write(tmp_path / "a.jsonl", {" INSTRUCTION ": "Hi", "RESPONSE": "Ho"})
    with pytest.raises(ValueError, match="choose the output from ' INSTRUCTION ', 'RESPONSE' with"):
        read(path)
    assert [r.output for r in read(path, output="RESPONSE")[0]] == ["Ho"]


# --- split ---------------------------------------------------------------------------------------


def split(rows: list[Instruction], **shares: float) -> InstructionSplit:
    return split_instructions(rows, SplitConfig(**shares))


def test_split_has_exact_shares_of_prompts():
    rows = [row(f"Question {n % 100}", output=f"answer {n}") for n in range(300)]
    parts = split(rows, val_fraction=0.2, test_fraction=0.1)
    assert [len(p) for p in (parts.train, parts.val, parts.test)] == [210, 60, 30]
    prompts = [{r.instruction for r in p} for p in (parts.train, parts.val, parts.test)]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) == 100
    assert sorted(map(rows.index, parts.train)) == list(map(rows.index, parts.train))


def test_split_ignores_case_and_white_space():
    same = [row("Name a  colour. "), row("name a colour."), row("Name a\ncolour.")]
    rows = [row(f"Question {n}") for n in range(9)] + same
    for seed in range(8):
        parts = split(rows, val_fraction=0.3, test_fraction=0.3, split_seed=seed)
        counts = [sum(r in same for r in p) for p in (parts.train, parts.val, parts.test)]
        assert sorted(counts) == [0, 0, 3]


def test_split_depends_on_seed_and_text_alone():
    def tested(rows: list[Instruction], seed: int = 0) -> set[str]:
        parts = split(rows, val_fraction=0.2, test_fraction=0.2, split_seed=seed)
        return {r.instruction for r in parts.test}

    rows = [row(f"Question {n}") for n in range(50)]
    first = tested(rows)
    assert tested(random.Random(1).sample(rows, len(rows))) == first
    assert tested(rows, seed=1) != first
    # when a file grows, most prompts stay in their split
    assert len(tested([*rows, row("another")]) & first) >= 9


def test_split_without_test_rows():
    rows = [row(str(n)) for n in range(10)]
    assert split(rows, val_fraction=0.1, test_fraction=0).test == []


@pytest.mark.parametrize(
    ("rows", "shares"), [(3, {}), (10, {"val_fraction": 0.5, "test_fraction": 0.5}), (0, {})]
)
def test_split_of_too_few_rows(rows, shares):
    with pytest.raises(ValueError, match=f"^{rows} different prompts .* use more rows"):
        split([row(str(n)) for n in range(rows)], **shares)


def check_encoded(rows):
    """Every row is encoded or skipped with a reason, and only its answer is a target."""
    byte = Tokenizer.byte()
    found, report = encoded(rows, byte, T=1024)
    assert len(found) + report.skipped.total == len(rows)
    for kept, example in found:
        scored = example.ids[example.labels != -100]
        assert byte.decode(scored) == kept.output + "<|endoftext|>"
        assert example.ids.dtype == np.int32


def test_real_instructions(real_data):
    rows, report = read(real_data / "instruction_data" / "instruction-data.json")
    assert len(rows) == 60
    assert not report.skipped.total
    assert 0 < sum(bool(row.input) for row in rows) < 60
    parts = split(rows)
    assert [len(p) for p in (parts.train, parts.val, parts.test)] == [54, 3, 3]
    check_encoded(rows)


def test_alpaca():
    """All 52,002 rows: 28 have no answer, and the shares are exact."""
    name = "alpaca/alpaca_data.json"
    rows, report = read(complete_data({name: 22_773_992}) / name)
    assert len(rows) == 51_974
    assert report.skipped.counts() == {"no answer": 28}
    parts = split(rows)
    assert [len(p) for p in (parts.train, parts.val, parts.test)] == [46_776, 2_599, 2_599]
    check_encoded(parts.test[:200])
