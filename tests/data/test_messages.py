"""Messages of a data set: their role, their text, and whether they are training targets."""

import json
from pathlib import Path
from typing import Any

import pytest
from chats import target_texts
from tables import write

from gptsmith.chat_template.template import ChatTemplate
from gptsmith.data.chat import ChatCounts, encode_conversations
from gptsmith.data.conversations import Conversation, read_conversations
from gptsmith.data.options import ChatFiles
from gptsmith.data.report import ReadReport

DEFAULT = ChatFiles()
FRUIT = ["Name a fruit.", "Granite.", "No.", "A pear."]


def talk(*more: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation on fruit; more: further fields of its messages."""
    roles = ("user", "assistant") * 2
    return [
        {"role": role, "content": text} | (more[i] if i < len(more) else {})
        for i, (role, text) in enumerate(zip(roles, FRUIT, strict=True))
    ]


def read(path: Path, files: ChatFiles = DEFAULT, on_error: Any = "stop") -> list[Conversation]:
    return list(read_conversations([path], files, ReadReport(on_error)))


def learned(path: Path, template: ChatTemplate) -> list[list[str]]:
    """The answers that are targets, of each conversation."""
    counts = ChatCounts(999, ReadReport("stop"))
    conversations = read_conversations([path], DEFAULT, counts.report)
    return [
        [run.removeprefix("<|assistant|>").removesuffix("<|end|>") for run in target_texts(example)]
        for example in encode_conversations(conversations, template, counts)
    ]


# --- targets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "do_train", "loss_mask", "loss_scale", "loss"])
@pytest.mark.parametrize(
    ("yes", "no"), [(1, 0), (1.0, 0.0), (True, False), ("1", "0.00"), ("true", "no")]
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_answers_with_a_weight_of_0_are_not_learned(
    tmp_path: Path, template: ChatTemplate, name: str, yes: Any, no: Any, suffix: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    messages = talk({name: None}, {name: no}, {name: None}, {name: yes})
    assert learned(write(path, {"messages": messages}), template) == [["A pear."]]
    messages = talk({}, {name: no})
    assert learned(write(path, {"messages": messages}), template) == [["A pear."]]
    messages = talk({name: None}, {name: None}, {name: None}, {name: None})
    assert learned(write(path, {"messages": messages}), template) == [["Granite.", "A pear."]]


@pytest.mark.parametrize("name", ["masked", "ignore", "exclude", "no_loss"])
def test_masked_answers_are_not_learned(tmp_path: Path, template: ChatTemplate, name: str) -> None:
    messages = talk({name: True}, {name: True}, {name: None}, {name: False})
    assert learned(write(tmp_path / "a.jsonl", {"messages": messages}), template) == [["A pear."]]


@pytest.mark.parametrize("name", ["mask", "train_detail"])
def test_fields_that_do_not_say_what_is_learned_are_rejected(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": talk({}, {name: 1})})
    with pytest.raises(ValueError, match=rf"message 2 of 4: {name} does not say .* with weight"):
        read(path)


def test_weights_of_parts_are_those_of_the_answer(tmp_path: Path, template: ChatTemplate) -> None:
    def parts(*weights: Any) -> dict[str, Any]:
        return {"content": [{"type": "text", "text": "x", "weight": w} for w in weights]}

    messages = talk({}, parts(0, 0), {}, parts(1, None))
    assert learned(write(tmp_path / "a.jsonl", {"messages": messages}), template) == [["xx"]]
    path = write(tmp_path / "b.jsonl", {"messages": talk({}, parts(1, 0))})
    with pytest.raises(ValueError, match="message 2 of 4: some parts of its content are targets"):
        read(path)


def test_weight_of_a_row_is_that_of_its_answers(tmp_path: Path, template: ChatTemplate) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"messages": talk(), "weight": 0},
        {"messages": talk(), "weight": 1},
        {"messages": talk({}, {"weight": 0}), "train": True},
        {"messages": talk(), "loss_mask": [0, 0, 0, 1]},
        {"prompt": FRUIT[0], "response": FRUIT[1], "weight": 0},
        {"prompt": FRUIT[2], "response": FRUIT[3], "weight": None},
    )
    both = ["Granite.", "A pear."]
    assert learned(path, template) == [both, ["A pear."], ["A pear."], ["A pear."]]
    counts = ChatCounts(999)
    conversations = read_conversations([path], DEFAULT, counts.report)
    list(encode_conversations(conversations, template, counts))
    assert (counts.read, counts.kept, counts.answers, counts.kept_answers) == (6, 4, 5, 5)
    assert "conversation without an answer to train on: 2" in str(counts)


@pytest.mark.parametrize("value", [0.5, 2, -1, "half", [1], {"a": 1}])
@pytest.mark.parametrize("where", ["message", "row"])
def test_weights_between_0_and_1_are_rejected_by_place(
    tmp_path: Path, value: Any, where: str
) -> None:
    row = {"messages": talk({}, {"weight": value} if where == "message" else {})}
    row |= {"weight": value} if where == "row" else {}
    path = write(tmp_path / "a.jsonl", {"messages": talk()}, row)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*weight.*--on-error skip"):
        read(path)
    assert len(read(path, on_error="skip")) == 1


def test_weights_of_other_messages_are_mentioned(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": talk({"weight": 1}, {"weight": 1})})
    report = ReadReport("stop")
    (conversation,) = read_conversations([path], DEFAULT, report)
    assert conversation.targets is None
    assert list(report.hints) == [
        "only answers are trained on, whatever the weights of other messages"
    ]
    path = write(tmp_path / "b.jsonl", {"messages": talk({"weight": 0})})
    report = ReadReport("stop")
    list(read_conversations([path], DEFAULT, report))
    assert not report.hints


# --- calls, tools, thoughts ----------------------------------------------------------------------

CALL = {"name": "clock", "arguments": "{}"}
CALLS = {"tool_calls": [{"id": "call_1", "type": "function", "function": CALL}]}


@pytest.mark.parametrize(
    ("field", "what"),
    [
        (CALLS, "tool_calls"),
        ({"function_call": CALL}, "function_call"),
        ({"reasoning_content": "Hm."}, "reasoning_content"),
        ({"thinking": "Hm."}, "thinking"),
        ({"refusal": "I cannot."}, "refusal"),
        ({"audio": {"id": "a"}}, "audio"),
    ],
)
def test_what_the_template_does_not_write_is_rejected_by_place(
    tmp_path: Path, template: ChatTemplate, field: dict[str, Any], what: str
) -> None:
    good, bad = {"messages": talk()}, {"messages": talk({}, {}, {}, field)}
    path = write(tmp_path / "a.jsonl", good, bad)
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: message 4 of 4: it has {what}, which"):
        learned(path, template)
    counts = ChatCounts(999, ReadReport("skip"))
    conversations = read_conversations([path], DEFAULT, counts.report)
    assert len(list(encode_conversations(conversations, template, counts))) == 1
    assert str(counts).startswith("skipped: 1 of 2 rows (50.0%), conversation that the template")
    empty = {name: type(value)() for name, value in field.items()}
    for nothing in (empty, dict.fromkeys(field)):
        path = write(tmp_path / "a.jsonl", good, {"messages": talk({}, {}, {}, nothing)})
        assert len(learned(path, template)) == 2


@pytest.mark.parametrize("tools", [[{"name": "clock"}], '[{"name": "clock"}]', {"name": "clock"}])
def test_tools_that_the_template_does_not_write_are_rejected_by_place(
    tmp_path: Path, template: ChatTemplate, tools: Any
) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": talk(), "tools": tools})
    with pytest.raises(ValueError, match=r"a\.jsonl:1: it has tools, which the chat template"):
        learned(path, template)
    for nothing in (None, [], "[]", "", "null"):
        path = write(tmp_path / "a.jsonl", {"messages": talk(), "tools": nothing})
        assert len(learned(path, template)) == 1
    path = write(tmp_path / "a.jsonl", {"messages": talk(), "tools": "clock"})
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the column 'tools' holds 'clock', which is"):
        read(path)


@pytest.mark.parametrize(
    ("call", "result"), [("function_call", "observation"), ("tool_call", "tool_response")]
)
def test_calls_spelled_as_messages(tmp_path: Path, call: str, result: str) -> None:
    share = [
        {"from": "human", "value": "What time is it?"},
        {"from": call, "value": json.dumps({"name": "clock", "arguments": {}})},
        {"from": result, "value": "Noon."},
        {"from": "gpt", "value": "It is noon."},
    ]
    (found,) = read(write(tmp_path / "a.jsonl", {"conversations": share}))
    assert [message["role"] for message in found.messages] == [
        "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    function = {"name": "clock", "arguments": {}}
    assert found.messages[1].get("tool_calls") == [{"type": "function", "function": function}]
    share[1]["value"] = "clock()"
    with pytest.raises(ValueError, match=r"a\.jsonl:1: message 2 of 4: not a call in JSON"):
        read(write(tmp_path / "a.jsonl", {"conversations": share}))


def test_message_with_a_call_needs_no_text(tmp_path: Path) -> None:
    said = [talk()[0], {"role": "assistant", "content": None, **CALLS},
            {"role": "tool", "content": "Noon.", "tool_call_id": "call_1"}, talk()[3]]  # fmt: skip
    (found,) = read(write(tmp_path / "a.parquet", {"messages": said}))
    assert found.messages[1]["content"] == ""
    assert found.messages[1].get("tool_calls") == CALLS["tool_calls"]
    assert found.messages[2] == {"role": "tool", "content": "Noon.", "tool_call_id": "call_1"}


# --- names of one's own --------------------------------------------------------------------------


def test_calls_and_tools_in_json(tmp_path: Path) -> None:
    call, tool = {"name": "clock", "arguments": {}}, {"name": "clock", "description": "d"}
    for calls in (json.dumps([call]), [json.dumps(call)], json.dumps(call), call):
        row = {"messages": talk({}, {"tool_calls": calls})}
        (conversation,) = read(write(tmp_path / "a.jsonl", row))
        assert conversation.messages[1]["tool_calls"] == [call]
    turns = talk({}, {"tool_calls": json.dumps([call])}, {}, {"tool_calls": "[]"})
    path = write(tmp_path / "a.jsonl", {"messages": turns, "tools": [json.dumps(tool)]})
    (conversation,) = read(path)
    assert conversation.tools == [tool]
    assert conversation.messages[1]["tool_calls"] == [call]
    assert "tool_calls" not in conversation.messages[3]


def test_conversations_of_other_services(tmp_path: Path) -> None:
    said = [("user", "q"), ("model", "a")]
    gemini = [{"role": role, "parts": [{"text": text}]} for role, text in said]
    bedrock = [{"role": m["role"], "content": m["parts"]} for m in gemini]
    path = write(
        tmp_path / "a.jsonl",
        {"contents": gemini, "systemInstruction": {"role": "system", "parts": [{"text": "s"}]}},
        {"messages": bedrock, "system": [{"text": "s"}]},
    )
    expected = [("system", "s"), ("user", "q"), ("assistant", "a")]
    for conversation in read(path):
        assert [(m["role"], m["content"]) for m in conversation.messages] == expected
    gemini[1]["parts"].insert(0, {"text": "hm", "thought": True})
    with pytest.raises(ValueError, match="message 2 of 2: its text holds a list"):
        read(write(path, {"contents": gemini}))


def test_own_roles_and_fields(tmp_path: Path) -> None:
    said = [
        {"agent": f"agent_{1 + i % 2}", "message": text, "sentiment": "Curious"}
        for i, text in enumerate(FRUIT)
    ]
    plain = [{"role": m["role"], "content": m["content"]} for m in talk()]
    own = ChatFiles(user_role="agent_1", assistant_role="agent_2", text_key="message")
    for column in ("content", "messages", "chat"):
        path = write(tmp_path / "a.jsonl", {column: said, "article_url": "x"})
        (found,) = read(path, own)
        assert [{k: m[k] for k in ("role", "content")} for m in found.messages] == plain  # type: ignore[literal-required]
        assert read(path, own.model_copy(update={"role_key": "agent"})) == [found]
        assert read(path, own.model_copy(update={"messages_column": column})) == [found]
    with pytest.raises(ValueError, match="are the same: give two names"):
        ChatFiles(user_role="a", assistant_role="a")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {},
            r"no role in the fields 'agent', 'message' \(--user-role NAME and",
        ),
        ({"role_key": "agent"}, r"unknown role 'agent_1' \(--user-role NAME"),
        ({"user_role": "agent_1"}, r"of the fields 'agent', 'message' \(--text-key"),
        ({"user_role": "agent_1", "text_key": "message"}, r"no role in the fields"),
    ],
)
def test_errors_name_the_option_that_helps(tmp_path: Path, options: Any, says: str) -> None:
    said = [{"agent": f"agent_{1 + i % 2}", "message": text} for i, text in enumerate(FRUIT)]
    path = write(tmp_path / "a.jsonl", {"messages": said})
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: .*{says}"):
        read(path, ChatFiles(**options))
    path = write(tmp_path / "b.jsonl", {"chat": said})
    with pytest.raises(ValueError, match=r"b\.jsonl:1: .*--messages-column"):
        read(path)


def test_configured_roles_win_over_the_usual_ones(tmp_path: Path) -> None:
    said = [
        {"role": "assistant" if i % 2 == 0 else "user", "content": text}
        for i, text in enumerate(FRUIT)
    ]
    path = write(tmp_path / "a.jsonl", {"messages": said})
    (found,) = read(path, ChatFiles(user_role="assistant", assistant_role="user"))
    assert [m["role"] for m in found.messages] == ["user", "assistant"] * 2
    said = [{"name": "Ann" if i % 2 else "Bo", "content": text} for i, text in enumerate(FRUIT)]
    path = write(tmp_path / "a.jsonl", {"messages": [{"role": "system", "content": "x"}, *said]})
    (found,) = read(path, ChatFiles(user_role="bo", assistant_role="ANN"))
    assert [m["role"] for m in found.messages] == ["system", *["user", "assistant"] * 2]


def test_unused_fields_are_mentioned_and_metadata_is_not(
    tmp_path: Path, template: ChatTemplate
) -> None:
    messages = talk({"id": 7, "mood": "calm"}, {"timestamp": 3.5, "empty": [], "knowledge": ["x"]})
    path = write(tmp_path / "a.jsonl", {"messages": messages, "conversation_id": "a"})
    counts = ChatCounts(999)
    conversations = read_conversations([path], DEFAULT, counts.report)
    list(encode_conversations(conversations, template, counts))
    assert sorted(counts.report.hints) == [
        "field 'knowledge' of messages is not used", "field 'mood' of messages is not used",
    ]  # fmt: skip
