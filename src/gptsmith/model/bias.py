"""The form that a mask takes in a forward pass without a cache: itself, dense, or FlexAttention's.

B batch, T time, H query heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gptsmith.model import attention, checks, masks
from gptsmith.model.attention import Bias
from gptsmith.model.config import ModelConfig
from gptsmith.model.masks import Mask


class Biases:
    """Makes what `attention` takes, for the forward passes of one model. FlexAttention's block
    masks of the model's own mask are kept."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._block_masks: dict[tuple[Mask, int, int, torch.device], BlockMask] = {}

    def __call__(
        self,
        own: Mask,
        mask: Mask | Tensor | None,
        documents: Tensor | None,
        B: int,
        T: int,
        device: torch.device,
        dropout: bool,
    ) -> Mask | Bias:
        """The mask itself if it is causal(), booleans (B|1, H|1, T, T), or a BlockMask.

        own: the model's mask, for which mask None stands. mask, documents: see `GPTModel.hidden`.
        dropout: whether weights of the attention are dropped. ValueError for a mask or documents of
        another shape.
        """
        H = self.config.n_head
        if documents is not None:
            checks.check_documents(documents, B, T)
        if isinstance(mask, Tensor):
            dense = masks.dense_mask(mask, B, H, T)
            if documents is None:
                return dense
            at = torch.arange(T, device=device)
            return dense & masks.documents(documents).dense(B, H, at, at)
        mask = mask or own
        if documents is not None:
            mask = mask & masks.documents(documents)
        elif mask.is_plain_causal:
            return mask  # None would stand for the mask of the config
        # FlexAttention skips blocks that are wholly masked, but has no dropout, needs heads of at
        # least 16, and compiles anew for each length: only for lengths that stay the same.
        flex = attention.is_cuda(device) and self.config.D >= 16 and not dropout
        compiling = torch.compiler.is_compiling()
        fixed = T == self.config.context_length
        if flex and (compiling or (fixed and attention.has_flex(device))):
            if mask is not own or compiling:  # a graph is compiled again if the cache changes
                return mask.block_mask(B, H, T, device)
            key = (mask, B if mask.properties.uses_b else 1, T, device)
            if key not in self._block_masks:
                self._block_masks[key] = mask.block_mask(B, H, T, device)
            return self._block_masks[key]
        return attention.dense_bias(mask, B, H, T, device)
