"""A KV cache that knows the tokens of its rows, so that prompts can share prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from gptsmith.model.kv_cache import KVCache

if TYPE_CHECKING:
    from gptsmith.model.gpt import GPTModel


class PrefixCache:
    """Rows 0..running - 1 belong to running texts; the others hold finished ones, or nothing.

    A joining text gets the longest prefix that any row holds. lookahead: see Mask.lookahead; a
    shorter prefix cannot be shared, as its keys depend on what follows it.
    """

    def __init__(self, model: GPTModel, lookahead: int) -> None:
        self._model = model
        self._lookahead = lookahead
        self.clear()

    def clear(self) -> None:
        """Forget everything, and free the memory."""
        self.running = 0
        self._kv: KVCache | None = None
        self._texts: list[Sequence[int]] = []  # of every row; it holds as many tokens as were read

    @property
    def kv(self) -> KVCache:
        assert self._kv is not None, "reserve comes first"
        return self._kv

    def reserve(self, rows: int, length: int) -> None:
        """Make room for this many running rows, and for texts of this many tokens."""
        config, mask, weight = self._model.config, self._model.mask, self._model.head_weight
        if self._kv is None:
            self._kv = KVCache.for_model(config, mask, rows, length, weight.dtype, weight.device)
        else:
            capacity = KVCache.capacity_for(config, mask, length)
            if capacity > self._kv.capacity:  # double it, so that growing step by step stays cheap
                length = max(length, 2 * self._kv.capacity)
                capacity = KVCache.capacity_for(config, mask, length)
            self._kv.grow(rows, capacity)
        self._texts += [()] * (self._kv.batch - len(self._texts))

    def join(self, text: Sequence[int]) -> None:
        """Add a running row for a text, which may grow later; the row holds a prefix of it."""
        kv, new = self.kv, self.running
        prefixes = [self._shared_prefix(text, row) for row in range(kv.batch)]
        source = max(range(kv.batch), key=prefixes.__getitem__)
        length = prefixes[source]
        # A finished text that is continued keeps its row. Any other prefix is copied over the row
        # with the fewest tokens.
        target = min(range(new, kv.batch), key=kv.lengths.__getitem__)
        if length and source >= new and length >= kv.lengths[source] - 1:
            target = source
        if target == source or not length:
            kv.truncate(target, length)
        else:
            kv.copy_row(source, target, length)
        kv.swap_rows(new, target)
        self._texts[target] = self._texts[new]
        self._texts[new] = text
        self.running += 1

    @torch.inference_mode()  # like the tensors of the cache
    def leave(self, row: int, keep: bool = True) -> None:
        """End a running row; the last running row takes its place. keep: hold its tokens."""
        self.running -= 1
        last = self.running
        self.kv.swap_rows(row, last)
        self._texts[row], self._texts[last] = self._texts[last], self._texts[row]
        if not keep:
            self.kv.truncate(last, 0)

    def _shared_prefix(self, text: Sequence[int], row: int) -> int:
        """How many tokens of a row `text` can reuse. Its last token is always read again, because
        the logits of the next one come from it."""
        length = min(len(text) - 1, self.kv.lengths[row])
        pairs = zip(text[:length], self._texts[row], strict=False)
        length = next((n for n, (a, b) in enumerate(pairs) if a != b), length)
        length = self.kv.reusable_length(row, length)
        return length if length >= self._lookahead else 0
