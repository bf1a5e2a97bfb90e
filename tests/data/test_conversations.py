"""Every form of conversation gives the same messages; invalid ones are named or counted."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import said, talk, target_texts
from data_sets import complete_data
from tables import write

from gptsmith.chat_template.template import ChatTemplate
from gptsmith.data.chat import ChatCounts, encode_conversations
from gptsmith.data.conversations import Conversation, read_conversations
from gptsmith.data.options import ChatFiles
from gptsmith.data.report import ReadReport

TALK: list[Any] = talk("Hi, I am Ann.", "Hello Ann!", "Who am I?", "Ann.")
BRIEF = {"role": "system", "content": "Be brief."}
DEFAULT = ChatFiles()


def read(
    *paths: Path, files: ChatFiles = DEFAULT, report: ReadReport | None = None
) -> list[Conversation]:
    return list(read_conversations(paths, files, report or ReadReport("stop")))


def messages(path: Path, files: ChatFiles = DEFAULT) -> list[Any]:
    return [conversation.messages for conversation in read(path, files=files)]


def test_forms_of_multi_turn_conversations(tmp_path: Path) -> None:
    share = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
             for m in TALK]  # fmt: skip
    spoken = [{"index": i, "speaker": m["role"], "text": m["content"]} for i, m in enumerate(TALK)]
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in TALK]
    path = write(
        tmp_path / "a.jsonl",
        {"messages": TALK},
        TALK,
        {"conversations": share, "id": 7},
        {"conversations": TALK},
        {"utterances": spoken, "vertical": "Coffee"},
        {"messages": parts},
    )
    assert messages(path) == [TALK] * 6
    path = write(
        tmp_path / "b.jsonl",
        {"messages": [BRIEF, *TALK]},
        {"system": "Be brief.", "conversations": share},
        {"system": "Be brief.", "messages": [BRIEF, *TALK]},
        {"system": "", "conversations": [{"from": "system", "value": "Be brief."}, *share]},
    )
    assert messages(path) == [[BRIEF, *TALK]] * 4
    write(tmp_path / "c.parquet", {"messages": TALK, "n": 1}, {"messages": TALK, "n": 2})
    assert messages(tmp_path / "c.parquet") == [TALK, TALK]
    places = [c.place for c in read(tmp_path / "c.parquet", path)]
    assert places[1:3] == [f"{tmp_path / 'c.parquet'}, row 2", f"{path}:1"]


@pytest.mark.parametrize(
    "names",
    [("prompt", "response"), ("prompt", "completion"), ("question", "answer"),
     ("instruction", "output"), ("problem", "solution"), ("inputs", "targets"),
     ("human", "assistant")],
)  # fmt: skip
def test_question_and_answer_columns(tmp_path: Path, names: tuple[str, str]) -> None:
    first = [m["content"] for m in TALK[:2]]
    row = dict(zip(names, first, strict=True))
    path = write(tmp_path / "a.jsonl", row, row | {"system_prompt": "Be brief.", "id": 3})
    assert messages(path) == [TALK[:2], [BRIEF, *TALK[:2]]]
    table = tmp_path / "a.csv"
    table.write_text(f'{",".join(names)}\n"{first[0]}",{first[1]}\n')
    assert messages(table) == [TALK[:2]]


def test_names_of_columns_in_any_case(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("Context;Question ;ANSWER\nc;q;a\n")
    assert texts(path) == [["q\n\nc", "a"]]
    files = ChatFiles(prompt_column="Question ", response_column="ANSWER")
    assert [c.answers for c in read(path, files=files)] == [[1]]


def test_configured_columns(tmp_path: Path) -> None:
    row = {"q": "Hi, I am Ann.", "a": "Hello Ann!", "talk": TALK, "prompt": "x", "response": "y"}
    path = write(tmp_path / "a.jsonl", row)
    assert messages(path, ChatFiles(prompt_column="q", response_column="a")) == [TALK[:2]]
    assert messages(path, ChatFiles(messages_column="talk")) == [TALK]
    both = {"prompt": TALK[:3], "completion": TALK[3:]}
    assert messages(write(tmp_path / "b.jsonl", both)) == [TALK]
    alpaca = {"instruction": "Add.", "input": "2 3", "output": "5"}
    (found,) = messages(write(tmp_path / "c.jsonl", alpaca))
    assert [m["content"] for m in found] == ["Add.\n\n2 3", "5"]
    for columns in (
        ChatFiles(messages_column="none"),
        ChatFiles(prompt_column="q", response_column="none"),
    ):
        with pytest.raises(ValueError, match=r"a\.jsonl:1: which .* 'talk', .*--messages-column"):
            read(path, files=columns)
    twice = write(tmp_path / "d.jsonl", {"prompt": "a", "response": "b", "completion": "c"})
    with pytest.raises(ValueError, match=r"d\.jsonl:1: which columns .*--prompt-column"):
        read(twice)


USER, ANSWER = TALK[0], TALK[1]
BAD = {
    "unknown role": [USER, {"role": "narrator", "content": "x"}],
    "tool without a call": [USER, {"role": "tool", "content": "x"}, ANSWER],
    "message without text": [USER, {"role": "assistant", "content": None}],
    "system message not at the beginning": [USER, ANSWER, BRIEF, USER, ANSWER],
    "empty answer": [USER, {"role": "assistant", "content": " \n"}],
    "conversation without an answer": [BRIEF, USER],
}


@pytest.mark.parametrize("kind", BAD)
def test_invalid_conversations_are_an_error_or_skipped(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "a.jsonl", TALK, BAD[kind], TALK)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*--on-error skip") as caught:
        read(path)
    assert len(str(caught.value).replace(str(path), "")) < 250
    report = ReadReport("skip")
    kept = [c.place[-1] for c in read(path, report=report)]
    assert kept == ["1", "3"]
    assert report.skipped.counts() == {kind: 1}


@pytest.mark.parametrize("turns", ["aua", "saua", "uua", "uaa", "uuaaua", "ssua", "a"])
def test_roles_in_any_order_are_learned(tmp_path: Path, template: ChatTemplate, turns: str) -> None:
    share = {"system": "system", "user": "human", "assistant": "gpt"}
    wanted = said(turns)
    form = [{"from": share[m["role"]], "value": m["content"]} for m in wanted]
    path = write(tmp_path / "a.jsonl", {"messages": wanted}, {"conversations": form})
    found = read(path)
    assert [conversation.messages for conversation in found] == [wanted] * 2
    counts = ChatCounts(200)
    for example in encode_conversations(found, template, counts):
        answers = [f"<|assistant|>{m['content']}<|end|>" for m in wanted if m["role"][0] == "a"]
        assert "".join(target_texts(example)) == "".join(answers)
    assert counts.kept_answers == counts.answers == 2 * turns.count("a")
    greets = "beginning with a message of the assistant"
    assert counts.remarks.counts() == ({greets: 2} if turns.lstrip("s")[0] == "a" else {})


def test_rows_of_other_forms_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TALK, {"text": "x"}, {"messages": []}, {"messages": "x"})
    report = ReadReport("skip")
    assert len(read(path, report=report)) == 1
    kinds = report.skipped.counts()
    assert kinds == {
        "row without messages": 1, "conversation without an answer": 1, "unknown role": 1
    }  # fmt: skip


# --- columns beside the messages or the question ------------------------------------------------


def texts(path: Path) -> list[list[str]]:
    return [[m["content"] for m in conversation.messages] for conversation in read(path)]


@pytest.mark.parametrize("name", ["input", "context", "passage"])
def test_what_a_question_is_about_is_in_the_prompt(tmp_path: Path, name: str) -> None:
    asked, said = "Who won race 1?", "Boat 2 won race 1."
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": asked, name: said, "response": "Boat 2.", "category": "sport"},
        {"question": asked, name: said, "answer": "Boat 2."},
        {"prompt": asked, name: said, "completion": "Boat 2."},
        {"question": asked, name: "", "answer": "Boat 2."},
    )
    assert texts(path) == [[f"{asked}\n\n{said}", "Boat 2."]] * 3 + [[asked, "Boat 2."]]
    table = tmp_path / "a.csv"
    table.write_text(f"question,{name},answer\n{asked},{said},Boat 2.\n{asked},,Boat 2.\n")
    assert texts(table) == [[f"{asked}\n\n{said}", "Boat 2."], [asked, "Boat 2."]]
    q = {"q": asked, name: said, "a": "Boat 2."}
    (found,) = read(write(path, q), files=ChatFiles(prompt_column="q", response_column="a"))
    assert found.messages[0]["content"] == f"{asked}\n\n{said}"


def test_history_is_the_earlier_messages(tmp_path: Path) -> None:
    first = [TALK[0]["content"], TALK[1]["content"]]
    row = {"instruction": TALK[2]["content"], "input": "", "output": TALK[3]["content"]}
    path = write(
        tmp_path / "a.jsonl",
        row | {"history": [first]},
        row | {"history": json.dumps([first])},
        row | {"history": TALK[:2]},
        row | {"history": [first], "system": "Be brief."},
    )
    assert messages(path) == [TALK] * 3 + [[BRIEF, *TALK]]
    for nothing in (None, [], "[]"):
        assert messages(write(path, row | {"history": nothing})) == [TALK[2:]]
    for bad in ([["a"]], ["a", "b"], "a", [[1, [2]]], [[None, "b"]]):
        with pytest.raises(ValueError, match=r"a\.jsonl:1: .*--on-error skip"):
            read(write(path, row | {"history": bad}))


def test_two_system_messages_are_rejected(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"system": " Be brief.", "messages": [BRIEF, *TALK]},
        {"system": "Be verbose.", "messages": [BRIEF, *TALK]},
    )
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the row's system message and that of its"):
        read(path)
    report = ReadReport("skip")
    assert len(read(path, report=report)) == 1
    assert report.skipped.counts() == {"two system messages": 1}
    path = write(path, {"system": "a", "system_prompt": "b", "question": "c", "answer": "d"})
    with pytest.raises(ValueError, match=r"a\.jsonl:1: 'system', 'system_prompt' differ"):
        read(path)
    path = write(path, {"system": ["a"], "messages": TALK})
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the column 'system' holds a list"):
        read(path)


NAN = float("nan")


@pytest.mark.parametrize("empty", [None, NAN, "", " \n", [], {}])
def test_empty_cells(tmp_path: Path, empty: Any) -> None:
    row = {"instruction": "Add.", "input": "2 3", "output": "5"}
    path = tmp_path / "a.jsonl"
    if not isinstance(empty, dict | list) or not empty:
        assert texts(write(path, row | {"input": empty})) == [["Add.", "5"]]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no text in 'instruction'; --on-error"):
        read(write(path, row | {"instruction": empty}))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: message 2 of 2: an empty answer; --on"):
        read(write(path, row | {"output": empty}))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-5, "-5"),
        (2.5, "2.5"),
        (True, "true"),
        (False, "false"),
        (10**30, "1" + "0" * 30),
    ],
)
def test_numbers_and_truth_values_are_text(tmp_path: Path, value: Any, text: str) -> None:
    path = write(tmp_path / "a.jsonl", {"instruction": value, "input": value, "output": value})
    assert texts(path) == [[f"{text}\n\n{text}", text]]
    said = [{"role": "user", "content": value}, {"role": "assistant", "content": value}]
    assert texts(write(path, {"messages": said})) == [[text, text]]


@pytest.mark.parametrize("value", [["a"], {"a": 1}, [["a", "b"]]])
@pytest.mark.parametrize("column", ["instruction", "input", "output"])
def test_cells_that_are_not_text_are_rejected_by_place(
    tmp_path: Path, value: Any, column: str
) -> None:
    row = {"instruction": "Add.", "input": "2 3", "output": "5"}
    path = write(tmp_path / "a.jsonl", row, row | {column: value})
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*--on-error skip") as caught:
        read(path)
    assert str(value)[:20] in str(caught.value)
    assert len(read(path, report=ReadReport("skip"))) == 1


def test_cells_of_a_typed_table(tmp_path: Path) -> None:
    row = {"question": 3, "context": date(2024, 5, 1), "answer": 2.5, "image": None}
    path = write(tmp_path / "a.parquet", row, row | {"context": None})
    assert texts(path) == [["3\n\n2024-05-01", "2.5"], ["3", "2.5"]]
    table = pa.table({"question": ["q"], "answer": pa.array([0.1], pa.float32())})
    pq.write_table(table, path)
    assert texts(path) == [["q", "0.1"]]
    halves = pa.array(np.array([0.1, np.nan], np.float16)), pa.array(["a", "b"])
    pq.write_table(pa.table(halves, ["question", "answer"]), path)
    with pytest.raises(ValueError, match="row 2: no text in 'question'"):
        read(path)
    report = ReadReport("skip")
    assert [c.messages[0]["content"] for c in read(path, report=report)] == ["0.1"]
    write(tmp_path / "b.parquet", row | {"answer": b"x"})
    with pytest.raises(ValueError, match="row 1: the column 'answer' holds a binary value"):
        read(tmp_path / "b.parquet")


def test_columns_that_are_not_used_are_mentioned(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"messages": TALK, "topic": "names", "id": 3, "source": "web", "score": None, "kb": []},
        {"messages": TALK, "topic": "names", "context": "Ann is here.", "user_id": 5},
        {"messages": TALK, "loss": 0.25},
    )
    report = ReadReport("stop")
    list(read_conversations([path], DEFAULT, report))
    assert list(report.hints) == [
        f"column {name!r} is not used" for name in ("topic", "context", "loss")
    ]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: it has images, which the model cannot read"):
        read(write(path, {"messages": TALK, "images": ["x.png"]}))


def test_answers_marked_as_undesirable_are_no_targets(tmp_path: Path) -> None:
    row = {"prompt": "Name a fruit.", "completion": "Granite."}
    talks = {"prompt": said("u"), "completion": [{"role": "assistant", "content": "Granite."}]}
    rows = [row | {"label": False}, talks | {"label": False}, {"messages": TALK, "kto_tag": False}]
    good = [row | {"label": True}, row | {"label": 0}, row | {"label": "spam"}]
    report = ReadReport("stop")
    found = read(write(tmp_path / "a.jsonl", *rows, *good), report=report)
    assert [c.targets for c in found] == [frozenset()] * 3 + [None] * 3
    assert next(iter(report.hints)) == "answers of which column 'label' is false are not trained on"
    table = tmp_path / "a.csv"
    table.write_text("prompt,completion,label\nName a fruit.,Granite.,False\n")
    assert [c.targets for c in read(table)] == [frozenset()]


def test_preference_pairs_name_the_option_that_reads_the_better_answers(tmp_path: Path) -> None:
    asked, better, worse = TALK[0]["content"], TALK[1], TALK[1] | {"content": "Who?"}
    plain = {"question": asked, "chosen": better["content"], "rejected": "Who?"}
    path = write(tmp_path / "a.jsonl", plain)
    with pytest.raises(ValueError, match="--prompt-column question --response-column chosen, to"):
        read(path)
    files = ChatFiles(prompt_column="question", response_column="chosen")
    assert messages(path, files) == [TALK[:2]]
    path = write(path, {"chosen": TALK[:2], "rejected": [TALK[0], worse], "score_chosen": 9.0})
    with pytest.raises(ValueError, match="with --messages-column chosen, to train on the better"):
        read(path)
    assert messages(path, ChatFiles(messages_column="chosen")) == [TALK[:2]]
    path = write(path, {"conversations": TALK[:1], "chosen": better, "rejected": worse})
    with pytest.raises(ValueError, match="no assistant message: --prompt-column and --response-"):
        read(path)
    files = ChatFiles(prompt_column="conversations", response_column="chosen")
    assert messages(path, files) == [TALK[:2]]


def test_a_conversation_in_one_text(tmp_path: Path) -> None:
    said = "".join(f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}"
                   for m in TALK)  # fmt: skip
    path = write(tmp_path / "a.jsonl", {"chosen": said, "rejected": f"{said}!"})
    with pytest.raises(ValueError, match="with --messages-column chosen, to train on the better"):
        read(path)
    assert messages(path, ChatFiles(messages_column="chosen")) == [TALK]
    said = said.replace("\n\n", "### ")
    path = write(tmp_path / "a.jsonl", {"text": said})
    assert messages(path, ChatFiles(messages_column="text")) == [TALK]
    for other in ("Ann. Human: Hi", "Bob: Hi\n\nAlice: Hello"):
        with pytest.raises(ValueError, match=r"a\.jsonl:1: message 1 of 1: not a message"):
            read(write(path, {"text": other}), files=ChatFiles(messages_column="text"))


def test_messages_in_a_table_of_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    quoted = json.dumps(TALK).replace('"', '""')
    path.write_text(f'messages,weight\n"{quoted}",1\n"{quoted}",0\n')
    assert [c.targets for c in read(path)] == [None, frozenset()]
    assert messages(path) == [TALK] * 2


def test_column_of_messages_with_a_name_of_its_own(tmp_path: Path) -> None:
    assert messages(write(tmp_path / "a.jsonl", {"thread": TALK, "tags": ["a"]})) == [TALK]
    tree = write(tmp_path / "c.jsonl", {"role": "prompter", "text": "Hi", "replies": TALK[1:2]})
    with pytest.raises(ValueError, match=r"c\.jsonl:1: which columns .*--messages-column"):
        read(tree)
    two = write(tmp_path / "b.jsonl", {"chosen": TALK, "rejected": TALK})
    with pytest.raises(ValueError, match=r"b\.jsonl:1: which columns .*--messages-column"):
        read(two)


def test_real_sets(real_data: Path) -> None:
    for name, count in {"chat_nanochat_identity": 20, "chat_taskmaster4": 30}.items():
        assert len(read(real_data / name)) == count
    tools = real_data / "chat_llamafactory" / "glaive_toolcall_en_demo.json"
    assert len(read(tools)) == 10
    assert sum(conversation.tools is None for conversation in read(tools)) == 7


def test_complete_sets_are_read_to_the_end() -> None:
    tools = "chat_llamafactory/glaive_toolcall_en_demo.json"
    sizes = {
        "chat_taskmaster4/*.json.gz": 1_835_080,
        "chat_nanochat_identity/*.jsonl": 2_288_735,
        tools: 738_925,
    }
    folder = complete_data(sizes)
    for name, count in {"chat_nanochat_identity": 996, "chat_taskmaster4": 3710}.items():
        assert len(read(folder / name)) == count
    assert len(read(folder / tools)) == 300
    assert sum(conversation.tools is None for conversation in read(folder / tools)) == 109
