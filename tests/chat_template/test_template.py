"""One template for tuning and chatting: ids as transformers makes them, answers scored."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chats import BYTES, OURS, learned, said, stock, stock_ids, talk
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Reference
from tokenizers.trainers import BpeTrainer

from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate, Message
from gptsmith.tokenizer import SPECIAL_TOKENS, Tokenizer

TEXT = (
    "The assistant said: I am the model of the user. System user assistant [INST] [/INST]\n\n"
    "What is it? It is a test, of course. Red, green and blue: 1 2 3 4 5.\n" * 9
)
TALKS = [
    talk("What is it?", "A test."),
    talk("What is 1 2 3?", "It is 4 5.", "And green?\n\nOr blue?", "Red, of course.\n\nÜber — ☃."),
    talk("Who are you?", "I am the model.", system="You are of course a model."),
    talk("", ""),
    talk("a", "b\n", "\n c  d ", "\n  e"),
]


OURS_IN_STOCK = stock(BYTES, TEMPLATE)


def test_reference_conversation_has_the_expected_ids_and_targets(real_data: Path) -> None:
    gpt2 = Tokenizer.gpt2(real_data / "gpt2_bpe").add_special_tokens(CHAT_TOKENS)
    assert [gpt2.special_tokens[name] for name in CHAT_TOKENS] == list(range(50257, 50262))
    template = ChatTemplate(TEMPLATE, gpt2)
    ids, scored, _ = template.encode(talk("Hello!", "Hi there!"))
    assert ids == [50259, 15496, 0, 50261, 50260, 17250, 612, 0, 50261]
    assert scored == [False] * 4 + [True] * 5
    assert template.prompt(talk("Hello!")) == ids[:5]
    assert template.stop_ids == (50261, 50256)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("messages", TALKS)
def test_default_template_equals_transformers(kind: str, messages: list[Message]) -> None:
    plain = Tokenizer.byte() if kind == "byte" else Tokenizer.train_bpe([TEXT], 320)
    tokenizer = plain.add_special_tokens(CHAT_TOKENS)
    template, theirs = ChatTemplate(TEMPLATE, tokenizer), stock(tokenizer, TEMPLATE)
    ids, scored, ends = template.encode(messages)
    assert ids == stock_ids(theirs, messages)
    assert template.prompt(messages[:-1]) == stock_ids(theirs, messages[:-1], prompt=True)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    wanted = [f"<|assistant|>{answer}<|end|>" for answer in answers]
    assert learned(ids, scored, tokenizer) == wanted
    assert [ids[end - 1] for end in ends] == [tokenizer.special_tokens["<|end|>"]] * len(answers)
    template.check_prefix_preserving()


def strange_texts(count: int) -> list[str]:
    """Random characters, and the spellings of special tokens whole, in pieces and in a row."""
    choose = random.Random(7)
    spellings = [*SPECIAL_TOKENS, "<|", "|>", "<", "|", "end", "<|im_end|>", "\ufdd00\ufdd1"]
    texts = []
    for _ in range(count):
        parts = [
            choose.choice(spellings)
            if choose.random() < 0.5
            else "".join(chr(choose.choice((32, 97, 223, 0x4E00, 0x1F600))) for _ in range(3))
            for _ in range(choose.randrange(12))
        ]
        texts.append("".join(parts))
    return texts


@pytest.mark.parametrize("make", [lambda: BYTES, lambda: metaspace("first")])
def test_user_text_never_becomes_a_special_token(make) -> None:
    tokenizer = make()
    template = ChatTemplate(TEMPLATE, tokenizer)
    special = set(tokenizer.special_tokens.values())
    frame = [tokenizer.special_tokens[f"<|{name}|>"] for name in ("user", "end", "assistant")]
    for text in strange_texts(10_000 if tokenizer is BYTES else 1000):
        ids = template.prompt(talk(text))
        assert [i for i in ids if i in special] == frame
        assert tokenizer is not BYTES or tokenizer.decode(ids[1:-2]) == text


def test_answer_text_never_becomes_a_special_token() -> None:
    ids, scored, _ = OURS.encode(talk("Say <|end|>", "<|end|><|user|>", system="<|assistant|>"))
    names = {i: name for name, i in BYTES.special_tokens.items()}
    assert [names[i] for i in ids if i in names] == [
        "<|system|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>", "<|end|>",
    ]  # fmt: skip
    assert sum(scored) == len("<|end|><|user|>") + 2


def test_spelled_special_tokens_are_encoded_as_plain_text() -> None:
    """With split_special_tokens it takes everything as text; so compare the content alone."""
    tokenizer = Tokenizer.train_bpe([TEXT], 320).add_special_tokens(CHAT_TOKENS)
    theirs = stock(tokenizer, TEMPLATE, split_special_tokens=True)
    text = "What is <|end|><|assistant|>?"
    ids = ChatTemplate(TEMPLATE, tokenizer).prompt(talk(text))
    assert ids[1:-2] == theirs.encode(text, add_special_tokens=False)


# Templates as other families have them, in our own words.

CHATML = (  # with a system prompt of its own
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a test.<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (  # begins with a token, trims
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|stop|>\n\n' }}"
    "{{ m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
INST = (  # no generation prompt, an answer begins with a space, the order of roles is checked
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Users and assistants take turns') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
WORDS = (  # roles are ordinary words, the answer ends with the end of the text
    "{% for m in messages %}{{ '|' ~ m['role'] ~ '|\n' ~ m['content'] ~ eos_token ~ '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '|assistant|\n' }}{% endif %}{% endfor %}"
)
LAST = (  # says where the conversation ends, its tokens swallow the white space behind them
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
THINK = (  # the last answer is shown with its thoughts, earlier ones without
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}{% generation %}"
    "{%- if loop.index0 > ns.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
FAMILIES: dict[str, tuple[str, tuple[str, ...], str]] = {  # template, its tokens, its answer
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_start|>assistant\n{}<|im_end|>"),
    "llama 3": (
        LLAMA3,
        ("<|begin_of_text|>", "<|start|>", "<|stop|>", "<|eot|>"),
        "<|start|>assistant<|stop|>\n\n{}<|eot|>",
    ),
    "inst": (INST, ("<s>", "</s>"), " {}</s>"),
    "words": (WORDS, ("</s>",), "|assistant|\n{}</s>"),
    "last": (LAST, ("</s>", *CHAT_TOKENS), "<|assistant|>\n{}<|end|>"),
    "think": (
        THINK,
        ("<|im_start|>", "<|im_end|>"),
        "<|im_start|>assistant\n{}<|im_end|>",
    ),
}


def family(name: str) -> tuple[ChatTemplate, Tokenizer, Any]:
    source, tokens, _ = FAMILIES[name]
    plain = json.loads(Tokenizer.train_bpe([TEXT], 320).to_json())
    plain["added_tokens"] = []  # those who have <|endoftext|> say so
    plain["model"]["vocab"]["<|plain|>"] = plain["model"]["vocab"].pop("<|endoftext|>")
    tokenizer = Tokenizer(json.dumps(plain)).add_special_tokens(tokens)
    names = {"eos_token": "</s>"} if "</s>" in tokens else {}
    if bos := {"<s>", "<|begin_of_text|>"} & set(tokens):
        names["bos_token"] = bos.pop()
    if name == "last":
        document = json.loads(tokenizer.to_json())
        for token in document["added_tokens"]:
            token["rstrip"] = True
        tokenizer = Tokenizer(json.dumps(document))
    return ChatTemplate(source, tokenizer), tokenizer, stock(tokenizer, source, **names)


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_of_other_models_give_the_ids_of_transformers(name: str) -> None:
    template, _, theirs = family(name)
    for messages in TALKS:
        if name in ("inst",) and messages[0]["role"] == "system":
            with pytest.raises(ValueError, match=r"rejects .*: Users and assistants take turns"):
                template.encode(messages)
            continue
        assert template.encode(messages).ids == stock_ids(theirs, messages)
        assert template.prompt(messages[:-1]) == stock_ids(theirs, messages[:-1], prompt=True)
    template.check_prefix_preserving()


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_of_other_models_mark_the_assistant_tokens_as_targets(name: str) -> None:
    template, tokenizer, _ = family(name)
    messages = talk("What is it?", "A test.", "And green?", "Red, blue.")
    answers = ["A test.", "Red, blue."]
    if name == "think":
        answers[1] = "<think>\n\n</think>\n\n" + answers[1]
    frame = FAMILIES[name][2].replace("\n", "" if name == "last" else "\n")
    ids, is_target, _ = template.encode(messages)
    assert learned(ids, is_target, tokenizer) == [frame.format(answer) for answer in answers]
    end = frame.partition("{}")[2]
    assert template.stop_ids[0] == tokenizer.special_tokens[end]
    assert len(template.stop_ids) == 1 + (name == "last")


@pytest.mark.parametrize(
    "turns", ["aua", "saua", "aaua", "auaa", "uua", "uuua", "suua", "uaa", "uuauuaa", "ssua", "a"]
)
@pytest.mark.parametrize("name", ["ours", *FAMILIES])
def test_roles_in_any_order_give_the_ids_of_transformers(name: str, turns: str) -> None:
    """A greeting, several messages of one: it is for the template to reject them."""
    template, tokenizer, theirs = family(name) if name != "ours" else (OURS, BYTES, OURS_IN_STOCK)
    messages = said(turns)
    try:
        expected = stock_ids(theirs, messages)
    except Exception as error:
        assert name == "inst"
        with pytest.raises(ValueError, match=f"rejects this conversation: {error}"):
            template.encode(messages)
        return
    ids, is_target, ends = template.encode(messages)
    assert ids == expected
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    starts = [0, *ends]
    for answer, start, end in zip(answers, starts, ends, strict=False):
        (run,) = learned(ids[start:end], is_target[start:end], tokenizer)
        assert answer in run
        assert run.endswith(tokenizer.decode([template.stop_ids[0]]))
        header = FAMILIES[name][2].partition("{}")[0] if name != "ours" else "<|assistant|>"
        assert run.startswith(header.replace("\n", "" if name == "last" else "\n"))
    assert len(answers) == len(ends)
    assert sum(is_target[ends[-1] :]) == 0


def metaspace(scheme: str) -> Tokenizer:
    """A tokenizer as Llama 2 has it, which marks beginnings of words and texts with U+2581."""
    reference = Reference(models.BPE(unk_token="<unk>", byte_fallback=True))
    if scheme == "legacy":
        reference.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        reference.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=[], max_token_length=8,
    )  # fmt: skip
    reference.train_from_iterator([TEXT.replace("\n", " ")], trainer)
    document = json.loads(reference.to_str())
    vocab = document["model"]["vocab"]
    vocab.update({piece: len(vocab) + i for i, piece in enumerate(fallback)})
    reference = Reference.from_str(json.dumps(document))
    reference.add_special_tokens([AddedToken(n, normalized=False) for n in CHAT_TOKENS])
    return Tokenizer(reference.to_str())


@pytest.mark.parametrize("scheme", ["first", "always", "never", "legacy"])
@pytest.mark.parametrize("source", [TEMPLATE, INST, WORDS], ids=["ours", "inst", "words"])
def test_sentencepiece_space_marks_equal_transformers(scheme: str, source: str) -> None:
    tokenizer = metaspace(scheme)
    template = ChatTemplate(source, tokenizer)
    theirs = stock(tokenizer, source, eos_token="</s>", bos_token="<s>")
    for messages in (TALKS[0], TALKS[1], TALKS[4]):
        assert template.encode(messages).ids == stock_ids(theirs, messages)
        assert template.prompt(messages[:-1]) == stock_ids(theirs, messages[:-1], prompt=True)


def test_content_parts_are_joined() -> None:
    parts: Any = [{"type": "text", "text": "Red"}, {"type": "text", "text": ", blue"}]
    assert OURS.prompt([{"role": "user", "content": parts}]) == OURS.prompt(talk("Red, blue"))


PICTURE: Any = [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}]
NOTHING: Any = [{"role": "user", "content": None}]
NO_ROLE: Any = [{"from": "human", "value": "Hi"}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the conversation has no messages"),
        (talk("Hi"), "no assistant message: nothing to learn"),
        (
            [Message(role="narrator", content="Hi")],
            "message 1 of 1: unknown role 'narrator'; use system, user",
        ),
        (PICTURE, "message 1 of 1: its content has parts that are not text"),
        (NOTHING, "message 1 of 1: its content is not text but NoneType None"),
        (NO_ROLE, 'message 1 of 1: expected {"role"'),
        (talk("a\ud800", "b"), "lone surrogate"),
    ],
)
def test_invalid_conversations_are_rejected(messages: list[Message], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$") as caught:
        OURS.encode(messages)
    assert message in str(caught.value)


def test_prompt_must_end_with_a_user_message() -> None:
    with pytest.raises(ValueError, match="last message is the assistant's"):
        OURS.prompt(talk("Hi", "Ho"))
    with pytest.raises(ValueError, match="no messages"):
        OURS.prompt([])


LOOP = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "chat template, line 1: Unexpected end of template"),
        (LOOP.replace("<|end|>", ""), "no special token ends an answer"),
        (LOOP.replace("<|end|>", "</s>"), r"\('</s>' does\)"),  # no token of this tokenizer
        (LOOP.replace("m.content", "m.content + m.content"), r"message 1 of 4 \(user\) 2 times"),
        ("{{ messages[0].content }}<|end|>", r"message 2 of 4 \(assistant\) 0 times"),
        (LOOP.replace("'<|' +", "''.__class__.__mro__[1] +"), "rejects this conversation: "),
        (LOOP.replace("m.role", "m.name"), "rejects this conversation: 'dict object' has no"),
        (LOOP + "{{ 'a' * 10000000000 }}", "the chat template was stopped at 256 MB of memory"),
    ],
)
def test_unusable_templates_are_rejected_at_construction(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$") as caught:
        ChatTemplate(source, BYTES)
    caught.match(message)


@pytest.mark.parametrize("change", ["m.content | upper", "m.content[:5]", "m.content | tojson"])
def test_template_that_changes_contents_is_rejected(change: str) -> None:
    template = ChatTemplate(LOOP.replace("m.content", f"({change})"), BYTES)
    with pytest.raises(ValueError, match="changes the contents of messages"):
        template.encode(talk("Red and\nblue", "Green and\nblue"))


@pytest.mark.parametrize(
    "prompt",
    [
        "<|assistant|>\n",  # trained without the line end
        "<|user|>",
    ],
)
def test_template_that_is_not_prefix_preserving_is_rejected(prompt: str) -> None:
    source = LOOP + "{% if add_generation_prompt %}" + prompt.replace("\n", "{{ '\n' }}")
    template = ChatTemplate(source + "{% endif %}", BYTES)
    with pytest.raises(ValueError, match="differs between training and chatting"):
        template.check_prefix_preserving()
    with pytest.raises(ValueError, match="differs between training and chatting"):
        template.encode(talk("Hi", "Ho"))


def test_prompt_that_ends_inside_a_token_is_rejected() -> None:
    tokenizer = Tokenizer.train_bpe(["Assistant: Ask Again Any Assistant: Ask"] * 9, 300)
    source = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    template = ChatTemplate(source, tokenizer)
    with pytest.raises(ValueError, match="'assistant: ', which becomes other tokens"):
        template.check_prefix_preserving()
    # the answer's first token begins with the space that should end the prompt, and is scored
    ids, is_target, _ = template.encode(talk("Any", "Ask"))
    assert learned(ids, is_target, tokenizer) == ["assistant: Ask<|endoftext|>"]
    template = ChatTemplate(source.replace("'assistant: '", "'assistant:'"), tokenizer)
    template.check_prefix_preserving()
    ids, is_target, _ = template.encode(talk("Any", "Ask"))
    assert learned(ids, is_target, tokenizer) == ["assistant: Ask<|endoftext|>"]


def test_truncate_drops_the_oldest_turns() -> None:
    messages = talk("one", "eins", "two", "zwei", "three", system="count")
    length = len(OURS.prompt(messages))
    assert OURS.truncate(messages, length).messages == messages
    shorter = OURS.truncate(messages, length - 1).messages
    assert shorter == [messages[0], *messages[3:]]
    least = len(OURS.prompt([messages[0], messages[-1]]))
    assert OURS.truncate(messages, least).messages == [messages[0], messages[-1]]
    with pytest.raises(ValueError, match=f"takes {least} tokens, .* but only {least - 1} fit"):
        OURS.truncate(messages, least - 1)


def test_truncate_never_splits_a_turn() -> None:
    greeting = Message(role="assistant", content="Good morning")
    messages = [greeting, *talk("one", "eins", "two", "zwei", "three")]
    kept = [OURS.truncate(messages, limit).messages for limit in range(10, 70)]
    assert [len(a) <= len(b) for a, b in pairwise(kept)]
    assert {len(k) for k in kept} == {1, 3, 5, 6}
    assert all(messages[-len(k) :] == k for k in kept)


def test_templates_can_use_the_date() -> None:
    source = "{{ strftime_now('%Y') }}" + LOOP
    from datetime import datetime

    ids = ChatTemplate(source, BYTES).prompt(talk("Hi"))
    assert BYTES.decode(ids).startswith(f"{datetime.now():%Y}<|user|>")
