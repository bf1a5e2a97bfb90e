import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.sampling import sample


def generators(n: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def draw(logits: Tensor, n: int = 20_000, **fields: object) -> Tensor:
    """Relative frequencies (V,) of n draws, in rows and in steps, from the same logits (V,)."""
    config, rows = SamplingConfig(**fields), generators(100)
    batch = logits.expand(100, -1)
    ids = torch.cat([sample(batch, [config] * 100, rows) for _ in range(n // 100)])
    return torch.bincount(ids, minlength=len(logits)) / n


def fits(frequencies: Tensor, probabilities: Tensor, n: int = 20_000) -> bool:
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
def test_frequencies_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    frequencies = draw(LOGITS, temperature=temperature)
    assert fits(frequencies, (LOGITS / temperature).softmax(0))
    assert not fits(frequencies, (LOGITS / temperature / 1.2).softmax(0))  # the test can fail


def test_first_tokens_of_consecutive_seeds_are_uniform() -> None:
    logits = torch.zeros(20_000, 10)
    ids = sample(logits, [SamplingConfig(temperature=1.0)] * 20_000, generators(20_000))
    assert fits(torch.bincount(ids, minlength=10) / 20_000, torch.full((10,), 0.1))


def test_top_k_top_p_and_min_p_keep_the_right_tokens() -> None:
    p = LOGITS.softmax(0)  # 4: .572, 0: .210, 6: .077, 2 and 3: .047, 7: .028, 1: .010, 5: .0005

    def only(*kept: int) -> Tensor:
        kept_p = torch.zeros_like(p)
        kept_p[list(kept)] = p[list(kept)]
        return kept_p / kept_p.sum()

    assert fits(draw(LOGITS, temperature=1.0, top_k=3), only(4, 0, 6))
    assert fits(draw(LOGITS, temperature=1.0, top_k=100), p)
    assert fits(draw(LOGITS, temperature=1.0, top_p=0.57), only(4))
    assert fits(draw(LOGITS, temperature=1.0, top_p=0.6), only(4, 0))
    assert fits(draw(LOGITS, temperature=1.0, top_p=0.8), only(4, 0, 6))
    assert fits(draw(LOGITS, temperature=1.0, top_p=1.0), p)
    assert fits(draw(LOGITS, temperature=1.0, min_p=0.1), only(4, 0, 6))
    assert fits(draw(LOGITS, temperature=1.0, min_p=0.0), p)
    assert fits(draw(LOGITS, temperature=1.0, min_p=1.0), only(4))
    # top_p after top_k: the three have 0.667, 0.245 and 0.089 of what is left
    assert fits(draw(LOGITS, temperature=1.0, top_k=3, top_p=0.6), only(4))
    assert fits(draw(LOGITS, temperature=1.0, top_k=3, top_p=0.92), only(4, 0, 6))


def test_ties_are_broken_by_the_smaller_id_and_never_keep_more_than_k() -> None:
    flat = torch.zeros(50)
    for k in (1, 2, 7, 50):
        kept = draw(flat, n=10_000, temperature=1.0, top_k=k) > 0
        assert kept[:k].all()
        assert not kept[k:].any()
    assert fits(draw(torch.tensor([0.0, 1.0, 1.0, 1.0]), temperature=1.0, top_k=2),
                torch.tensor([0, 0.5, 0.5, 0]))  # fmt: skip
    kept = draw(flat, n=10_000, temperature=1.0, top_p=0.19) > 0
    assert kept[:10].all()
    assert not kept[10:].any()


def test_nucleus_larger_than_the_candidates_is_found_by_sorting() -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 0.1
    p, order = logits.double().softmax(0).sort(descending=True)
    size = int((p.cumsum(0) < 0.9).sum()) + 1
    assert size > 4000
    frequencies = draw(logits, n=20_000, temperature=1.0, top_p=0.9)
    assert not frequencies[order[size:]].any()
    assert (frequencies > 0).sum() > 0.9 * size


logit_rows = st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=12).map(torch.tensor)
configs = st.builds(
    SamplingConfig,
    temperature=st.floats(0, 5),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.none() | st.floats(1e-9, 1),
    min_p=st.none() | st.floats(0, 1),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
)


@given(logit_rows, configs, st.lists(configs, min_size=2, max_size=2), st.integers(0, 1000))
def test_sample_is_independent_of_neighbouring_rows_and_their_settings(
    logits: Tensor, config: SamplingConfig, others: list[SamplingConfig], seed: int
) -> None:
    rows = torch.stack([logits.flip(0), logits, -logits])
    seen = torch.zeros(3, len(logits), dtype=torch.bool)
    seen[1, 0] = True
    alone = sample(logits[None], [config], generators(1, seed + 1), seen[1:2])
    for neighbours in ([config, config], others):
        settings = [neighbours[0], config, neighbours[1]]
        assert sample(rows, settings, generators(3, seed), seen)[1] == alone[0]
    assert 0 <= alone[0] < len(logits)
    narrow = config.model_copy(update={"top_k": 1, "repetition_penalty": 1.0, "temperature": 1.0})
    assert sample(logits[None], [narrow], generators(1, seed)) == logits.argmax()


def test_greedy_takes_the_argmax_and_tiny_temperatures_do_not_overflow() -> None:
    rows = torch.stack([LOGITS, -LOGITS, LOGITS * 1e4])
    for temperature in (0.0, 1e-310, 1e-40, 1e-6):
        ids = sample(rows, [SamplingConfig(temperature=temperature)] * 3, generators(3))
        assert ids.tolist() == [4, 5, 4]


def test_a_random_number_of_zero_never_selects_an_excluded_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.zeros(n, dtype=torch.double))
    for config in (SamplingConfig(top_k=1), SamplingConfig(top_p=0.5), SamplingConfig(min_p=0.9)):
        assert sample(LOGITS[None], [config], generators(1)) == 4


def test_repetition_penalty_lowers_seen_tokens_for_either_sign_of_the_logit() -> None:
    seen = torch.tensor([[True, True, False]])
    config = SamplingConfig(temperature=0, repetition_penalty=2.0)
    assert sample(torch.tensor([[3.0, -1.0, 1.6]]), [config], [], seen) == 2
    assert sample(torch.tensor([[-2.0, -1.0, -1.9]]), [config], [], seen) == 2
    assert sample(torch.tensor([[-2.0, -1.0, -2.1]]), [config], [], seen) == 1
    p = torch.tensor([1.5, -2.0, 1.0]).softmax(0)
    config = SamplingConfig(temperature=1, repetition_penalty=2.0)
    rows = torch.tensor([[3.0, -1.0, 1.0]]).expand(20_000, 3)
    ids = sample(rows, [config] * 20_000, generators(20_000), seen.expand(20_000, 3))
    assert fits(torch.bincount(ids, minlength=3) / 20_000, p)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_without_a_finite_maximum_are_refused(bad: float) -> None:
    for config in (SamplingConfig(), SamplingConfig(temperature=0)):
        with pytest.raises(
            ValueError, match=r"logits reach (nan|inf|-inf): its weights are damaged"
        ):
            sample(torch.stack([LOGITS, torch.full((8,), bad)]), [config] * 2, generators(2))
    padded = torch.where(torch.arange(8) < 4, LOGITS, -math.inf)  # excluded tokens are fine
    assert sample(padded[None], [SamplingConfig(top_p=0.9)], generators(1)) < 4


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
        ("max_new_tokens", 0, "greater than or equal to 1"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**63, "less than"),
        ("temprature", 1, "Extra inputs"),
    ],
)
def test_invalid_settings_are_refused(field: str, value: float, words: str) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        SamplingConfig(**{field: value})  # type: ignore[arg-type]
    assert field in str(caught.value)
    assert isinstance(caught.value, ValueError)
