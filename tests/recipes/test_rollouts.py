"""Rollouts: advantages, micro-batches, and their normalisation."""

import numpy as np
import pytest
import torch
from chats import OURS
from foreign_models import sentencepiece
from random_weights import add_noise
from torch import Tensor

from gptsmith.batch import IGNORE_INDEX, PolicyBatch
from gptsmith.data.prompts import Prompt, encode_prompts
from gptsmith.data.report import ReadReport
from gptsmith.evaluate.rewards import Sample
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes.policy import Completion, Policy
from gptsmith.recipes.reward import log_probs_by
from gptsmith.recipes.reward_options import RewardConfig
from gptsmith.recipes.rollouts import (
    Rollouts,
    RolloutSampler,
    Scored,
    group_advantages,
    prefix_advantages,
)
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.policy_loss import PolicyLoss
from gptsmith.train.runtime import Precision

pytestmark = pytest.mark.usefixtures("one_thread")

G, NEW = 4, 10
FP32 = Precision("fp32", "cpu", "")


def test_advantages_are_relative_to_the_group():
    rewards = np.array([1.0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 3, 1, 2, 2])
    centred = group_advantages(rewards, 4, scale=False)
    assert centred.tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0, 1, -1, 0, 0]
    scaled = group_advantages(rewards, 4, scale=True)
    assert scaled[:4] == pytest.approx(centred[:4] / (0.5 + 1e-4))
    assert not scaled[4:8].any()


def test_equal_rewards_have_no_advantage_whatever_is_rounded():
    assert not group_advantages(np.full(7, 0.1), 7, scale=True).any()


def test_tokens_get_the_advantage_that_they_made():
    a, b, c, d = [7, 8, 9], [7, 8, 5], [7, 8, 9], [6]
    good, bad = 0.5, -1.0
    found = prefix_advantages(np.array([good, bad, good, bad]), [a, b, c, d], 4)
    assert found[0] == pytest.approx([0.25, 0, 0.5])  # values -0.25, 0, 0, 0.5
    assert found[1] == pytest.approx([0.25, 0, -1.0])
    assert found[2].tolist() == found[0].tolist()
    assert found[3] == pytest.approx([-0.75])


def test_credited_advantages_add_up_and_stay_in_their_group():
    random = np.random.default_rng(0)
    ids = [[*random.integers(3, size=row % 6).tolist(), 9 + row] for row in range(24)]
    advantages = group_advantages(random.normal(size=24), 8, scale=True)
    found = prefix_advantages(advantages, ids, 8)
    assert [len(each) for each in found] == [len(each) for each in ids]
    assert [each.sum() for each in found] == pytest.approx(advantages)
    alone = prefix_advantages(advantages[8:16], ids[8:16], 8)
    assert all(map(np.array_equal, alone, found[8:16]))


@pytest.fixture(scope="module")
def model() -> GPTModel:
    torch.manual_seed(0)
    size = dict(n_layer=1, n_head=2, n_embd=32, context_length=64)
    model = GPTModel(ModelConfig(**size, vocab_size=OURS.tokenizer.vocab_size))
    add_noise(model, 0.1)
    return model


def vowels(samples: list[Sample]) -> list[float]:
    """Varies for all prompts but one."""
    return [
        0.0 if "dull" in s.prompt.question else float(any(c in "aeiouAEIOU" for c in s.text))
        for s in samples
    ]


def rollouts(model: GPTModel, **options: object) -> Rollouts:
    fields = {"from": "base", "out": "out", "data": ["x"], **options}
    sizes = dict(prompts_per_step=5, group_size=G, max_new_tokens=NEW, train={"batch_size": 4})
    config = RewardConfig(**{**sizes, **fields})
    questions = ["dull", "a", "bb", "ccc ccc ccc", "dd", "e"]
    prompts = [Prompt([{"role": "user", "content": q}], None, {}, q) for q in questions]
    encoded = encode_prompts(
        prompts, lambda messages, tools: OURS.prompt(messages), 40, ReadReport()
    )
    found = Rollouts(config, encoded, 50, pad_id=0)
    stop = [OURS.tokenizer.special_tokens["<|end|>"], *range(128, 200)]
    sampler = RolloutSampler(Policy(model, OURS.tokenizer, stop, 50), {"vowels": vowels}, [1.0])
    found.attach(sampler, log_probs_by(FP32, 1.0))
    return found


def test_a_rollout_depends_on_the_step_alone(model):
    a, b = rollouts(model), rollouts(model)
    first = a.micro_batches(0)
    assert a.micro_batches(0) is first
    a.micro_batches(1)
    again = a.micro_batches(0)
    for one, two, three in zip(first, again, b.micro_batches(0), strict=True):
        assert torch.equal(one.inputs, two.inputs)
        assert torch.equal(one.inputs, three.inputs)
        assert torch.equal(one.advantages, three.advantages)


def plain_loss(model: GPTModel, found: Rollouts, normalize: str, masked: bool) -> Tensor:
    """Of all completions, one at a time, with the formula of the papers."""
    assert found.rollout is not None
    rewards = found.sampler.total(found.rollout.rewards)
    advantages = group_advantages(rewards, G, scale=True)
    total, tokens = torch.zeros(()), 0
    rows = [c.ids if c.finished or not masked else [] for c in found.rollout.completions]
    for row, new in enumerate(rows):
        if not new:
            continue
        ids = torch.tensor([[*found.rollout.prompts[row // G].ids, *new]])
        log_p = model(ids[:, :-1]).log_softmax(-1)[0, -len(new) :]
        log_p = log_p[torch.arange(len(new)), torch.tensor(new)]
        loss = -(advantages[row] * (log_p - log_p.detach()).exp()).sum()
        tokens += len(new)
        total = total + (loss / len(new) if normalize == "sequence" else loss)
    return total / {"token": tokens, "sequence": len(rows), "constant": len(rows) * NEW}[normalize]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", ["token", "sequence", "constant"])
def test_the_step_has_the_gradient_of_all_completions(model, normalize, masked):
    found = rollouts(model, normalize=normalize, mask_truncated=masked)
    batches = found.micro_batches(0)
    assert all(batch.same_as is not None for batch in batches)  # prompts are computed once
    rows = sum(int(batch.copies.sum()) for batch in batches)
    assert 0 < rows < 5 * G  # those of "dull" at least have no signal and are left out

    def gradient(loss: Tensor) -> list[Tensor]:
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    count = sum(batch.count for batch in batches)
    ours = gradient(sum(PolicyLoss()(model, batch)[0] for batch in batches) / count)
    theirs = gradient(plain_loss(model, found, normalize, masked))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert any(g.any() for g in ours)


@pytest.mark.parametrize(
    ("credit", "copies"), [("completion", [1, 1, 2, 2, 2]), ("prefix", [1, 2, 2, 3])]
)
def test_equal_completions_are_one_row_that_counts_as_often_as_they_were_sampled(
    model, credit, copies
):
    """Loss, gradient, count and metrics are those of each completion in a row of its own."""
    found = rollouts(model, credit=credit, kl=0.1)
    found.attach(found.sampler, log_probs_by(FP32, 1.0), lambda: model)
    found.micro_batches(0)
    a, b, c = [65, 66, 67], [66, 65], [65, 66, 68]
    completions = [Completion(ids, "", True) for ids in (a, b, a, a, c, c, b, b)]
    rewards = np.array([1.0, 0, 1, 0, 1, 1, 0, 0])[:, None]  # an a that was rewarded, and one not
    scored = Scored(found.rollout.prompts[:2], completions, rewards)
    found._use(scored)
    merged = found._batches
    assert sorted(n for batch in merged for n in batch.copies.tolist()) == copies
    ones = np.ones(len(completions), np.int64)
    found._distinct = lambda rows: (rows, ones)  # each in a row of its own
    found._use(scored)
    assert [len(batch.inputs) for batch in found._batches] == [4, 4]

    def summed(batches: list) -> tuple[list[Tensor], int, Tensor]:
        model.zero_grad()
        pairs = [PolicyLoss(kl=0.1)(model, batch) for batch in batches]
        sum(loss for loss, _ in pairs).backward()
        metrics = [sum(m[name] for _, m in pairs) for name in ("entropy", "clipped", "kl")]
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [sum(loss for loss, _ in pairs).detach(), *metrics, *grads], sum(
            b.count for b in batches
        )

    (ours, count), (theirs, expected) = summed(merged), summed(found._batches)
    assert count == expected == sum(len(completion.ids) for completion in completions)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_a_rollout_without_signal_is_a_step_without_gradient(model):
    found = rollouts(model)
    found.sampler.rewards = {"same": lambda samples: [1.0] * len(samples)}
    [batch] = found.micro_batches(0)
    assert batch.count == 0
    loss, _ = PolicyLoss()(model, batch)
    assert loss.item() == 0
    measured = found.metrics()
    assert measured["no_signal"] == 1
    assert measured["reward"] == 1
    assert measured["reward_std"] == 0


def test_a_kl_penalty_uses_all_completions(model):
    found = rollouts(model, kl=0.1)
    found.attach(found.sampler, log_probs_by(FP32, 1.0), lambda: model)
    batches = found.micro_batches(0)
    assert sum(int(batch.copies.sum()) for batch in batches) == 5 * G
    _, metrics = PolicyLoss(kl=0.1)(model, batches[0])
    assert metrics["kl"].item() == pytest.approx(0, abs=1e-6)  # the model is its own reference


def test_several_updates_share_a_rollout_that_a_checkpoint_keeps(model):
    found = rollouts(model, updates=3)
    batches = found.micro_batches(3)
    assert found.micro_batches(4) is found.micro_batches(5) is batches
    assert found.state(3) == {}  # sampled anew by the weights of step 3
    state = {name: tensor.clone() for name, tensor in found.state(4).items()}
    other = rollouts(model, updates=3)
    other.load_state(4, state)
    with torch.no_grad():  # the weights have changed since
        model.final_norm.weight += 0.5
    try:
        loaded = other.micro_batches(4)
    finally:
        with torch.no_grad():
            model.final_norm.weight -= 0.5
    for a, b in zip(batches, loaded, strict=True):
        assert isinstance(a, PolicyBatch)
        assert isinstance(b, PolicyBatch)
        for name in ("inputs", "targets", "advantages", "weights", "copies", "old"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert found.rollout.completions == other.rollout.completions
    is_target = batches[0].targets != IGNORE_INDEX
    assert (batches[0].old[is_target] < 0).all()
    assert not batches[0].old[~is_target].any()


def test_completions_of_a_checkpoint_continue_their_prompts(model, tmp_path):
    """Here a decoder drops the first space of a text."""
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    found = rollouts(model, updates=2)
    found.sampler.policy.tokenizer = tokenizer
    completions = []
    for prompt in found._prompts(0):
        stream, new = tokenizer.stream(prompt.ids), tokenizer.encode("the summer's day")
        text = "".join(map(stream.push, new)) + stream.flush()
        assert text == " the summer's day" != tokenizer.decode(new)
        completions += [Completion(new, text, False)] * G
    found.rollout = Scored(found._prompts(0), completions, np.zeros((len(completions), 1)))
    state = found.state(1)
    found.load_state(1, state)
    assert found._saved[1].completions == completions


def test_several_rewards_are_weighted_and_measured(model):
    found = rollouts(model)
    found.sampler.rewards = {
        "regex:[a-z]": lambda samples: [1.0 for _ in samples],
        "length:4": lambda samples: [float(s.tokens) for s in samples],
    }
    found.sampler.weights = np.array([1.0, -0.5])
    found.micro_batches(0)
    measured = found.metrics()
    assert measured["reward_regex_a_z"] == 1
    assert measured["reward_length_4"] == measured["length"]
    assert measured["reward"] == pytest.approx(1 - 0.5 * measured["length"])
