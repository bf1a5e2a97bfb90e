"""Language modelling metrics: loss, perplexity, bits per byte, next-token accuracy.

N target tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.evaluate.result import Item, Statistic, column, exp
from gptsmith.kernels.packed_model import PackedModel
from gptsmith.model.gpt import GPTModel
from gptsmith.run.options import Quantized
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import distributed
from gptsmith.train.loss import chunk_rows
from gptsmith.train.runtime import Precision, evaluating

_COLUMNS = ("nats", "top1", "top5", "bytes", "tokens")


@dataclass(frozen=True)
class Scores:
    """Means over the target tokens of a text."""

    loss: float  # nats per token
    perplexity: float  # exp(loss)
    bits_per_byte: float | None  # comparable between tokenizers; None without byte counts
    top1: float  # share of tokens that had the highest logit
    top5: float  # share among the five highest
    tokens: int
    windows: Sequence[Item] = ()
    """For each row of the batches, the sums from which STATISTICS computes the metrics."""

    def fields(self) -> dict[str, float | int | None]:
        """Metrics by name; the loss is val_loss."""
        values = asdict(self)
        values.pop("windows")
        return {"val_loss": values.pop("loss"), **values}


def _ratio(above: str, below: str, of: Callable[[Any], Any] = lambda x: x) -> Statistic:
    def value(means: np.ndarray) -> Any:
        return of(means[..., 0] / means[..., 1])

    return Statistic(column(above, below), value)


STATISTICS = {
    "val_loss": _ratio("nats", "tokens"),
    "perplexity": _ratio("nats", "tokens", exp),
    "bits_per_byte": _ratio("nats", "bytes", lambda nats: nats / math.log(2)),
    "top1": _ratio("top1", "tokens"),
    "top5": _ratio("top5", "tokens"),
}


def evaluate(
    model: GPTModel,
    batches: Iterable[Batch],
    precision: Precision,
    token_bytes: Tensor | float | None = None,
    quantize: Quantized | None = None,
) -> Scores:
    """Scores over the targets of all batches.

    token_bytes: UTF-8 bytes of each id (V,), or of a target on average; see `target_bytes`.
    Several ranks take turns with the batches; all get the scores that one process would get, and
    the windows of their own batches.
    quantize: measure the model with rounded weights, by the kernels that generation uses, whatever
    the precision.

    The model's mode (train or eval) is restored. ValueError without targets, and for quantized
    weights where there are no kernels.
    """
    device, V = model.head_weight.device, len(model.head_weight)
    packed = None if quantize is None else PackedModel(model, quantize)

    def logits(hidden: Tensor) -> Tensor:  # (N, V) of (N, C)
        if packed is not None:
            return packed.logits(hidden)
        return hidden @ model.head_weight.to(hidden.dtype).T

    # Of each batch, the _COLUMNS. No tensors: these would lie between what each batch allocates and
    # frees, and memory would grow with their number.
    sums: list[list[float]] = []
    windows: list[Item] = []
    with evaluating(model, precision):
        for number, batch in enumerate(batches):
            if number % distributed.world_size() != distributed.rank():
                sums.append([0.0] * 5)
                continue
            on_device = batch.to(device)
            ids, documents = on_device.inputs, on_device.documents
            if packed is not None:
                hidden = packed.whole(ids, documents)
            else:
                hidden = model.hidden(ids, positions=on_device.positions, documents=documents)
            on_host = batch.targets.cpu()  # what is chosen here waits for no GPU
            row, at = (on_host != IGNORE_INDEX).nonzero(as_tuple=True)  # (N,) each
            targets, x = on_host[row, at], hidden[row.to(device), at.to(device)]
            of_targets = score(x, logits, V, targets.to(device))  # (N, 3)
            if isinstance(token_bytes, Tensor):
                sizes = token_bytes[targets].double()
            else:
                sizes = torch.full((len(targets),), token_bytes or 0.0, dtype=torch.float64)
            columns = torch.column_stack([of_targets, sizes, torch.ones_like(sizes)])  # (N, 5)
            rows = torch.zeros(len(on_host), 5, dtype=torch.float64)
            rows.index_add_(0, row, columns)
            windows += [dict(zip(_COLUMNS, row, strict=True)) for row in rows.tolist()]
            sums.append(rows.sum(dim=0).tolist())
    # Batch by batch, and added up here: on any number of ranks in the same order.
    total = torch.zeros(5, dtype=torch.float64)
    of_batches = torch.tensor([[0.0] * 5, *sums], dtype=torch.float64)
    for of_batch in distributed.sum_over_ranks(of_batches):
        total += of_batch
    nats, top1, top5, size, count = total.tolist()
    tokens = int(count)
    if not tokens:
        raise ValueError("nothing to score: the validation text has fewer than two tokens")
    loss = nats / tokens
    bits = nats / math.log(2) / size if size else None
    perplexity = math.exp(min(loss, 700))
    return Scores(loss, perplexity, bits, top1 / tokens, top5 / tokens, tokens, windows)


def target_bytes(
    tokenizer: Tokenizer,
    shards: Sequence[np.ndarray],
    text_bytes: int,
    context_only: Sequence[int] = (),
) -> Tensor | float | None:
    """The bytes of text that targets stand for, as `evaluate` takes them.

    Exact for each id (V,) if the ids spell the text. Otherwise (text is normalized, or spaces are
    inserted between tokens) the average: the documents' bytes, `text_bytes`, divided by the number
    of targets. context_only: ids that are never targets. None without targets.
    """
    sizes = tokenizer.token_bytes()
    if sizes is not None and tokenizer.keeps_bytes:
        return torch.from_numpy(sizes)
    targets = sum(len(s) - 1 - int(np.isin(s[1:], context_only).sum()) for s in shards if len(s))
    return text_bytes / targets if targets else None


def score(hidden: Tensor, logits_of: Callable[[Tensor], Tensor], V: int, targets: Tensor) -> Tensor:
    """Of each target (N,), after hidden (N, C): its nats, and whether it has the highest logit and
    one of the five highest (N, 3), fp64 on the CPU. Logits (N, V) are made in chunks."""
    found_nats, found_ranks = [], []
    rows = chunk_rows(max(1, len(targets)), V, hidden.device)
    for h, y in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = logits_of(h).float()  # (rows, V)
        label = logits.gather(1, y.unsqueeze(1))  # (rows, 1)
        found_nats.append(logits.logsumexp(dim=-1, keepdim=True) - label)
        # Number of tokens that the model prefers; ties go to the lower id, as in argmax.
        earlier = torch.arange(logits.shape[1], device=y.device) < y.unsqueeze(1)
        rank = ((logits > label) | ((logits == label) & earlier)).sum(dim=-1)
        # NaN: no hit
        found_ranks.append(rank.masked_fill(label.isnan().squeeze(1), logits.shape[1]))
    nats, ranks = torch.cat(found_nats).cpu().double(), torch.cat(found_ranks).cpu()
    return torch.column_stack([nats, ranks < 1, ranks < 5])
