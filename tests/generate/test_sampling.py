import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from gptsmith.generate import sampling
from gptsmith.generate.forward import KernelForward
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.sampling import token_logprob, uniform
from gptsmith.kernels.packed_model import PackedModel, library_for
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel

Sampler = Callable[[Tensor, Sequence[SamplingConfig], Sequence[float]], list[int]]


@pytest.fixture(scope="module", params=["torch", "kernels"])
def sample(request: pytest.FixtureRequest) -> Sampler:
    if request.param == "torch":
        return sampling.sample
    model = GPTModel(ModelConfig.preset("nano", vocab_size=8))
    if library_for(model) is None:
        pytest.skip("no compiled kernels on this machine")
    forward = KernelForward(PackedModel(model))
    return lambda x, settings, points: forward.sample(x, range(len(x)), settings, points)


def draw(sample: Sampler, logits: Tensor, n: int = 4000, **fields: object) -> Tensor:
    """Relative frequencies (V,) of the tokens from logits (V,) and n evenly spaced numbers."""
    config = SamplingConfig(**fields)
    x = logits.double().expand(n, -1)
    ids = sample(x, [config] * n, [(i + 0.5) / n for i in range(n)])
    return torch.bincount(torch.tensor(ids), minlength=len(logits)) / n


def fits(frequencies: Tensor, probabilities: Tensor, n: int = 4000) -> bool:
    """Chi-squared within five standard deviations; nothing where the probability is 0."""
    able = probabilities > 0
    if frequencies[~able].any():
        return False
    p = probabilities[able].double()
    statistic = (n * (frequencies[able] - p) ** 2 / p).sum().item()
    freedom = max(1, len(p) - 1)
    return statistic < freedom + 5 * math.sqrt(2 * freedom)


LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, 3.0, -4.0, 1.0, 0.0])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_frequencies_follow_the_softmax_at_the_temperature(
    sample: Sampler, temperature: float
) -> None:
    frequencies = draw(sample, LOGITS, 20_000, temperature=temperature)
    assert fits(frequencies, (LOGITS / temperature).softmax(0), 20_000)
    other = (LOGITS / temperature / 1.2).softmax(0)
    assert not fits(frequencies, other, 20_000)  # the test can fail


def test_random_numbers_of_neighbouring_seeds_and_positions_are_independent() -> None:
    n = 20_000
    flat = torch.full((10,), 0.1)
    seeds = torch.tensor([uniform(seed, 5) for seed in range(n)], dtype=torch.double)
    positions = torch.tensor([uniform(5, position) for position in range(n)], dtype=torch.double)
    diagonal = torch.tensor([uniform(i, i + 1) for i in range(n)], dtype=torch.double)
    for numbers in (seeds, positions, diagonal):
        assert ((numbers >= 0) & (numbers < 1)).all()
        assert fits(torch.bincount((numbers * 10).long(), minlength=10) / n, flat)
        assert abs(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]) < 5 / n**0.5
    assert len({*seeds.tolist(), *positions.tolist(), *diagonal.tolist()}) > 3 * n - 10
    assert uniform(2**63 - 1, 0) == uniform(2**63 - 1, 0)


def test_top_k_top_p_and_min_p_keep_the_right_tokens(sample: Sampler) -> None:
    p = LOGITS.softmax(0)  # 4: .572, 0: .210, 6: .077, 2 and 3: .047, 7: .028, 1: .010, 5: .0005

    def only(*kept: int) -> Tensor:
        kept_p = torch.zeros_like(p)
        kept_p[list(kept)] = p[list(kept)]
        return kept_p / kept_p.sum()

    assert fits(draw(sample, LOGITS, temperature=1.0, top_k=3), only(4, 0, 6))
    assert fits(draw(sample, LOGITS, temperature=1.0, top_k=100), p)
    assert fits(draw(sample, LOGITS, temperature=1.0, top_p=0.57), only(4))
    assert fits(draw(sample, LOGITS, temperature=1.0, top_p=0.6), only(4, 0))
    assert fits(draw(sample, LOGITS, temperature=1.0, top_p=0.8), only(4, 0, 6))
    assert fits(draw(sample, LOGITS, temperature=1.0, top_p=1.0), p)
    assert fits(draw(sample, LOGITS, temperature=1.0, min_p=0.1), only(4, 0, 6))
    assert fits(draw(sample, LOGITS, temperature=1.0, min_p=0.0), p)
    assert fits(draw(sample, LOGITS, temperature=1.0, min_p=1.0), only(4))
    # top_p after top_k: the three have 0.667, 0.245 and 0.089 of what is left
    assert fits(draw(sample, LOGITS, temperature=1.0, top_k=3, top_p=0.6), only(4))
    assert fits(draw(sample, LOGITS, temperature=1.0, top_k=3, top_p=0.92), only(4, 0, 6))


def test_ties_are_broken_by_the_smaller_id_and_never_keep_more_than_k(sample: Sampler) -> None:
    flat = torch.zeros(50)
    for k in (1, 2, 7, 50):
        kept = draw(sample, flat, temperature=1.0, top_k=k) > 0
        assert kept[:k].all()
        assert not kept[k:].any()
    assert fits(draw(sample, torch.tensor([0.0, 1.0, 1.0, 1.0]), temperature=1.0, top_k=2),
                torch.tensor([0, 0.5, 0.5, 0]))  # fmt: skip
    kept = draw(sample, flat, temperature=1.0, top_p=0.19) > 0
    assert kept[:10].all()
    assert not kept[10:].any()


def test_nucleus_larger_than_the_candidates_is_found_by_sorting(sample: Sampler) -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 0.1
    p, order = logits.double().softmax(0).sort(descending=True)
    size = int((p.cumsum(0) < 0.9).sum()) + 1
    assert size > 4000
    frequencies = draw(sample, logits, n=6000, temperature=1.0, top_p=0.9)
    assert not frequencies[order[size:]].any()
    assert (frequencies > 0).sum() > 0.9 * size


logit_rows = st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=12).map(torch.tensor)
configs = st.builds(
    SamplingConfig,
    temperature=st.floats(0, 5),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.none() | st.floats(1e-9, 1),
    min_p=st.none() | st.floats(0, 1),
)


@given(
    logit_rows,
    configs,
    st.lists(configs, min_size=2, max_size=2),
    st.floats(0, 1, exclude_max=True),
)
def test_sample_is_independent_of_neighbouring_rows_and_their_settings(
    sample: Sampler,
    logits: Tensor,
    config: SamplingConfig,
    others: list[SamplingConfig],
    point: float,
) -> None:
    logits = logits.double()
    rows = torch.stack([logits.flip(0), logits, -logits])
    alone = sample(logits[None], [config], [point])
    for neighbours in ([config, config], others):
        settings = [neighbours[0], config, neighbours[1]]
        assert sample(rows, settings, [0.5, point, 0.2])[1] == alone[0]
    assert 0 <= alone[0] < len(logits)
    narrow = config.model_copy(update={"top_k": 1, "temperature": 1.0})
    assert sample(logits[None], [narrow], [point]) == [int(logits.argmax())]


def test_greedy_takes_the_argmax_and_tiny_temperatures_do_not_overflow(sample: Sampler) -> None:
    rows = torch.stack([LOGITS, -LOGITS, LOGITS * 1e4]).double()
    for temperature in (0.0, 1e-310, 1e-40, 1e-6):
        ids = sample(rows, [SamplingConfig(temperature=temperature)] * 3, [0.1, 0.5, 0.9])
        assert ids == [4, 5, 4]


def test_extreme_random_numbers_never_select_an_excluded_token(sample: Sampler) -> None:
    for config in (SamplingConfig(top_k=1), SamplingConfig(top_p=0.5), SamplingConfig(min_p=0.9)):
        for point in (0.0, 1 - 2.0**-53):
            assert sample(LOGITS[None].double(), [config], [point]) == [4]


# --- penalties and log-probabilities -------------------------------------------------------------


def penalized(
    logits: Tensor, counts: dict[int, int], bias: dict[int, float] | None = None, **fields: float
) -> Tensor:
    x = logits.double().clone()
    sampling.penalize(x, SamplingConfig(**fields), counts, bias or {})  # type: ignore[arg-type]
    return x


@given(
    logit_rows,
    st.lists(st.integers(0, 11), max_size=8),
    st.lists(st.integers(0, 11), max_size=8),
    st.floats(0.5, 2),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.dictionaries(st.integers(0, 11), st.floats(-100, 100), max_size=3),
)
def test_penalties_are_those_of_the_definition(
    logits: Tensor,
    prompt: list[int],
    text: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
) -> None:
    V = len(logits)
    prompt, text = [t % V for t in prompt], [t % V for t in text]
    bias = {t: b for t, b in bias.items() if t < V}
    counts = dict.fromkeys(prompt, 0)
    for token in text:
        counts[token] = counts.get(token, 0) + 1
    expected = []
    for token in range(V):  # vLLM: docs of SamplingParams, vllm/model_executor/layers/utils.py
        x = float(logits[token]) + bias.get(token, 0.0)
        if token in prompt or token in text:
            x = x / repetition if x > 0 else x * repetition
        x -= frequency * text.count(token) + presence * (token in text)
        expected.append(x)
    found = penalized(
        logits, counts, bias, repetition_penalty=repetition,
        presence_penalty=presence, frequency_penalty=frequency,
    )  # fmt: skip
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double))


def test_filters_and_repetition_penalty_are_those_of_transformers(sample: Sampler) -> None:
    import transformers.generation.logits_process as judge

    generator = torch.Generator().manual_seed(0)
    for trial in range(40):
        logits = torch.randn(1, 50, generator=generator) * 3
        text = torch.randint(50, (1, 12), generator=generator)
        k, p, low = 1 + trial % 20, 0.3 + 0.017 * trial, 0.005 * trial
        temperature, penalty = 0.5 + 0.05 * trial, 0.6 + 0.03 * trial
        kept = logits.double()
        for warper in (
            judge.RepetitionPenaltyLogitsProcessor(penalty),
            judge.TemperatureLogitsWarper(temperature),
            judge.TopKLogitsWarper(k),
            judge.TopPLogitsWarper(p),
            judge.MinPLogitsWarper(low),
        ):
            kept = warper(text, kept)
        expected = kept.softmax(-1)[0]
        config = SamplingConfig(
            temperature=temperature, top_k=k, top_p=p, min_p=low, repetition_penalty=penalty
        )
        x = penalized(logits[0], dict.fromkeys(text[0].tolist(), 0), repetition_penalty=penalty)
        # walking through the cumulative distribution finds every token that is left, in order
        cumulative = expected.cumsum(0)
        points = [float(c) - float(e) / 2 for c, e in zip(cumulative, expected, strict=True) if e]
        found = sample(x.expand(len(points), -1), [config] * len(points), points)
        assert found == expected.nonzero().squeeze(1).tolist()


def test_logprobs_are_those_of_the_softmax_and_alike_in_any_batch() -> None:
    logits = torch.randn(7, 50_257, generator=torch.Generator().manual_seed(0))
    for row in logits:
        found = token_logprob(row, 17, 5)
        expected = row.double().log_softmax(0)
        assert found.logprob == pytest.approx(float(expected[17]), abs=1e-6)
        assert [token for token, _ in found.top] == expected.topk(5).indices.tolist()
        assert found == token_logprob(row.clone(), 17, 5)
    every = token_logprob(torch.randn(40), 3, 100)
    assert sum(math.exp(value) for _, value in every.top) == pytest.approx(1)
    assert dict(every.top)[3] == every.logprob
    tied = token_logprob(torch.tensor([0.0, 2, 1, 2, 2]), 0, 2)
    assert [token for token, _ in tied.top] == [1, 3]
    assert token_logprob(LOGITS, 0, 0).top == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_without_a_finite_maximum_are_rejected(sample: Sampler, bad: float) -> None:
    for config in (SamplingConfig(), SamplingConfig(temperature=0)):
        with pytest.raises(
            ValueError, match=r"logits reach (nan|inf|-inf): its weights are damaged"
        ):
            sample(torch.stack([LOGITS, torch.full((8,), bad)]).double(), [config] * 2, [0.5] * 2)
    padded = torch.where(torch.arange(8) < 4, LOGITS, -math.inf)  # excluded tokens are fine
    assert sample(padded[None].double(), [SamplingConfig(top_p=0.9)], [0.5])[0] < 4


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -0.1, "greater than or equal to 0"),
        ("temperature", math.nan, "finite"),
        ("temperature", math.inf, "finite"),
        ("top_k", 0, "greater than or equal to 1"),
        ("top_k", 2.5, "integer"),
        ("top_p", 0, "greater than 0"),
        ("top_p", 1.01, "less than or equal to 1"),
        ("top_p", math.nan, "finite"),
        ("min_p", -0.5, "greater than or equal to 0"),
        ("min_p", 2, "less than or equal to 1"),
        ("repetition_penalty", 0, "greater than 0"),
        ("max_new_tokens", -1, "greater than or equal to 0"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**63, "less than"),
        ("temprature", 1, "Extra inputs"),
    ],
)
def test_invalid_settings_are_rejected(field: str, value: float, words: str) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        SamplingConfig(**{field: value})  # type: ignore[arg-type]
    assert field in str(caught.value)
    assert isinstance(caught.value, ValueError)
