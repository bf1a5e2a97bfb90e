"""The policy of reinforcement learning: a model in training that completes prompts with its
present weights. With several ranks, each completes its share of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Request
from gptsmith.model import lora
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import Tokenizer

# Tokens of prompts that are read in one step of the engine: no client waits for a first token.
BUDGET = 8192
MAX_BATCH_SIZE, MIN_BATCH_SIZE = 256, 16  # completions that are sampled at the same time ...
CACHE_BYTES = 2**30  # ... as many as have room for their keys and values here, or the minimum


class Completion(NamedTuple):
    """ids: the new tokens, with the one that ended them. text: without it. finished: whether there
    was one; otherwise the completion is as long as was allowed."""

    ids: list[int]
    text: str
    finished: bool


class Policy:
    """A model in training, and an engine for its weights.

    stop_ids: what ends a completion. T: tokens of a prompt and its completion at most. weights: the
    format in which our kernels compute (see Engine). Adapters are merged into a plain copy of the
    model, which our kernels can compute; a model without any is used as it is.
    """

    def __init__(
        self,
        model: GPTModel,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        T: int,
        weights: str = "auto",
    ) -> None:
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, stop_ids
        self._weights = weights
        config = model.config
        cache = T * config.n_layer * 2 * config.K * config.D * 4  # bytes of a completion, in fp32
        self.batch_size = min(MAX_BATCH_SIZE, max(MIN_BATCH_SIZE, CACHE_BYTES // cache))
        self._is_wrapped = lora.is_wrapped(model)
        self._engine: Engine | None = None

    @cached_property
    def _plain(self) -> GPTModel:
        """The model, or a plain copy of one with adapters, made once the model is on its device."""
        if not self._is_wrapped:
            return self.model
        plain = GPTModel(self.model.config, mask=self.model.mask)
        return plain.to(self.model.head_weight.device).requires_grad_(False).eval()

    def refresh(self) -> None:
        """Use the model's present weights from now on. Inside `sharding.gathered`."""
        if self._is_wrapped:
            self._plain.load_state_dict(lora.merged_state_dict(self.model))
        if self._engine is None:
            self._engine = Engine(
                self._plain, self.tokenizer, self.batch_size, weights=self._weights,
                chunk=BUDGET, budget=BUDGET,
            )  # fmt: skip
        else:
            self._engine.refresh()

    def without_adapters(self) -> GPTModel:
        """The model with its adapters switched off, until the next `refresh`."""
        assert self._is_wrapped
        self._plain.load_state_dict(lora.merged_state_dict(self.model, adapters=False))
        return self._plain

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
    ) -> list[list[Completion]]:
        """Completions of each prompt (ids), one for each of its seeds."""
        training = self._plain.training
        self._plain.eval()  # once: the engine would do it in every step
        try:
            return self._complete(prompts, sampling, seeds)
        finally:
            self._plain.train(training)

    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
    ) -> list[list[Completion]]:
        engine = self._engine
        assert engine is not None, "refresh first"

        def request(i: int, seed: int) -> Request:
            return Request(
                prompts[i], sampling.with_seed(seed), stop_ids=self.stop_ids, context_shift=False,
                namespace=str(i),
            )  # fmt: skip

        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found = {}
        size = max(1, self.batch_size // max(map(len, seeds), default=1))
        for start in range(0, len(order), size):
            group = order[start : start + size]
            # The first completion of a prompt reads it; the others find it in the cache.
            first = [engine.add(request(i, seeds[i][0])) for i in group]
            engine.step()
            for i, generation in zip(group, first, strict=True):
                found[i] = [generation, *(engine.add(request(i, s)) for s in seeds[i][1:])]
            while engine.busy:
                engine.step()
        return [
            [
                Completion(
                    [*g.ids, *([] if g.stop_id is None else [g.stop_id])],
                    g.text,
                    g.stop_id is not None,
                )
                for g in found[i]
            ]
            for i in range(len(prompts))
        ]
