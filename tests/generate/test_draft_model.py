"""Draft tokens of a smaller model change no bit, and save steps where the models agree."""

import pytest
import torch
from random_weights import add_noise, randomize

from gptsmith.generate.constraint import Constraint
from gptsmith.generate.drafts import DraftLength
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Request
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import Tokenizer

CONTEXT, V = 128, 257
CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=CONTEXT, vocab_size=V)


def model(seed: int = 1, noise: float = 0, **axes: int) -> GPTModel:
    made = GPTModel(CONFIG.change(**axes))
    randomize(made, seed)
    torch.manual_seed(0)
    add_noise(made, noise)
    return made.eval()


def requests() -> list[Request]:
    """Greedy and sampled, with penalties, two samples of one prompt, texts that are shifted."""
    made = []
    for i in range(12):
        sampling = SamplingConfig(
            max_new_tokens=(40, 150)[i % 4 == 3],
            temperature=(0, 1, 1.3)[i % 3],
            top_k=(None, 20)[i % 2],
            frequency_penalty=(0, 0.5)[i % 5 == 4],
            seed=i,
        )
        prompt = [(7 * j + i // 2) % V for j in range((3, 64, 100)[i // 2 % 3])]
        made.append(Request(prompt, sampling, logprobs=2))
    return made


def run(engine: Engine, given: list[Request]) -> list[tuple[object, ...]]:
    found = [engine.add(request) for request in given]
    assert len([*engine.as_completed(found)]) == len(found)
    return [(g.ids, g.logprobs, g.finish_reason) for g in found]


@pytest.fixture(scope="module")
def expected() -> list[tuple[object, ...]]:
    engine = Engine(model())
    if not engine.exact:
        pytest.skip("no compiled kernels on this machine")
    return run(engine, requests())


DRAFTS = {
    "the same": {},
    "similar": {"noise": 0.02},
    "another": {"seed": 5, "n_layer": 1},
    "shorter context": {"context_length": 50},
    "more ids": {"vocab_size": 300, "seed": 5},
}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("cache", [None, CONTEXT + 64])
def test_a_draft_model_changes_no_bit(
    expected: list[tuple[object, ...]], name: str, cache: int | None
) -> None:
    engine = Engine(model(), draft_model=model(**DRAFTS[name]), cache_tokens=cache)
    assert run(engine, requests()) == expected
    engine.step()
    assert engine.stats.pages_used == 0
    if name == "the same":
        assert engine.stats.accepted_drafts > 300


def test_a_draft_that_agrees_saves_steps() -> None:
    draft = model()
    for temperature in (0, 1):
        engine, steps = Engine(model(), draft_model=draft, draft_tokens=7), 0
        sampling = SamplingConfig(max_new_tokens=80, temperature=temperature)
        engine.add(Request([1, 2, 3], sampling))
        while engine.busy:
            engine.step()
            steps += 1
        assert steps < 80 / 5


def test_other_weights_count_after_refresh() -> None:
    """Also those of the draft model, as in distillation."""
    target, draft = model(), model()
    engine = Engine(target, draft_model=draft)
    before = run(engine, requests())
    for changed in (target, draft):
        torch.manual_seed(3)
        add_noise(changed, 0.05)
    engine.refresh()
    accepted = engine.stats.accepted_drafts
    after = run(engine, requests())
    assert after != before
    assert after == run(Engine(target), requests())
    assert engine.stats.accepted_drafts - accepted > 200  # the two still agree


def test_constrained_and_cancelled_requests() -> None:
    pytest.importorskip("llguidance")
    tokenizer = Tokenizer.byte()
    request = Request(
        [84], SamplingConfig(max_new_tokens=60), constraint=Constraint.regex("[a-e]*X")
    )
    alone = run(Engine(model(), tokenizer), [request])
    engine = Engine(model(), tokenizer, draft_model=model())
    other = engine.add(Request([1], SamplingConfig(max_new_tokens=90)))
    for _ in range(3):
        engine.step()
    engine.cancel(other)
    assert run(engine, [request]) == alone
    engine.step()
    assert engine.stats.pages_used == 0


def test_a_draft_model_with_fewer_ids_is_rejected() -> None:
    with pytest.raises(ValueError, match="has 99 ids and the model 257"):
        Engine(model(), draft_model=model(vocab_size=99))


def test_drafts_grow_with_success_and_pause_after_failures() -> None:
    length = DraftLength()
    offered = []
    for _ in range(4):  # all accepted
        offered.append(length.next(8))
        length.record(offered[-1], offered[-1])
    assert offered == [2, 5, 8, 8]
    offered = []
    for _ in range(200):
        offered.append(length.next(8))
        length.record(offered[-1], 0)
    assert sum(map(bool, offered)) < 20  # hardly any
    assert any(offered[100:])  # but it is tried again
