"""The loss of reinforcement learning with a group baseline. B completions, in rows; T time.

Schulman et al. 2017 (PPO's clipped ratio); Shao et al. 2024, "DeepSeekMath" (GRPO); Yu et al. 2025,
"DAPO" (token-level loss, two clips); Liu et al. 2025, "Understanding R1-Zero-Like Training".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptsmith.batch import IGNORE_INDEX, Batch, PolicyBatch
from gptsmith.train.loss import LanguageModel, token_log_probs


@dataclass(frozen=True)
class PolicyLoss:
    """loss(model, batch) -> sum over the new tokens, and sums of metrics.

    clip_low, clip_high  the ratio to the policy that wrote a completion counts between 1 - clip_low
                         and 1 + clip_high
    kl                   weight of the divergence from the reference, estimated as Schulman's k3:
                         exp(d) - d - 1 for d = log p_reference - log p
    temperature          of sampling: the policy is the model at this temperature

    Metrics: entropy, in nats; clipped, share of tokens whose gradient the clip removes; kl, if it
    has a weight. Rows count as often as they were sampled (`batch.copies`).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0
    temperature: float = 1.0

    def __call__(self, model: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(batch, PolicyBatch)
        log_p, entropy = token_log_probs(
            model, batch, entropy=True, temperature=self.temperature
        )  # (B, T)
        is_target = batch.targets != IGNORE_INDEX
        advantages = batch.advantages  # (B, T)
        ratio = (log_p - (log_p.detach() if batch.old is None else batch.old)).exp()
        gain = ratio * advantages
        limited = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages
        losses = -torch.minimum(gain, limited)
        copies = batch.copies.unsqueeze(1)  # (B, 1)
        metrics = {
            "entropy": (entropy * copies).sum(),
            "clipped": (((limited < gain) & is_target) * copies).sum().float(),
        }
        if self.kl:
            assert batch.reference is not None
            d = batch.reference - log_p
            divergence = (d.exp() - d - 1) * is_target
            losses = losses + self.kl * divergence
            metrics["kl"] = (divergence.detach() * copies).sum()
        return (losses * batch.weights.unsqueeze(1) * copies * is_target).sum(), metrics
