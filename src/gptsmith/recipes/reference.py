"""What the reference, which is the model before preference tuning, says about the answers.

It is computed once, before the first step, and kept in the run folder, from which a resumed run
reads it: no second model is needed. Losses take the log-probabilities of whole answers; of the
answers for validation, the most probable tokens at each position are kept too, for the divergence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.data.pair_rows import PairRows
from gptsmith.data.pairs import Pairs
from gptsmith.model.gpt import GPTModel
from gptsmith.progress import WorkProgress
from gptsmith.run import Run, digests
from gptsmith.run.layout import REFERENCE
from gptsmith.train import checkpoint, distributed
from gptsmith.train.loss import chunk_rows, hidden_states
from gptsmith.train.preference import answer_log_probs
from gptsmith.train.runtime import Precision, evaluating

TOP = 16  # tokens of the reference that are kept at each target, to measure how far the model moves


@dataclass(frozen=True)
class TopTokens:
    """The most probable tokens of the reference at each target of some pairs, K of them.

    ids      (M, K) int32, for the targets of the chosen and of the rejected answer of pair 0, 1 ...
    log_p    (M, K) fp32
    offsets  (2 pairs + 1,): where the targets of each answer begin
    """

    ids: Tensor
    log_p: Tensor
    offsets: np.ndarray

    @classmethod
    def empty(cls, pairs: Pairs, K: int) -> TopTokens:
        offsets = np.cumsum([0, *pairs.examples.target_lengths])
        ids = torch.zeros(int(offsets[-1]), K, dtype=torch.int32)
        return cls(ids, torch.zeros(ids.shape), offsets)

    def places(self, numbers: Sequence[int]) -> Tensor:
        """The rows of the targets of PairRows.of(numbers), in their order."""
        at = self.offsets
        answers = (2 * i + side for side in (0, 1) for i in numbers)
        return torch.cat([torch.arange(int(at[a]), int(at[a + 1])) for a in answers])

    def divergence(self, model: GPTModel, batch: Batch, numbers: Sequence[int]) -> Tensor:
        """Sum over the batch's targets of KL(model || reference) in nats, fp64 on the CPU.

        All tokens that are not among the K most probable ones of the reference count as one, so it
        is a lower bound, and close: the more of the reference's probability the K have, the closer.
        """
        places = self.places(numbers)
        ids, log_q = self.ids[places].long(), self.log_p[places]
        total, at = torch.zeros((), dtype=torch.float64), 0
        for log_p in target_predictions(model, batch):
            rows = slice(at, at + len(log_p))
            p = log_p.gather(1, ids[rows].to(log_p.device)).cpu().double()
            total += _divergence(p, log_q[rows].double())
            at = rows.stop
        return total


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of KL(p || q) over the rows (N, K), each with the rest of its probability as one more."""
    sides = []
    for log in (log_p, log_q):
        rest = (1 - log.exp().sum(dim=1, keepdim=True)).clamp(min=1e-9)
        sides.append(torch.cat([log, rest.log()], dim=1))
    p, q = sides
    return (p.exp() * (p - q)).sum()


def target_predictions(model: GPTModel, batch: Batch) -> Iterator[Tensor]:
    """log-probabilities of all tokens at the batch's targets, (rows, V) fp32, some at a time."""
    hidden = hidden_states(model, batch)
    hidden = hidden[batch.targets != IGNORE_INDEX]  # (N, C)
    weight = model.head_weight.to(hidden.dtype)
    for h in hidden.split(chunk_rows(max(1, len(hidden)), len(weight), hidden.device)):
        yield (h @ weight.T).float().log_softmax(dim=-1)


@dataclass(frozen=True)
class Reference:
    """What the reference says about the answers of training and validation.

    log_probs  for each part, of the chosen and of the rejected answers, (pairs, 2) fp32
    top        its most probable tokens in the answers for validation
    """

    log_probs: dict[str, Tensor]
    top: TopTokens


def prepare_reference(
    run: Run, resumed: bool, model: GPTModel, parts: Mapping[str, PairRows], B: int,
    precision: Precision,
) -> Reference:  # fmt: skip
    """The reference of the parts "train" and "val".

    model: before its first step. B: pairs of a batch. A resumed run's is read from its folder:
    ValueError if it is damaged.
    """
    if resumed:
        found = checkpoint.load_tensors(run.verified(REFERENCE))
    else:
        found = _computed(model, parts, B, precision)
        if distributed.rank() == 0:
            with digests.recorded(run.path, REFERENCE) as temporary:
                checkpoint.save_tensors(temporary, found)
        distributed.barrier()
    for name, rows in parts.items():
        assert found[name].shape == (len(rows.pairs), 2)
    offsets = TopTokens.empty(parts["val"].pairs, 0).offsets
    top = TopTokens(found["val_top_ids"], found["val_top_log_p"], offsets)
    return Reference({name: found[name] for name in parts}, top)


def _computed(
    model: GPTModel, parts: Mapping[str, PairRows], B: int, precision: Precision
) -> dict[str, Tensor]:
    """The tensors of the file. Ranks take turns with the batches."""
    device = model.head_weight.device
    total, done = sum(len(rows.pairs) for rows in parts.values()), 0
    K = min(TOP, len(model.head_weight))
    found, top = {}, TopTokens.empty(parts["val"].pairs, K)
    quiet = distributed.rank() > 0
    with (
        evaluating(model, precision),
        WorkProgress("reference log-probabilities (pairs)", total, quiet=quiet) as progress,
    ):
        for name, rows in parts.items():
            values = torch.zeros(len(rows.pairs), 2)
            for turn, numbers in enumerate(rows.groups(B)):
                if turn % distributed.world_size() == distributed.rank():
                    batch = rows.of(numbers).to(device)
                    log_p = answer_log_probs(model, batch)
                    values[torch.tensor(numbers)] = log_p.view(2, -1).T.cpu()
                    if name == "val":
                        best = [x.topk(K) for x in target_predictions(model, batch)]
                        places = top.places(numbers)
                        top.log_p[places] = torch.cat([x.values for x in best]).cpu()
                        top.ids[places] = torch.cat([x.indices for x in best]).cpu().int()
                done += len(numbers)
                progress.update(done)
            found[name] = distributed.sum_over_ranks(values)
    found["val_top_ids"] = distributed.sum_over_ranks(top.ids)
    found["val_top_log_p"] = distributed.sum_over_ranks(top.log_p)
    return found
