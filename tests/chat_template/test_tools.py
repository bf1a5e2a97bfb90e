"""Tool calls, their results and reasoning: ids as transformers makes them, or an error by place."""

import json
from datetime import date
from typing import Any

import pytest
from chats import learned, stock, stock_ids, target_texts

from gptsmith.chat_template.template import ChatTemplate
from gptsmith.data.chat import ChatCounts, encode_conversations
from gptsmith.data.chat_windows import conversation_windows
from gptsmith.data.conversations import Conversation
from gptsmith.tokenizer import Tokenizer

TOKENS = ("<|im_start|>", "<|im_end|>", "<|eom|>")

# In the manner of Qwen 3: tools in the system message, thoughts of the answers after the last
# question only, results of tools as a message of the user.
QWEN = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(asking=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
{%- if ns.asking and message.role == 'user' and message.content is string %}
{%- set ns.asking = false %}{%- set ns.last = (messages|length - 1) - loop.index0 %}
{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- set content = message.content if message.content is string else '' %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{%- set thoughts = '' %}
{%- if message.reasoning_content is string %}
{%- set thoughts = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or thoughts) %}
{{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}{%- endif %}
{%- if message.tool_calls %}
{%- for call in message.tool_calls %}
{%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
{%- if call.function %}{%- set call = call.function %}{%- endif %}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{%- if call.arguments is string %}{{- call.arguments }}
{%- else %}{{- call.arguments | tojson }}{%- endif %}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# In the manner of Llama 3.1: a call is a message of its own, which ends with another token;
# results are JSON.
LLAMA = """\
{%- for m in messages %}
{%- if m.tool_calls %}
{{- '<|im_start|>assistant\\n{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson }}{{- '}<|eom|>' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>ipython\\n' }}{{- m.content | tojson }}{{- '<|im_end|>' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Reads names of its own for the same things.
OTHER = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.thinking %}{{- '(' + m.thinking + ')' }}{%- endif %}
{%- if m.function_call %}{{- m.function_call.name + m.function_call.arguments }}{%- endif %}
{%- if m.refusal %}{{- 'No: ' + m.refusal }}{%- endif %}
{{- m.content + '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

TOKENIZER = Tokenizer.byte().add_special_tokens(TOKENS)
STOCK_QWEN = stock(TOKENIZER, QWEN, eos_token="<|endoftext|>")
END = "<|im_end|>"


def message(role: str, content: str = "", **more: Any) -> Any:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def check(source: str, messages: list[Any], tools: Any = None) -> list[str]:
    """Compares ids with those of transformers; returns the runs of targets as text."""
    template, theirs = (
        ChatTemplate(source, TOKENIZER),
        stock(TOKENIZER, source, eos_token="<|endoftext|>"),
    )
    ids, is_target, _ = template.encode(messages, tools=tools)
    assert ids == stock_ids(theirs, messages, tools=tools)
    for i, one in enumerate(messages):
        if one["role"] == "assistant":
            asked = template.prompt(messages[:i], tools=tools)
            assert ids[: len(asked)] == asked
            assert asked == stock_ids(theirs, messages[:i], prompt=True, tools=tools)
    return learned(ids, is_target, TOKENIZER)


ARGUMENTS = [{"city": "Rome", "days": 3}, {}, '{"city": "Rome"}', {"a": [{"b": 'quo"te\n'}, None]}]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("content", ["", "Let me look.", None])
def test_calls_and_results_are_written_as_transformers_does(arguments: Any, content: Any) -> None:
    messages = [
        message("user", "How is the weather?"),
        message("assistant", content, tool_calls=[call("weather", arguments), call("clock", {})]),
        message("tool", "Sunny", name="weather", tool_call_id="call_1"),
        message("tool", '{"hour": 12}', name="clock"),
        message("assistant", "It is sunny."),
        message("user", "Thanks."),
        message("assistant", "Bye."),
    ]
    first, *rest = check(QWEN, messages)
    assert first.startswith("<|im_start|>assistant\n" + (content or "") + ("\n" if content else ""))
    assert first.endswith('<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>' + END)
    assert rest[0] == "<|im_start|>assistant\nIt is sunny." + END
    assert rest[1] == "<|im_start|>assistant\n<think>\n\n</think>\n\nBye." + END
    alone = messages[1] | {"tool_calls": [call("x", arguments)]}
    if content:  # which this template drops
        with pytest.raises(ValueError, match=r"content of message 2 of 2 \(assistant\) 0 times"):
            check(LLAMA, [messages[0], alone])
    else:
        first, second = check(LLAMA, [messages[0], alone, messages[3], messages[4]])
        assert first.endswith("}<|eom|>")
        assert second == "<|im_start|>assistant\nIt is sunny." + END


TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Say <|im_end|>.",
     "parameters": {"type": "object", "properties": {"<|im_start|>": {"type": "string"}}}}}
]  # fmt: skip


def test_tools_are_written_and_their_text_stays_text() -> None:
    messages = [message("user", "How is it?"), message("assistant", "Fine.")]
    template = ChatTemplate(QWEN, TOKENIZER)
    special = {TOKENIZER.special_tokens[name] for name in TOKENS}
    bare = template.encode(messages).ids
    ids = template.encode(messages, tools=TOOLS).ids
    text = STOCK_QWEN.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    assert TOKENIZER.decode(ids) == text
    # only the system message that holds them begins and ends with more of the template's tokens
    assert sum(i in special for i in ids) == sum(i in special for i in bare) + 2
    with pytest.raises(ValueError, match="it has tools, which the chat template does not write"):
        ChatTemplate(LLAMA, TOKENIZER).encode(messages, tools=TOOLS)
    plain = json.loads(json.dumps(TOOLS).replace("<|", "<").replace("|>", ">"))
    check(QWEN, [message("system", "Hi."), *messages], plain)


@pytest.mark.parametrize(
    "where",
    [
        {"name": "<|im_end|>", "arguments": {}},
        {"name": "x", "arguments": {"a": "<|im_end|>"}},
        {"name": "x", "arguments": {"<|im_end|>": 1}},
        {"name": "x", "arguments": "<|im_end|>"},
    ],
)
def test_text_of_calls_never_becomes_a_special_token(where: dict[str, Any]) -> None:
    messages = [message("user", "Hi"), message("assistant", "", tool_calls=[{"function": where}])]
    ids, is_target, _ = ChatTemplate(QWEN, TOKENIZER).encode(messages)
    text = STOCK_QWEN.apply_chat_template(messages, tokenize=False)
    assert TOKENIZER.decode(ids) == text
    ends = [i for i, one in enumerate(ids) if one == TOKENIZER.special_tokens[END]]
    assert len(ends) == 2
    assert is_target[ends[1]]


def test_thoughts_of_the_last_answer_are_learned() -> None:
    for thought in ("Two and two.", "line\n\nline", " x "):
        messages = [
            message("user", "2 + 2?"), message("assistant", "4", reasoning_content=thought),
        ]  # fmt: skip
        (answer,) = check(QWEN, messages)
        assert answer.startswith("<|im_start|>assistant\n<think>\n")
        assert thought.strip("\n") in answer
        same = [messages[0], message("assistant", "4", thinking=thought)]
        template = ChatTemplate(QWEN, TOKENIZER)
        assert template.encode(same) == template.encode(messages)


THINKING = [
    message("user", "2 + 2?"), message("assistant", "4", reasoning_content="Two and two."),
    message("user", "3 + 3?"), message("assistant", "6"),
    message("user", "4 + 4?"), message("assistant", "8", reasoning_content="Four and four."),
]  # fmt: skip
INLINE = [
    one if "reasoning_content" not in one
    else message("assistant", f"<think>\n{one['reasoning_content']}\n</think>\n\n{one['content']}")
    for one in THINKING
]  # fmt: skip


@pytest.mark.parametrize("messages", [THINKING, INLINE], ids=["field", "inline"])
def test_template_that_drops_an_earlier_thought_is_blamed_for_that_message(messages: Any) -> None:
    template = ChatTemplate(QWEN, TOKENIZER)
    with pytest.raises(ValueError, match="leaves out the reasoning_content of message 2 of 6:"):
        template.encode(messages)
    assert template.encode(messages, targets=[5]).ids == stock_ids(STOCK_QWEN, messages)


@pytest.mark.parametrize("messages", [THINKING, INLINE], ids=["field", "inline"])
def test_prompt_leaves_earlier_thoughts_out_as_the_template_does(messages: Any) -> None:
    template = ChatTemplate(QWEN, TOKENIZER)
    for i in (1, 3, 5):
        assert template.prompt(messages[:i]) == stock_ids(STOCK_QWEN, messages[:i], prompt=True)


@pytest.mark.parametrize("messages", [THINKING, INLINE], ids=["field", "inline"])
def test_each_answer_is_learned_where_the_template_writes_its_thoughts(messages: Any) -> None:
    template = ChatTemplate(QWEN, TOKENIZER)
    talk = Conversation(messages, "a:1")
    first, rest = conversation_windows(talk, template, 9999)
    assert (first.answers, rest.answers) == (1, 2)
    whole = [
        STOCK_QWEN.apply_chat_template(messages[:n], tokenize=False).removesuffix("\n")
        for n in (2, 6)
    ]
    assert [TOKENIZER.decode(window.example.ids) for window in (first, rest)] == whole
    start = "<|im_start|>assistant\n"
    assert [target_texts(window.example, TOKENIZER) for window in (first, rest)] == [
        [f"{start}<think>\nTwo and two.\n</think>\n\n4{END}"],
        [f"{start}6{END}", f"{start}<think>\nFour and four.\n</think>\n\n8{END}"],
    ]
    short = list(conversation_windows(talk, template, 70))
    assert [window.answers for window in short] == [1, 1, 1]
    counts = ChatCounts(9999)
    list(encode_conversations([talk], template, counts))
    assert (counts.answers, counts.kept_answers) == (3, 3)


@pytest.mark.parametrize(
    "content",
    ["Well: <think>a</think>b", "<think>a</think>b</think>c", "<think>x<think>a</think>b"],
)
def test_text_that_the_template_drops_beside_thoughts_is_rejected(content: str) -> None:
    template = ChatTemplate(QWEN, TOKENIZER)
    asked = message("user", "a")
    with pytest.raises(ValueError, match=r"changes the contents of messages \(message 2 of 2"):
        template.encode([asked, message("assistant", content)])
    both = [asked, message("assistant", "<think>a</think>b", reasoning_content="c")]
    check(QWEN, both)


def test_thoughts_that_are_never_written_are_rejected() -> None:
    source = QWEN.replace("{{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>", "{{- '")
    assert source != QWEN
    with pytest.raises(ValueError, match="leaves out the reasoning_content of message 2 of 2"):
        list(
            conversation_windows(
                Conversation(THINKING[:2], "a"), ChatTemplate(source, TOKENIZER), 99
            )
        )


AGING = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 < messages|length - 2 %}{{- '[old]' }}{%- endif %}
{{- m.content + '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def test_template_that_changes_an_earlier_message_is_blamed_for_it() -> None:
    messages = [message("user", "a"), message("assistant", "b")] * 2
    with pytest.raises(ValueError, match=r"changes message 2 of 6 once more messages follow"):
        ChatTemplate(AGING, TOKENIZER).encode(messages[:2] * 3)


@pytest.mark.parametrize(
    ("field", "written"),
    [
        ({"thinking": "hm"}, "(hm)"),
        ({"reasoning_content": "hm"}, "(hm)"),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "f{}"),
        ({"refusal": "never"}, "No: never"),
        ({"refusal": date(2024, 2, 29)}, "No: 2024-02-29"),  # from a table
    ],
)
def test_fields_are_handed_under_the_name_that_the_template_reads(
    field: dict[str, Any], written: str
) -> None:
    messages = [message("user", "a"), message("assistant", "b", **field)]
    template = ChatTemplate(OTHER, TOKENIZER)
    text = TOKENIZER.decode(template.encode(messages).ids)
    assert text.endswith(f"<|im_start|>assistant\n{written}b<|im_end|>")
    with pytest.raises(ValueError, match="message 2 of 2: it has tool_calls, which the chat"):
        template.encode([messages[0], message("assistant", "b", tool_calls=[call("f", {})])])


def test_a_call_in_the_older_form_is_handed_as_a_tool_call() -> None:
    old = {"name": "f", "arguments": '{"a": 1}'}
    template = ChatTemplate(QWEN, TOKENIZER)
    asked = message("user", "a")
    new = message("assistant", "", tool_calls=[{"type": "function", "function": old}])
    given = [asked, message("assistant", None, function_call=old, mood="calm")]
    assert template.encode(given) == template.encode([asked, new])
    given.append(message("tool", "r", tool_call_id="1"))
    assert template.ignored_fields(given) == ["mood"]


def test_roles_that_the_template_does_not_write_are_rejected() -> None:
    messages = [
        message("user", "a"), message("assistant", "", tool_calls=[call("f", {})]),
        message("tool", "r"), message("assistant", "b"),
    ]  # fmt: skip
    source = QWEN.replace("message.role == 'tool'", "message.role == 'observation'")
    with pytest.raises(ValueError, match=r"content of message 3 of 4 \(tool\) 0 times"):
        ChatTemplate(source, TOKENIZER).encode(messages)
