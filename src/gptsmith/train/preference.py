"""Losses of pairs of a better and a worse answer. n pairs, in 2 n rows; T time.

Rafailov et al. 2023, "Direct Preference Optimization"; Azar et al. 2023 (IPO); Lambert et al. 2024,
"Tulu 3" (length-normalized DPO); Meng et al. 2024, "SimPO"; Mitchell 2023 (label smoothing, cDPO).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from gptsmith.batch import IGNORE_INDEX, Batch, PairBatch
from gptsmith.train.loss import LanguageModel, token_log_probs
from gptsmith.train.options import PreferenceKind

DEFAULT_BETA: dict[PreferenceKind, float] = {
    "sigmoid": 0.1,
    "ipo": 0.1,
    "sigmoid_norm": 2.0,
    "simpo": 2.0,
}
METRICS = ("accuracy", "margin", "chosen_logp", "rejected_logp")


def answer_log_probs(model: LanguageModel, batch: PairBatch) -> Tensor:
    """The log-probability of each row's targets in nats, (2 n,) fp32."""
    return token_log_probs(model, batch).sum(dim=1)


@dataclass(frozen=True)
class PreferenceLoss:
    """loss(model, batch) -> sum over the pairs, and sums of metrics.

    kind             sigmoid (DPO), ipo, sigmoid_norm (DPO of log-probabilities per token), simpo
    beta             how far the model may move from the reference: less with a larger one; scale of
                     the margin for simpo
    label_smoothing  share of pairs assumed to be in the wrong order (not for ipo)
    gamma            margin that simpo asks for

    Metrics: accuracy, share of pairs whose chosen answer is ahead; margin, beta times by how much;
    chosen_logp and rejected_logp, log-probabilities of whole answers.
    """

    kind: PreferenceKind
    beta: float
    label_smoothing: float = 0.0
    gamma: float = 0.0

    def __call__(self, model: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(batch, PairBatch)
        log_p = answer_log_probs(model, batch)  # (2 n,)
        lengths = (batch.targets != IGNORE_INDEX).sum(dim=1)
        gain = log_p
        if self.kind != "simpo":
            assert batch.reference is not None
            gain = log_p - batch.reference
        if self.kind != "sigmoid":
            gain = gain / lengths.clamp(min=1)
        chosen, rejected = gain.chunk(2)
        margin = self.beta * (chosen - rejected)  # (n,)
        if self.kind == "ipo":
            losses = (chosen - rejected - 1 / (2 * self.beta)) ** 2
        else:
            z = margin - self.gamma if self.kind == "simpo" else margin
            smooth = self.label_smoothing
            losses = -(1 - smooth) * F.logsigmoid(z) - smooth * F.logsigmoid(-z)
        given = (lengths > 0).chunk(2)[0]  # false in batches without targets
        ahead = (margin > 0) + 0.5 * (margin == 0)  # before training, all are equal
        measured = zip(METRICS, (ahead, margin, *log_p.chunk(2)), strict=True)
        metrics = {name: (values.detach() * given).sum() for name, values in measured}
        return (losses * given).sum(), metrics
