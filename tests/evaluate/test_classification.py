import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from gptsmith.evaluate.charts import draw_confusion, draw_history
from gptsmith.evaluate.classification import (
    Scores,
    log_probabilities,
    markdown,
    prediction,
    score,
    table,
)
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import ModelConfig
from gptsmith.train.runtime import Precision

FP32 = Precision("fp32", "cpu", "")
# Rows are the true classes: a 5 + 1 + 0, b 2 + 2 + 1, c 0 + 0 + 4.
COUNTS = np.array([[5, 1, 0], [2, 2, 1], [0, 0, 4]])
HAND = Scores(("a", "b", "c"), COUNTS, 0.5)


def certain(truth: list[int], predicted: list[int], L: int) -> np.ndarray:
    """ln p with 0.9 on the predicted classes."""
    p = np.full((len(truth), L), 0.1 / (L - 1))
    p[np.arange(len(truth)), predicted] = 0.9
    return np.log(p)


def test_scores_computed_by_hand() -> None:
    assert HAND.accuracy == pytest.approx(11 / 15)
    assert HAND.support.tolist() == [6, 5, 4]
    assert HAND.majority == pytest.approx(6 / 15)
    assert HAND.precision.tolist() == pytest.approx([5 / 7, 2 / 3, 4 / 5])
    assert HAND.recall.tolist() == pytest.approx([5 / 6, 2 / 5, 1])
    f1 = [2 * 5 / (7 + 6), 2 * 2 / (3 + 5), 2 * 4 / (5 + 4)]
    assert HAND.f1.tolist() == pytest.approx(f1)
    assert HAND.macro_f1 == pytest.approx(sum(f1) / 3)


def test_counts_and_loss_of_probabilities() -> None:
    truth, guess = [0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 0, 2]
    found = score(("x", "y", "z"), certain(truth, guess, 3), truth)
    assert found.counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]
    assert found.loss == pytest.approx(-(4 * np.log(0.9) + 2 * np.log(0.05)) / 6)
    with pytest.raises(ValueError, match="no texts"):
        score(("x", "y"), np.empty((0, 2)), [])


def test_scores_equal_their_definitions_on_many_texts() -> None:
    rng = np.random.RandomState(0)
    L, N = 7, 500
    truth = rng.choice(L, size=N, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.04, 0.01])
    guess = np.where(rng.rand(N) < 0.7, truth, rng.randint(L, size=N))
    found = score([str(i) for i in range(L)], certain(truth.tolist(), guess.tolist(), L), truth)
    f1 = []
    for c in range(L):
        hits = int(((truth == c) & (guess == c)).sum())
        precision, recall = hits / int((guess == c).sum()), hits / int((truth == c).sum())
        f1.append(2 * precision * recall / (precision + recall))
        assert found.precision[c] == pytest.approx(precision)
        assert found.recall[c] == pytest.approx(recall)
    assert found.accuracy == pytest.approx((truth == guess).mean())
    assert found.f1.tolist() == pytest.approx(f1)
    assert found.macro_f1 == pytest.approx(np.mean(f1))


def test_classes_that_do_not_occur() -> None:
    """Never guessed and never true: left out of the mean. Never guessed: precision and F1 are 0."""
    found = score(("a", "b", "c"), certain([0, 0, 1], [0, 0, 0], 3), [0, 0, 1])
    assert found.precision.tolist() == pytest.approx([2 / 3, 0, 0])
    assert found.recall.tolist() == [1, 0, 0]
    assert found.macro_f1 == pytest.approx((0.8 + 0) / 2)
    assert markdown(found)[-1] == "| mean | 0.333 | 0.500 | 0.400 | 3 |"


def test_table_and_markdown() -> None:
    file = io.StringIO()
    Console(width=60, file=file).print(table(HAND))
    text = file.getvalue()
    for words in ("precision", "0.714", "0.833", "0.769", "mean", "15"):
        assert words in text
    lines = markdown(Scores(("a|b", "c", "d"), COUNTS, 0.5))
    assert lines[2] == "| a\\|b | 0.714 | 0.833 | 0.769 | 6 |"
    assert {line.count("|") - line.count("\\|") for line in lines} == {6}
    assert lines[-1] == "| mean | 0.727 | 0.744 | 0.719 | 15 |"


def test_scores_and_predictions_are_json() -> None:
    fields = json.loads(json.dumps(HAND.fields()))
    assert fields["confusion"] == {"labels": ["a", "b", "c"], "counts": COUNTS.tolist()}
    assert fields["classes"]["c"] == {"precision": 0.8, "recall": 1.0, "f1": 8 / 9, "support": 4}
    assert fields["texts"] == 15
    found = json.loads(json.dumps(prediction(("a", "b"), np.array([0.25, 0.75]))))
    assert found == {"predicted": "b", "probabilities": {"a": 0.25, "b": 0.75}}


@pytest.mark.parametrize("mask", ["causal()", "bidirectional()"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batched_probabilities_equal_those_of_each_text_alone(mask: str, batch_size: int) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        n_layer=2, n_head=2, n_embd=16, context_length=20, vocab_size=30, mask=mask,
        labels=("a", "b", "c"), dropout=0.5,
    )  # fmt: skip
    model = GPTClassifier(config).train()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.dim() > 1 else 1)
    rows = [np.random.RandomState(n).randint(30, size=n) for n in (3, 20, 1, 9, 7, 20, 2)]
    found = log_probabilities(model, rows, FP32, pad_id=5, batch_size=batch_size)
    assert model.training
    model.eval()
    for row, log_p in zip(rows, found, strict=True):
        with torch.no_grad():
            hidden = model.hidden(torch.from_numpy(row)[None])[0, -1]
            alone = model.score(hidden).log_softmax(-1)
        assert log_p.tolist() == pytest.approx(alone.tolist(), abs=1e-4)
    assert np.exp(found).sum(axis=1).tolist() == pytest.approx([1] * 7)
    assert np.abs(found - found[0]).max() > 0.1  # the texts differ


def test_charts_are_png_and_pdf_and_reproducible(tmp_path: Path) -> None:
    draw_confusion(tmp_path / "confusion", HAND, "three, test split")
    labels = tuple(f"a topic of number {i}" for i in range(60))
    draw_confusion(tmp_path / "many", Scores(labels, np.eye(60, dtype=int), 0.1), "many")
    event = {"event": "val", "val_loss": 0.7, "accuracy": 0.8}
    events = [
        {**event, "step": 0},
        {**event, "step": 50, "sample_loss": 0.5, "sample_accuracy": 0.9},
        {**event, "step": 60, "val_loss": None, "accuracy": None},  # NaN in metrics.jsonl
        {"event": "train", "step": 70},
    ]
    draw_history(tmp_path / "history", events, "three")
    draw_history(tmp_path / "empty", [], "nothing was measured")
    for name in ("confusion", "many", "history", "empty"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 400
            assert len(image.convert("L").getcolors(256) or []) > 8
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    first = (tmp_path / "confusion.pdf").read_bytes()
    draw_confusion(tmp_path / "confusion", HAND, "three, test split")
    assert (tmp_path / "confusion.pdf").read_bytes() == first
    assert not list(tmp_path.glob(".*"))
