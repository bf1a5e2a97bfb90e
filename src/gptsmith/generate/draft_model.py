"""Draft tokens by a smaller model, for speculative decoding (Leviathan et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from gptsmith.generate.request import Request, RequestState

if TYPE_CHECKING:
    from gptsmith.generate.engine import Engine


class DraftModel:
    """A model with an engine of its own, which generates ahead of another engine's requests.

    Each draft is a new request, whose prompt is the context of another. All of it but the newest
    tokens is in the cache of the draft model's engine, so nothing has to follow the requests when
    they are preempted, cancelled or shifted. The draws are those of the request (seed and
    position), so that two models that agree draw the same token.
    """

    def __init__(self, engine: Engine, V: int) -> None:
        """V: ids that the other engine samples."""
        self.engine, self._V = engine, V

    def draft(self, states: Sequence[RequestState], count: int) -> None:
        """Set `state.drafted` of each request: at most `count` tokens, none where the context does
        not fit into that of the draft model."""
        limit = self.engine.model.config.context_length
        pending = []
        for state in states:
            length = min(state.draft_room(count), limit - len(state.context))
            state.drafted = ()
            if length > 0:
                sampling = state.request.sampling.model_copy(update={"max_new_tokens": length})
                request = Request(
                    state.context,
                    sampling,
                    stop_ids=(),
                    context_shift=False,
                    logit_bias=state.request.logit_bias,
                    namespace=state.request.namespace,
                )
                pending.append((state, self.engine.add(request)))
        for _ in self.engine.as_completed([generation for _, generation in pending]):
            pass
        for state, generation in pending:
            state.drafted = list(takewhile(lambda token: token < self._V, generation.ids))

    def release(self) -> None:
        """Release the pages of the last drafts: the other engine has nothing to do."""
        while self.engine.needs_step:
            self.engine.step()
