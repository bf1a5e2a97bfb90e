"""Draft tokens by a smaller model, for speculative decoding (Leviathan et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from gptsmith.generate.request import Request, Row

if TYPE_CHECKING:
    from gptsmith.generate.engine import Engine


class DraftModel:
    """A model with an engine of its own, which generates ahead of another engine's requests.

    Each draft is a new request, whose prompt is the context of the row. All of it but the newest
    tokens is in the cache of the draft model's engine, so nothing has to follow the rows when they
    are preempted, cancelled or shifted. The draws are those of the row (seed and position), so that
    two models that agree draw the same token.
    """

    def __init__(self, engine: Engine, V: int) -> None:
        """V: ids that the other engine samples."""
        self.engine, self._V = engine, V

    def draft(self, rows: Sequence[Row], count: int) -> None:
        """Set `row.drafted` of each row: at most `count` tokens, none where its context does not
        fit into that of the draft model."""
        limit = self.engine.model.config.context_length
        pending = []
        for row in rows:
            length = min(row.draft_room(count), limit - len(row.context))
            row.drafted = ()
            if length > 0:
                sampling = row.request.sampling.model_copy(update={"max_new_tokens": length})
                request = Request(
                    row.context,
                    sampling,
                    stop_ids=(),
                    context_shift=False,
                    logit_bias=row.request.logit_bias,
                    namespace=row.request.namespace,
                )
                pending.append((row, self.engine.add(request)))
        for _ in self.engine.as_completed([generation for _, generation in pending]):
            pass
        for row, generation in pending:
            row.drafted = list(takewhile(lambda token: token < self._V, generation.ids))
