"""Long conversations become windows of whole turns; each answer that fits is trained on once."""

import re
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from chats import BYTES, OURS, said, target_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.template import ChatTemplate
from gptsmith.data.chat import ChatCounts, divide, encode_conversations
from gptsmith.data.chat_windows import conversation_windows, token_windows
from gptsmith.data.conversations import Conversation
from gptsmith.data.examples import Example, Examples
from gptsmith.tokenizer import Tokenizer

PLACE = "chat.jsonl:1"


CHATML_BYTES = Tokenizer.byte().add_special_tokens(("<|im_start|>", "<|im_end|>"))


def chatml() -> ChatTemplate:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return ChatTemplate(source, CHATML_BYTES)


def inst() -> ChatTemplate:
    """No special token begins a user's message."""
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}"
        "{% endif %}{% endfor %}"
    )
    return ChatTemplate(source, Tokenizer.byte().add_special_tokens(("<s>", "</s>")))


TEMPLATES = {"ours": OURS, "chatml": chatml(), "inst": inst()}


def conversation(lengths: list[int], system: int = 0, learned: Any = None) -> Conversation:
    """Messages of these lengths, each of one letter, user and assistant in turns."""
    letters = [chr(ord("a") + i % 26) for i in range(len(lengths))]
    messages: list[Any] = [
        {"role": ("user", "assistant")[i % 2], "content": letter * n}
        for i, (letter, n) in enumerate(zip(letters, lengths, strict=True))
    ]
    if system:
        messages.insert(0, {"role": "system", "content": "S" * system})
    return Conversation(messages, PLACE, learned)


def tokens_of(talk: Conversation, template: ChatTemplate) -> Example:
    """The conversation as a row of token ids and labels."""
    encoded = template.encode(talk.messages)
    ids = np.array(encoded.ids, np.int32)
    return Example(ids, np.where(encoded.is_target, ids, np.int32(IGNORE_INDEX)), PLACE)


def runs(example: Example) -> list[bytes]:
    """The runs of targets, without their special tokens."""
    return [re.sub(r"<\|\w+\|>", "", run).encode() for run in target_texts(example)]


@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=20), st.integers(0, 9),
    st.integers(8, 90), st.sets(st.integers(0, 19)),
)  # fmt: skip
@settings(max_examples=60)
def test_each_answer_that_fits_is_learned_once(
    lengths: list[int], system: int, limit: int, unlearned: set[int]
) -> None:
    answers = range(1, len(lengths), 2)
    shift = bool(system)
    chosen = frozenset(i + shift for i in answers if i not in unlearned)
    talk = conversation(lengths, system, chosen)
    windows = list(conversation_windows(talk, OURS, limit))
    # A message takes two special tokens; its own turn and the system message must fit.
    fits = [
        i for i in answers
        if i + shift in chosen
        and lengths[i - 1] + lengths[i] + 4 + (system + 2 if system else 0) <= limit
    ]  # fmt: skip
    wanted = [talk.messages[i + shift]["content"].encode() for i in fits]
    assert [run for window in windows for run in runs(window.example)] == wanted
    for window in windows:
        ids = window.example.ids.tolist()
        assert len(ids) <= limit
        assert len(runs(window.example)) == window.answers
        text = BYTES.decode(ids)
        assert text.count("<|system|>") == text.startswith(f"<|system|>{'S' * system}<|end|>")
        assert text.count("<|system|>") == shift
        assert text.split("<|end|>")[shift].startswith("<|user|>")  # whole turns
        assert ids[-1] == window.example.labels[-1] == BYTES.special_tokens["<|end|>"]


def test_windows_are_as_long_as_they_can_be() -> None:
    talk = conversation([3] * 20)
    windows = list(conversation_windows(talk, OURS, 35))
    assert [len(w.example.ids) for w in windows] == [30, 30, 30, 10]  # ten tokens for each turn
    assert [w.answers for w in windows] == [3, 3, 3, 1]
    assert {w.example.name for w in windows} == {PLACE}


def test_very_long_conversation() -> None:
    talk = conversation([3] * 3000, system=2)
    windows = list(conversation_windows(talk, OURS, 25))  # 4 tokens of the system message
    assert [w.answers for w in windows] == [2] * 750
    learned = [run for w in windows for run in runs(w.example)]
    answers = [m["content"].encode() for m in talk.messages if m["role"] == "assistant"]
    assert learned == answers


def test_conversation_that_fits_is_one_window() -> None:
    talk = conversation([3] * 6, system=2)
    whole = OURS.encode(talk.messages)
    for limit in (len(whole.ids), 10**6):
        ((example, answers, _),) = conversation_windows(talk, OURS, limit)
        assert (example.ids.tolist(), answers) == (whole.ids, 3)
        assert ((example.labels != IGNORE_INDEX) == whole.is_target).all()


def test_turns_before_the_only_answer_to_learn_are_its_context_where_they_fit() -> None:
    learned = frozenset([7])
    sizes = {}
    for limit in (40, 39, 30, 20, 10, 9):
        windows = list(conversation_windows(conversation([3] * 8, 0, learned), OURS, limit))
        sizes[limit] = [len(w.example.ids) for w in windows]
        assert [run for w in windows for run in runs(w.example)] == [b"hhh"] * len(windows)
    assert sizes == {40: [40], 39: [30], 30: [30], 20: [20], 10: [10], 9: []}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [0, 4])
@pytest.mark.parametrize("limit", [30, 47, 80, 200])
def test_rows_of_token_ids_are_divided_like_conversations(
    name: str, system: int, limit: int
) -> None:
    template = TEMPLATES[name]
    if name == "inst" and system:
        pytest.skip("this template has no system message")
    talk = conversation([5, 3, 40, 2, 4, 4, 3, 3, 9, 9, 1, 1, 2, 5], system)
    found = list(token_windows(tokens_of(talk, template), template.turn_tokens(), limit))
    expected = list(conversation_windows(talk, template, limit))
    assert [w.example.ids.tolist() for w in found] == [w.example.ids.tolist() for w in expected]
    assert [w.example.labels.tolist() for w in found] == [
        w.example.labels.tolist() for w in expected
    ]
    assert [w.answers for w in found] == [w.answers for w in expected]


@pytest.mark.parametrize("turns", ["aua", "auauaua", "saaua", "uuauua", "suuauuaua", "uaauaaa"])
@pytest.mark.parametrize("name", ["ours", "chatml"])
@pytest.mark.parametrize("limit", [24, 30, 47, 200])
def test_windows_of_roles_in_any_order(name: str, turns: str, limit: int) -> None:
    """Windows begin with the first of several messages of the user, or with the greeting."""
    template = TEMPLATES[name]
    talk = Conversation(said(turns), PLACE)
    windows = list(conversation_windows(talk, template, limit))
    decode = (BYTES if name == "ours" else CHATML_BYTES).decode
    begins = set()
    for window in windows:
        text = decode(window.example.ids)
        begins.add(re.findall(r"[sua]\d", text.replace("user", "").replace("assistant", ""))[0])
    allowed = {f"{b}{i}" for i, (a, b) in enumerate(pairwise(" " + turns))
               if b == "s" or a in " s" or (a, b) == ("a", "u")}  # fmt: skip
    assert begins <= allowed
    same = token_windows(tokens_of(talk, template), template.turn_tokens(), limit)
    for mine, theirs in zip(windows, same, strict=True):
        assert mine.answers == theirs.answers
        if "s" not in turns:
            assert mine.example.ids.tolist() == theirs.example.ids.tolist()


def test_tokens_that_begin_turns() -> None:
    user, answer, end = (BYTES.special_tokens[f"<|{x}|>"] for x in ("user", "assistant", "end"))
    assert OURS.turn_tokens() == ([user], [answer], end, [])
    (start, *user_name), (same, *answer_name), end, opening = TEMPLATES["chatml"].turn_tokens()
    assert (bytes(user_name), bytes(answer_name), opening) == (b"user", b"assistant", [])
    assert (same, end) == (start, start + 1)
    assert TEMPLATES["inst"].turn_tokens()._replace(end=0) == ([], [], 0, [257])


def test_answers_left_out_are_counted_first() -> None:
    counts = ChatCounts(20)
    talks = [conversation([3, 3, 3, 30, 3, 3]), conversation([30, 3]), conversation([2, 2])]
    made = list(encode_conversations(talks, OURS, counts))
    assert (counts.read, counts.kept, counts.answers, counts.kept_answers) == (3, 2, 5, 3)
    assert len(made) == 3
    assert str(counts).startswith(
        "left out: 2 of 5 answers (40.0%), as a turn is longer than 21 tokens: 1 (chat.jsonl:1); "
        "3 answers of 2 conversations are trained on; divided into windows of at most 21 tokens: 1"
    )
    whole = ChatCounts(99)
    assert len(list(encode_conversations(talks, OURS, whole))) == 3
    assert str(whole) == "all 5 answers of 3 conversations are trained on"


def test_only_the_beginning_is_used_without_windows() -> None:
    counts = ChatCounts(20, divide=False)
    talks = [conversation([3, 3, 3, 3, 3, 3]), conversation([30, 3, 2, 2]), conversation([2, 2])]
    made = list(encode_conversations(talks, OURS, counts))
    assert [runs(example) for example in made] == [[b"bbb", b"ddd"], [b"bb"]]
    assert str(counts).startswith(
        "left out: 3 of 6 answers (50.0%), as the conversation is longer than 21 tokens: 1"
    )


def test_rows_without_targets_are_counted() -> None:
    counts = ChatCounts(8)
    ids = np.arange(4, dtype=np.int32)
    nothing = Example(ids, np.full(4, IGNORE_INDEX, np.int32), "a:1")
    assert list(divide([nothing], OURS, counts)) == []
    assert (counts.remarks.total, counts.read, counts.kept) == (1, 1, 0)
    everything = Example(np.arange(30, dtype=np.int32), np.arange(30, dtype=np.int32), "a:2")
    assert list(divide([everything], OURS, counts)) == []
    assert str(counts).startswith("left out: 1 of 1 answers (100.0%)")


def test_windows_of_a_conversation_stay_in_one_split() -> None:
    talks = [conversation([3] * (2 + 2 * (i % 4)))._replace(place=f"a:{i}") for i in range(40)]
    examples = Examples(encode_conversations(talks, OURS, ChatCounts(24)))
    assert len(examples) > 40
    parts = examples.split((0.5, 0.3, 0.2), seed=3)
    names = [{example.name for example in part} for part in parts]
    assert [len(part) for part in names] == [19, 13, 8]
    assert not any(a & b for a, b in pairwise([*names, names[0]]))
    found = Counter(example.name for part in parts for example in part)
    assert found == Counter(example.name for example in examples)


def test_tool_results_stay_with_the_call() -> None:
    """An answer after a tool's result needs its whole turn: it is never the start of a window."""
    source = (
        "{% for m in messages %}{{ '<|' + (m.role if m.role != 'tool' else 'system') + '|>' }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
        "{{ m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    template = ChatTemplate(source, BYTES)
    turn: list[Any] = [
        {"role": "user", "content": "aaa"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "bbb"}}]},
        {"role": "tool", "content": "ccc"},
        {"role": "assistant", "content": "ddd"},
    ]
    talk = Conversation(turn * 3, PLACE)
    # At 39, the second turn begins again for its second answer.
    for limit, sizes in {20: [2, 2, 2], 19: [1, 1, 1], 40: [4, 2], 39: [3, 2, 1], 9: []}.items():
        windows = list(conversation_windows(talk, template, limit))
        assert [w.answers for w in windows] == sizes
        learned = [run for w in windows for run in runs(w.example)]
        assert len(learned) == sum(w.answers for w in windows)
        same = list(token_windows(tokens_of(talk, template), template.turn_tokens(), limit))
        assert [w.example.ids.tolist() for w in same] == [w.example.ids.tolist() for w in windows]
        assert [runs(w.example) for w in same] == [runs(w.example) for w in windows]
