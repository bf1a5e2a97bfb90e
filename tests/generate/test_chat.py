"""Answers: one turn, a history, many at once; where they end, and what is left out before them."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from gptsmith.chat_template import CHAT_TOKENS, TEMPLATE, ChatTemplate, Message
from gptsmith.generate.chat import (
    answers,
    fit_history,
    generate_chat_response,
    generate_multi_turn_response,
    replies,
    reply,
)
from gptsmith.generate.sampling import SamplingConfig
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import Tokenizer

TOKENIZER = Tokenizer.byte().add_special_tokens(CHAT_TOKENS)
CHAT = ChatTemplate(TEMPLATE, TOKENIZER)
CONTEXT = 48
CONFIG = ModelConfig(
    n_layer=2, n_head=2, n_embd=32, context_length=CONTEXT, vocab_size=TOKENIZER.vocab_size
)
GREEDY = SamplingConfig(temperature=0, max_new_tokens=12)


def talk(*contents: str, system: str | None = None) -> list[Message]:
    roles = ("user", "assistant") * len(contents)
    turns = [Message(role=r, content=c) for r, c in zip(roles, contents, strict=False)]
    return turns if system is None else [Message(role="system", content=system), *turns]


LESSONS = [
    talk("Red?", "Rot."),
    talk("Blue?", "Blau."),
    talk("Red?", "Rot.", "Again?", "Rot, Rot."),
    talk("Blue?", "Blau.", "Again?", "Blau, Blau."),
    talk("Red?", "Rouge.", system="French"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is no work to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> GPTModel:
    """Knows its lessons by heart."""
    torch.manual_seed(0)
    model = GPTModel(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    encoded = [CHAT.encode(lesson) for lesson in LESSONS]
    for _ in range(60):
        loss = torch.zeros(())
        for ids, scored in encoded:
            row, mask = torch.tensor(ids), torch.tensor(scored)
            targets = row.masked_fill(~mask, -100)[1:]
            loss = loss + F.cross_entropy(model(row[None, :-1])[0], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def noise() -> GPTModel:
    """Has learned nothing, so it seldom stops."""
    torch.manual_seed(1)
    model = GPTModel(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def test_one_turn(model: GPTModel) -> None:
    assert generate_chat_response(model, TOKENIZER, "Red?", config=GREEDY) == "Rot."
    french = generate_chat_response(model, TOKENIZER, "Red?", system="French", config=GREEDY)
    assert french == "Rouge."


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_history(model: GPTModel, lesson: list[Message]) -> None:
    shown: list[str] = []
    text = generate_multi_turn_response(
        model, TOKENIZER, lesson[:-1], TEMPLATE, GREEDY, shown.append
    )
    assert text == lesson[-1]["content"] == "".join(shown)
    assert len(shown) > 1


def test_many_at_once_are_as_each_alone(model: GPTModel, noise: GPTModel) -> None:
    asked = [lesson[:-1] for lesson in LESSONS] * 8  # more than a batch
    assert (
        answers(model, TOKENIZER, CHAT, asked, GREEDY)
        == [lesson[-1]["content"] for lesson in LESSONS] * 8
    )
    # long and short ones together, up to and over the end of the context
    asked = [talk("x" * n) for n in (1, 40, 20, 30, 45, 33)]
    config = SamplingConfig(temperature=1.5, max_new_tokens=24, seed=3)
    asked = [m for m in asked if len(CHAT.prompt(m)) <= CONTEXT - 24] + [talk("y" * 20)] * 2
    together = replies(noise, TOKENIZER, CHAT, asked, config)
    for i, (messages, made) in enumerate(zip(asked, together, strict=True)):
        own = config.model_copy(update={"seed": 3 + i})
        assert made == reply(noise, TOKENIZER, CHAT, messages, own)
    assert answers(model, TOKENIZER, CHAT, [], GREEDY) == []


def test_an_answer_never_outgrows_the_context(noise: GPTModel) -> None:
    config = SamplingConfig(temperature=0, max_new_tokens=1000)
    room = [fit_history(noise, CHAT, talk("x" * n), config) for n in (1, 21)]
    for messages, made in zip(room, replies(noise, TOKENIZER, CHAT, room, config), strict=True):
        assert made == reply(noise, TOKENIZER, CHAT, messages, config)
        assert len(made.ids) + len(CHAT.prompt(messages)) <= CONTEXT
        assert made.forgotten == 0


def test_old_turns_make_room_for_the_answer(model: GPTModel) -> None:
    history = talk("Blue?", "Blau.", *("Red?", "Rot.") * 3, "Again?")
    kept = fit_history(model, CHAT, history, GREEDY)
    assert kept == history[-len(kept) :]
    assert 1 < len(kept) < len(history)
    assert kept[0]["role"] == "user"
    assert len(CHAT.prompt(kept)) <= CONTEXT - 12
    assert generate_multi_turn_response(model, TOKENIZER, history, config=GREEDY) == (
        generate_multi_turn_response(model, TOKENIZER, kept, config=GREEDY)
    )
    # an answer that could fill the context leaves half of it to the history
    endless = GREEDY.model_copy(update={"max_new_tokens": 10 * CONTEXT})
    assert 12 < len(CHAT.prompt(fit_history(model, CHAT, history, endless))) <= CONTEXT // 2
    with pytest.raises(ValueError, match="and only 36 fit: shorten it"):
        generate_chat_response(model, TOKENIZER, "x" * 40, config=GREEDY)


def test_special_tokens_end_an_answer_and_are_not_shown() -> None:
    """Whatever a model says next, only text comes out."""
    torch.manual_seed(0)
    model = GPTModel(CONFIG).eval()
    special = sorted(TOKENIZER.special_tokens.values())
    with torch.no_grad():
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.5)
        model.head_weight[special] *= 3  # so that they are likely
    config = SamplingConfig(temperature=1.0, max_new_tokens=30)
    asked = [talk(chr(97 + i)) for i in range(26)]
    made = replies(model, TOKENIZER, CHAT, asked, config)
    assert {generation.finish for generation in made} == {"stop"}
    for generation in made:
        assert not set(generation.ids) & set(special)
        assert "<|" not in generation.text


def test_a_foreign_template(model: GPTModel) -> None:
    source = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    told = generate_chat_response(model, TOKENIZER, "Red?", template=source, config=GREEDY)
    chat = ChatTemplate(source, TOKENIZER)
    assert told == reply(model, TOKENIZER, chat, talk("Red?"), GREEDY).text
