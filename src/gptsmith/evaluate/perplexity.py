"""How well a model predicts text: loss, perplexity, bits per byte, next-token accuracy.

N target tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.loss import chunk_rows
from gptsmith.train.runtime import Precision


@dataclass(frozen=True)
class Scores:
    """Means over the target tokens of a text."""

    loss: float  # nats per token
    perplexity: float  # exp(loss)
    bits_per_byte: float | None  # comparable between tokenizers; None without byte counts
    top1: float  # share of tokens that had the highest logit
    top5: float  # share among the five highest
    tokens: int

    def fields(self) -> dict[str, float | int | None]:
        """Metrics by name; the loss is val_loss."""
        values = asdict(self)
        return {"val_loss": values.pop("loss"), **values}


def evaluate(
    model: GPTModel,
    batches: Iterable[Batch],
    precision: Precision,
    token_bytes: Tensor | float | None = None,
) -> Scores:
    """Scores over the targets of all batches.

    token_bytes: UTF-8 bytes of each id (V,), or of a target on average; see `target_bytes`.

    The model's mode (train or eval) is restored. ValueError without targets.
    """
    device = model.head_weight.device
    training = model.training
    model.eval()
    total = torch.zeros(4, dtype=torch.float64)  # nats, top-1 hits, top-5 hits, bytes
    tokens = 0
    try:
        # Not inference_mode: a BlockMask that the model caches here is used in training too.
        with torch.no_grad(), precision.autocast():
            for batch in batches:
                on_device = batch.to(device)
                hidden = model.hidden(
                    on_device.inputs, positions=on_device.positions, documents=on_device.documents
                )
                targets = on_device.targets.flatten()
                is_target = targets != IGNORE_INDEX
                nats, hits1, hits5 = score(
                    hidden.flatten(0, 1)[is_target], model.head_weight, targets[is_target]
                )
                size = 0.0
                if isinstance(token_bytes, float):
                    size = token_bytes * int(is_target.sum())
                elif token_bytes is not None:
                    size = float(token_bytes[targets[is_target].cpu()].sum())
                total += torch.tensor([nats, hits1, hits5, size], dtype=torch.float64)
                tokens += int(is_target.sum())
    finally:
        model.train(training)
    if not tokens:
        raise ValueError("nothing to score: the validation text has fewer than two tokens")
    nats, top1, top5, size = total.tolist()
    loss = nats / tokens
    bits = nats / math.log(2) / size if size else None
    return Scores(loss, math.exp(min(loss, 700)), bits, top1 / tokens, top5 / tokens, tokens)


def target_bytes(
    tokenizer: Tokenizer,
    shards: Sequence[np.ndarray],
    text_bytes: int,
    context_only: Sequence[int] = (),
) -> Tensor | float | None:
    """For `evaluate`: how many bytes of text the targets of a stream of tokens stand for.

    Exact for each id (V,) where ids spell the text. Elsewhere (text is normalized, or spaces come
    between tokens) the bytes of the documents, `text_bytes`, over all targets. context_only: ids
    that are never targets. None without targets.
    """
    sizes = tokenizer.token_bytes()
    if sizes is not None and tokenizer.spells_text:
        return torch.from_numpy(sizes)
    targets = sum(len(s) - 1 - int(np.isin(s[1:], context_only).sum()) for s in shards if len(s))
    return text_bytes / targets if targets else None


def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """Summed nats, top-1 hits and top-5 hits of hidden (N, C) against targets (N,)."""
    nats = torch.zeros((), dtype=torch.float64)
    hits1, hits5 = 0, 0
    rows = chunk_rows(max(1, len(targets)), weight.shape[0], hidden.device)
    for h, y in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = (h @ weight.to(h.dtype).T).float()  # (rows, V)
        label = logits.gather(1, y.unsqueeze(1))  # (rows, 1)
        nats += (logits.logsumexp(dim=-1, keepdim=True) - label).cpu().double().sum()
        # Number of tokens that the model prefers; ties go to the lower id, as in argmax.
        earlier = torch.arange(logits.shape[1], device=y.device) < y.unsqueeze(1)
        rank = ((logits > label) | ((logits == label) & earlier)).sum(dim=-1)
        rank = rank.masked_fill(label.isnan().squeeze(1), logits.shape[1])  # NaN predicts nothing
        hits1 += int((rank == 0).sum())
        hits5 += int((rank < 5).sum())
    return float(nats), hits1, hits5
