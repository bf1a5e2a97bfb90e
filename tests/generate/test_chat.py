"""Replies: one turn, a history, many at once; where they end, and what is truncated before them."""

import pytest
import torch
import torch.nn.functional as F
from chats import BYTES, OURS, talk

from gptsmith.chat_template.template import Message
from gptsmith.generate.chat import Chat
from gptsmith.generate.options import SamplingConfig
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel

CONTEXT = 48
CONFIG = ModelConfig(
    n_layer=2, n_head=2, n_embd=32, context_length=CONTEXT, vocab_size=BYTES.vocab_size
)
GREEDY = SamplingConfig(temperature=0, max_new_tokens=12)


LESSONS = [
    talk("Red?", "Rot."),
    talk("Blue?", "Blau."),
    talk("Red?", "Rot.", "Again?", "Rot, Rot."),
    talk("Blue?", "Blau.", "Again?", "Blau, Blau."),
    talk("Red?", "Rouge.", system="French"),
]


@pytest.fixture(scope="module")
def tuned() -> GPTModel:
    """Knows its lessons by heart."""
    torch.manual_seed(0)
    model = GPTModel(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    encoded = [OURS.encode(lesson) for lesson in LESSONS]
    for _ in range(60):
        loss = torch.zeros(())
        for ids, scored, _ in encoded:
            row, mask = torch.tensor(ids), torch.tensor(scored)
            targets = row.masked_fill(~mask, -100)[1:]
            loss = loss + F.cross_entropy(model(row[None, :-1])[0], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def untrained() -> GPTModel:
    """Random weights, so it seldom stops."""
    torch.manual_seed(1)
    model = GPTModel(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.fixture
def chat(tuned: GPTModel) -> Chat:
    return Chat(tuned, BYTES, OURS)


@pytest.fixture
def endless(untrained: GPTModel) -> Chat:
    return Chat(untrained, BYTES, OURS)


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_reply_is_streamed(chat: Chat, lesson: list[Message]) -> None:
    shown: list[str] = []
    generation = chat.reply(lesson[:-1], GREEDY, shown.append)
    assert generation.text == lesson[-1]["content"] == "".join(shown)
    assert len(shown) > 1


def test_the_next_turn_reads_only_what_is_new(chat: Chat) -> None:
    lesson = LESSONS[2]
    first = chat.reply(lesson[:1], GREEDY)
    second = chat.reply(lesson[:3], GREEDY)
    assert second.text == lesson[3]["content"]
    # the last token of the reply was not read
    assert second.cached_tokens == len(OURS.prompt(lesson[:1])) + len(first.ids)


def test_many_replies_equal_each_alone(chat: Chat, endless: Chat) -> None:
    conversations = [lesson[:-1] for lesson in LESSONS] * 8  # more than a batch
    prompts = [chat.encode(messages, GREEDY).ids for messages in conversations]
    texts = [generation.text for generation in chat.reply_all(prompts, GREEDY)]
    assert texts == [lesson[-1]["content"] for lesson in LESSONS] * 8
    # long and short ones together, up to the end of the context
    conversations = [talk("x" * n) for n in (1, 40, 20, 30, 44, 33)] + [talk("y" * 20)] * 2
    prompts = [OURS.prompt(messages) for messages in conversations]
    sampling = SamplingConfig(temperature=1.5, max_new_tokens=24, seed=3)
    together = endless.reply_all(prompts, sampling)
    for i, generation in enumerate(together):
        prompt = OURS.truncate(conversations[i], CONTEXT)
        alone = endless.reply(prompt, sampling.with_seed(3 + i))
        assert (generation.ids, generation.text) == (alone.ids, alone.text)
        assert generation.finish_reason == alone.finish_reason
    assert chat.reply_all([], GREEDY) == []


def test_a_reply_never_outgrows_the_context(endless: Chat) -> None:
    sampling = SamplingConfig(temperature=0, max_new_tokens=1000)
    for n in (1, 21):
        prompt = endless.encode(talk("x" * n), sampling)
        generation = endless.reply(prompt, sampling)
        assert len(generation.ids) + len(prompt.ids) <= CONTEXT
        assert generation.dropped_tokens == 0


def test_old_turns_make_room_for_the_reply(chat: Chat) -> None:
    history = talk("Blue?", "Blau.", *("Red?", "Rot.") * 3, "Again?")
    ids, kept = chat.encode(history, GREEDY)
    assert kept == history[-len(kept) :]
    assert 1 < len(kept) < len(history)
    assert kept[0]["role"] == "user"
    assert ids == OURS.prompt(kept)
    assert len(ids) <= CONTEXT - 12
    assert chat.reply(history, GREEDY).ids == chat.reply(kept, GREEDY).ids
    # a reply that could fill the context leaves half of it to the history
    long = GREEDY.model_copy(update={"max_new_tokens": 10 * CONTEXT})
    assert 12 < len(chat.encode(history, long).ids) <= CONTEXT // 2
    with pytest.raises(ValueError, match="but only 36 fit: shorten it"):
        chat.reply(talk("x" * 40), GREEDY)


def test_ctrl_c_ends_the_reply_but_not_the_chat(chat: Chat) -> None:
    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.reply(LESSONS[0][:1], GREEDY, interrupt)
    assert not chat.engine.busy
    assert chat.reply(LESSONS[1][:1], GREEDY).text == LESSONS[1][1]["content"]


def test_special_tokens_end_a_reply_and_are_not_shown() -> None:
    """Whatever a model says next, only text comes out."""
    torch.manual_seed(0)
    model = GPTModel(CONFIG).eval()
    special = sorted(BYTES.special_tokens.values())
    with torch.no_grad():
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.5)
        model.head_weight[special] *= 3  # so that they are likely
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=30)
    prompts = [OURS.prompt(talk(chr(97 + i))) for i in range(26)]
    generations = Chat(model, BYTES, OURS).reply_all(prompts, sampling)
    assert {generation.finish_reason for generation in generations} == {"stop"}
    for generation in generations:
        assert not set(generation.ids) & set(special)
        assert "<|" not in generation.text
