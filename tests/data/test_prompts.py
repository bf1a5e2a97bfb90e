"""Prompts for reinforcement learning: the forms of rows, splits, and the built-in questions."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from chats import OURS

from gptsmith.data.options import PromptFiles
from gptsmith.data.prompts import (
    Prompt,
    encode_prompts,
    fingerprint,
    read_prompts,
    split_prompts,
)
from gptsmith.data.report import ReadReport


def read(tmp_path: Path, *rows: object, needs_answer: bool = False, **options: str) -> list[Prompt]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = PromptFiles(**options)
    return list(read_prompts([path], files, ReadReport(files.on_error), needs_answer))


def encode(messages: Any, tools: Any) -> list[int]:
    return OURS.prompt(messages, tools=tools)


def asked(prompt: Prompt) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in prompt.messages]


ASK = [{"role": "user", "content": "2 + 2?"}]
ANSWERED = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    ("row", "messages", "answer"),
    [
        ({"question": "2 + 2?", "answer": "4"}, [("user", "2 + 2?")], "4"),
        ({"prompt": "2 + 2?", "ground_truth": 4}, [("user", "2 + 2?")], "4"),
        ({"prompt": ASK, "solution": "4"}, [("user", "2 + 2?")], "4"),
        ({"prompt": ASK, "completion": [ANSWERED]}, [("user", "2 + 2?")], "4"),
        ({"messages": [*ASK, ANSWERED]}, [("user", "2 + 2?")], "4"),
        ({"messages": ASK, "answer": "4"}, [("user", "2 + 2?")], "4"),
        (
            {"instruction": "Add", "input": "2 and 2", "output": "4"},
            [("user", "Add\n\n2 and 2")],
            "4",
        ),
        *(
            (
                {"prompt": prompt, "history": [["Hi", "Yes?"]]},
                [("user", "Hi"), ("assistant", "Yes?"), ("user", "2 + 2?")],
                None,
            )
            for prompt in ("2 + 2?", ASK)
        ),
        (
            {"system": "Short.", "question": "2 + 2?"},
            [("system", "Short."), ("user", "2 + 2?")],
            None,
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"},
                               {"from": "human", "value": "2 + 2?"}]},
            [("user", "Hi"), ("assistant", "Yes?"), ("user", "2 + 2?")],
            None,
        ),
    ],
)  # fmt: skip
def test_forms_of_rows(tmp_path, row, messages, answer):
    [prompt] = read(tmp_path, row)
    assert asked(prompt) == messages
    assert prompt.answer == answer
    assert prompt.question == messages[-1][1]
    assert prompt.row == row
    assert prompt.place.endswith("rows.jsonl:1")


def test_columns_can_be_named(tmp_path):
    row = {"q1": "2 + 2?", "gold": "4", "answer": "no"}
    [prompt] = read(tmp_path, row, prompt_column="q1", answer_column="gold")
    assert (asked(prompt), prompt.answer) == ([("user", "2 + 2?")], "4")


TOOL = {"type": "function", "function": {"name": "add", "description": "Adds"}}


def test_rows_have_the_forms_of_conversations(tmp_path):
    """JSON in a column of text, a system column beside ShareGPT's, roles of one's own, tools."""
    told = [{"from": "system", "value": "Short."}, {"from": "human", "value": "2 + 2?"}]
    for row in ({"prompt": json.dumps(ASK), "system": "Short."},
                {"conversations": told, "system": "Short."}):  # fmt: skip
        [prompt] = read(tmp_path, row)
        assert asked(prompt) == [("system", "Short."), ("user", "2 + 2?")]
    with pytest.raises(ValueError, match="system message and that of its messages differ"):
        read(tmp_path, {"conversations": told, "system": "Long."})
    pupil = {"messages": [{"role": "pupil", "content": "2 + 2?"}]}
    with pytest.raises(ValueError, match="--user-role NAME"):
        read(tmp_path, pupil)
    [prompt] = read(tmp_path, pupil, user_role="pupil")
    assert asked(prompt) == [("user", "2 + 2?")]
    [prompt] = read(tmp_path, {"prompt": "[1, 2] + 3?", "tools": json.dumps([TOOL])})
    assert (prompt.question, prompt.tools) == ("[1, 2] + 3?", [TOOL])


def test_tools_are_part_of_the_prompt_or_an_error():
    rows = [Prompt(ASK, "4", {}, "row 1", [TOOL])]
    encode_prompts(rows, lambda messages, tools: [len(tools or ())], 9, ReadReport())
    with pytest.raises(ValueError, match=r"row 1: .*tools"):
        encode_prompts(rows, encode, 200, ReadReport())


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"q1": "2 + 2?"}, "which column holds the prompt"),
        ({"question": "a", "query": "b"}, "'question' or 'query'"),
        ({"question": "a", "solution": "b", "output": "c"}, "'solution' or 'output'"),
        ({"question": " ", "answer": "4"}, "no text in 'question'"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no message of the user"),
    ],
)
def test_rows_that_are_no_prompts_are_named(tmp_path, row, says):
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: .*{re.escape(says)}"):
        read(tmp_path, row)


def test_such_rows_can_be_skipped(tmp_path):
    rows = [{"question": "", "answer": "4"}, {"question": "2 + 2?", "answer": "4"}]
    assert [p.question for p in read(tmp_path, *rows, on_error="skip")] == ["2 + 2?"]


def test_a_row_without_an_answer_is_unusable_where_one_is_needed(tmp_path):
    rows = [{"question": "3 + 3?"}, {"question": "2 + 2?", "answer": "4"}]
    assert len(read(tmp_path, *rows)) == 2
    with pytest.raises(ValueError, match=r"rows.jsonl:1: no expected answer.*--answer-column"):
        read(tmp_path, *rows, needs_answer=True)
    [prompt] = read(tmp_path, *rows, needs_answer=True, on_error="skip")
    assert prompt.answer == "4"


def test_equal_prompts_stay_in_one_split():
    rows = [
        Prompt([{"role": "user", "content": f"What is {i % 20}?"}], None, {}, "") for i in range(60)
    ]
    train, val = split_prompts(rows, 0.2, seed=0, at_most=9)
    assert len(val) == 12
    assert len(train) == 48
    assert not {p.question for p in train} & {p.question for p in val}
    train, val = split_prompts(rows, 0.2, seed=0, at_most=2)  # the others are trained on
    assert (len(train), len(val)) == (54, 6)
    with pytest.raises(ValueError, match="give 0 for validation"):
        split_prompts(rows[:2], 0.2, seed=0, at_most=9)


def test_long_prompts_are_skipped_and_counted():
    rows = [Prompt([{"role": "user", "content": "x" * n}], "y", {}, f"row {n}") for n in (5, 50)]
    report = ReadReport()
    [(prompt, ids)] = encode_prompts(rows, encode, 20, report)
    assert prompt.place == "row 5"
    assert ids == OURS.prompt(prompt.messages)
    assert report.skipped.lines() == ["longer than 20 tokens: 1 (row 50)"]


def test_the_fingerprint_depends_on_ids_answers_and_rows():
    prompt = Prompt([{"role": "user", "content": "2 + 2?"}], "4", {}, "")
    encoded = encode_prompts([prompt], encode, 200, ReadReport())
    other = encode_prompts([prompt._replace(answer="?")], encode, 200, ReadReport())
    assert fingerprint(encoded) == fingerprint(encoded) != fingerprint(other)
    more = encode_prompts([prompt._replace(row={"n": 1})], encode, 200, ReadReport())
    assert fingerprint(encoded) != fingerprint(more)
