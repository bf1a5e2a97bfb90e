"""A GPT that predicts the class of a text instead of its next token.

B batch, T time, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gptsmith.model.checks import check_ids
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel


class GPTClassifier(GPTModel):
    """A GPT with a head of one row per class (`config.labels`), applied to the last real token.

    The head has no bias and follows the final norm, as in transformers' ...ForSequence-
    Classification classes. Without an output head over the vocabulary, `forward`
    raises ValueError.
    """

    def __init__(self, config: ModelConfig, **mask_options: Any) -> None:
        """mask_options: those of GPTModel."""
        if not config.labels:
            raise ValueError("a classifier needs class names: set model.labels")
        super().__init__(config, **mask_options)
        self.score = nn.Linear(config.n_embd, len(config.labels), bias=False)
        with torch.no_grad():
            self.score.weight.normal_(0.0, 0.02)

    @property
    def head_weight(self) -> Tensor:
        raise ValueError(
            f"this model is a classifier ({', '.join(self.config.labels)[:80]}) and predicts no "
            "next token: use gptsmith classify"
        )

    def logits(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Scores (B, n_labels) of texts ids (B, T), padded on the right to T.

        lengths (B,): real tokens of each row, the last of which is used; padding is
        invisible under any mask. Raises ValueError for a length outside 1..T.
        """
        check_ids(ids)
        B, T = ids.shape
        if tuple(lengths.shape) != (B,):
            raise ValueError(f"lengths of shape {tuple(lengths.shape)} for {B} texts: give {(B,)}")
        at = torch.arange(T, device=ids.device)
        if int(lengths.min()) < 1 or int(lengths.max()) > T:
            raise ValueError(f"lengths {lengths.tolist()} of rows of {T} tokens: give 1 to {T}")
        # Under a causal mask no real token attends to padding. Under others it might: there,
        # padding is a document of its own.
        causal = self.mask.is_causal
        documents = None if causal else (at >= lengths[:, None]).long()  # (B, T)
        hidden = self.hidden(ids, documents=documents)  # (B, T, C)
        return self.score(hidden[torch.arange(B, device=ids.device), lengths - 1])
