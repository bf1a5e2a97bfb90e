import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.data.dataset import validation_batches
from gptsmith.evaluate.perplexity import Scores, evaluate
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import DocumentTokens
from gptsmith.train.loss import CHUNK_BYTES
from gptsmith.train.runtime import Precision

T, V = 16, 30
FP32 = Precision("fp32", "cpu", "")
SHARDS = [
    np.random.RandomState(s).randint(V, size=n).astype(np.uint16) for s, n in ((0, 150), (1, 77))
]


@pytest.fixture
def model() -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=T, vocab_size=V))
    with torch.no_grad():
        model.embedding.token.weight.mul_(20)
    return model.eval()


def batches(B: int = 4, eos_id: int | None = None) -> list[Batch]:
    return list(validation_batches(SHARDS, T, B, eos_id and DocumentTokens((eos_id,))))


def naive(model: GPTModel, eos_id: int | None = None) -> tuple[float, float, float, list[int]]:
    """Loss, top-1 and top-5, position by position."""
    losses, top1, top5, targets = [], [], [], []
    for batch in batches(1, eos_id):
        with torch.no_grad():
            logits = model(batch.inputs, documents=batch.documents)[0]
        for row, target in zip(logits, batch.targets[0].tolist(), strict=True):
            if target == IGNORE_INDEX:
                continue
            losses.append(float(F.cross_entropy(row, torch.tensor(target))))
            best = row.topk(5).indices.tolist()
            top1.append(best[0] == target)
            top5.append(target in best)
            targets.append(target)
    n = len(losses)
    return sum(losses) / n, sum(top1) / n, sum(top5) / n, targets


@pytest.mark.parametrize("eos_id", [None, 3])
def test_scores_equal_their_definitions(model: GPTModel, eos_id: int | None) -> None:
    sizes = torch.arange(V, dtype=torch.int32) % 4  # bytes of each id, 0 for some
    found = evaluate(model, batches(4, eos_id), FP32, sizes)
    loss, top1, top5, targets = naive(model, eos_id)
    assert found.tokens == len(targets) == 150 - 1 + 77 - 1
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert (found.top1, found.top5) == pytest.approx((top1, top5))
    assert 0 < top1 < top5 < 1
    text = sum(t % 4 for t in targets)
    assert found.bits_per_byte == pytest.approx(loss * len(targets) / math.log(2) / text, rel=1e-5)
    assert found.fields().keys() == {
        "val_loss", "perplexity", "bits_per_byte", "top1", "top5", "tokens"
    }  # fmt: skip
    assert found.fields()["val_loss"] == found.loss


def test_scores_are_independent_of_batch_size_and_chunks(
    model: GPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(model, batches(1), FP32)
    assert expected.bits_per_byte is None
    for B, chunk_bytes in ((3, 2**27), (100, 2**27), (5, 7 * V * 4)):
        monkeypatch.setitem(CHUNK_BYTES, "cpu", chunk_bytes)
        found = evaluate(model, batches(B), FP32)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert (found.top1, found.top5, found.tokens) == (
            expected.top1, expected.top5, expected.tokens,
        )  # fmt: skip


def test_huge_losses_stay_finite(model: GPTModel) -> None:
    with torch.no_grad():
        model.final_norm.weight.mul_(1e5)
    found = evaluate(model, batches(), FP32)
    assert found.loss > 1e4
    assert all(math.isfinite(x) for x in (found.loss, found.perplexity, found.top1, found.top5))


def test_equal_logits_have_the_scores_of_chance(model: GPTModel) -> None:
    """With equal logits the prediction is id 0, and the five highest are ids 0 to 4."""
    with torch.no_grad():
        model.final_norm.weight.zero_()
    found = evaluate(model, batches(), FP32)
    targets = np.concatenate([shard[1:] for shard in SHARDS])
    assert found.loss == pytest.approx(math.log(V), rel=1e-6)
    assert found.top1 == pytest.approx((targets == 0).mean())
    assert found.top5 == pytest.approx((targets < 5).mean())


def test_bfloat16_is_close_to_fp32(model: GPTModel) -> None:
    exact = evaluate(model, batches(), FP32)
    half = evaluate(model, batches(), Precision("bf16", "cpu", ""))
    assert half.loss == pytest.approx(exact.loss, rel=0.01)


@pytest.mark.parametrize("training", [True, False])
def test_model_keeps_its_mode(model: GPTModel, training: bool) -> None:
    model.train(training)
    model.embedding.dropout.p = 0.5
    first, second = evaluate(model, batches(), FP32), evaluate(model, batches(), FP32)
    assert isinstance(first, Scores)
    assert first == second  # without dropout
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())
    bad: Callable = lambda: (_ for _ in ()).throw(OSError("disk"))  # noqa: E731
    with pytest.raises(OSError, match="disk"):
        evaluate(model, bad(), FP32)
    assert model.training is training


def test_batches_without_targets_are_rejected(model: GPTModel) -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    for given in ([], [Batch(ids, torch.full_like(ids, IGNORE_INDEX))]):
        with pytest.raises(ValueError, match="fewer than two tokens"):
            evaluate(model, given, FP32)
