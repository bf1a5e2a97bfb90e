"""How far a model has moved from its reference, from the reference's most probable tokens alone."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from chats import OURS
from random_weights import add_noise

from gptsmith.batch import IGNORE_INDEX
from gptsmith.data.options import PreferenceFiles
from gptsmith.data.pair_rows import PairRows
from gptsmith.data.pairs import load_pairs
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes import reference
from gptsmith.recipes.reference import TopTokens
from gptsmith.train.runtime import Precision

FP32 = Precision("fp32", "cpu", "")
V = OURS.tokenizer.vocab_size


@pytest.fixture
def rows(tmp_path: Path) -> PairRows:
    pairs = [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": "no" * i} for i in range(1, 8)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return PairRows(load_pairs([path], PreferenceFiles(), OURS, 40)[0], 0, 0)


def models() -> tuple[GPTModel, GPTModel]:
    """A reference whose predictions are as peaked as those of a trained model, and a tuned one."""
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=32, context_length=40, vocab_size=V)
    before = GPTModel(ModelConfig(**sizes, tie_embeddings=False))
    assert before.head is not None
    torch.nn.init.normal_(before.head.weight, std=0.8)
    after = deepcopy(before)
    add_noise(after, 0.005)
    return before, after


def found(rows: PairRows, before: GPTModel, after: GPTModel) -> float:
    tensors = reference._computed(before, {"val": rows}, 3, FP32)
    offsets = TopTokens.empty(rows.pairs, 0).offsets
    top = TopTokens(tensors["val_top_ids"], tensors["val_top_log_p"], offsets)
    with torch.no_grad():
        return sum(
            float(top.divergence(after, rows.of(numbers), numbers)) for numbers in rows.groups(2)
        )


def exact(rows: PairRows, before: GPTModel, after: GPTModel) -> float:
    batch = rows.of(range(len(rows.pairs)))
    is_target = batch.targets != IGNORE_INDEX
    with torch.no_grad():
        q, p = (m(batch.inputs)[is_target].double().log_softmax(-1) for m in (before, after))
    return float((p.exp() * (p - q)).sum())


def test_with_all_tokens_it_is_the_divergence(
    rows: PairRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "TOP", V)
    before, after = models()
    expected = exact(rows, before, after)
    assert expected > 0.1
    assert found(rows, before, after) == pytest.approx(expected, rel=1e-3)


def test_with_a_few_tokens_it_is_a_close_lower_bound(rows: PairRows) -> None:
    before, after = models()
    expected = exact(rows, before, after)
    assert 0.8 * expected < found(rows, before, after) <= expected
    assert found(rows, before, before) == pytest.approx(0, abs=1e-6)
