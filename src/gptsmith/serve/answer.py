"""Responses with generated text, complete or streamed in chunks, in OpenAI's two formats."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, ClassVar

from gptsmith.generate.request import Generation
from gptsmith.generate.sampling import TokenLogprob
from gptsmith.serve.protocol import ChatBody, CompletionBody
from gptsmith.serve.served import ServedModel
from gptsmith.serve.worker import CompletionProgress

Json = dict[str, Any]


class Answer(ABC):
    """The response to one HTTP request; choice i continues prompts[i].

    generations: of the choices, set once the engine has the requests.
    """

    prefix: ClassVar[str]
    object: ClassVar[str]
    chunk_object: ClassVar[str]
    field: ClassVar[str]  # of the body, that has the prompt

    def __init__(
        self, model: ServedModel, body: Any, prompts: Sequence[list[int]], echoes: Sequence[str]
    ) -> None:
        self.model, self.body, self.prompts, self.echoes = model, body, prompts, echoes
        self.generations: list[Generation] = []
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._sent = [CompletionProgress() for _ in prompts]
        self._offsets = [0] * len(prompts)  # characters of the names of the tokens that were sent

    def whole(self) -> Json:
        """The complete response, once all requests have finished."""
        choices = [
            self._choice(i, self._content(i, g), CompletionProgress(), CompletionProgress.of(g))
            for i, g in enumerate(self.generations)
        ]
        return self._envelope(self.object, choices) | {"usage": self._usage()}

    def opening(self) -> Iterator[Json]:
        """The chunks before the first token."""
        return iter(())

    def chunks(self, progress: Sequence[CompletionProgress]) -> Iterator[Json]:
        """One chunk per choice that has changed since the last call."""
        for i, (old, new) in enumerate(zip(self._sent, progress, strict=True)):
            if new == old:
                continue
            self._sent[i] = new
            yield self._chunk([self._choice(i, self._delta(i, old, new), old, new)])

    def closing(self) -> Iterator[Json]:
        """The chunks after the last token."""
        if self.body.stream_options.include_usage:
            yield self._envelope(self.chunk_object, []) | {"usage": self._usage()}

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
        }

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = self._envelope(self.chunk_object, choices)
        return chunk | {"usage": None} if self.body.stream_options.include_usage else chunk

    def _usage(self) -> Json:
        prompt = sum(map(len, self.prompts[:: self.body.n]))
        new = sum(len(g.ids) for g in self.generations)
        cached = sum(g.cached_tokens for g in self.generations[:: self.body.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _choice(
        self, i: int, content: Json, old: CompletionProgress, new: CompletionProgress
    ) -> Json:
        """A choice with its text and what else has been added since `old`."""
        choice: Json = {
            "index": i,
            **content,
            "logprobs": self._logprobs(i, old, new),
            "finish_reason": new.finish_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = self.generations[i].ids[old.length : new.length]
            if old == CompletionProgress():
                choice["prompt_token_ids"] = self.prompts[i]
        return choice

    def _scored(self, i: int, old: CompletionProgress, new: CompletionProgress) -> list[Json]:
        """The new tokens of a choice with their log-probabilities and alternatives."""
        return [
            self._token(t.id, t.logprob) | {"top_logprobs": [self._token(*pair) for pair in t.top]}
            for t in self.generations[i].logprobs[old.length : new.length]
        ]

    def _token(self, token: int, logprob: float) -> Json:
        data = self.model.tokenizer.decode_bytes([token])
        name = self.model.token_name(token)
        entry: Json = {"token": name, "logprob": logprob, "bytes": list(data)}
        return entry | {"token_id": token} if self.body.return_token_ids else entry

    # What differs between the formats

    @abstractmethod
    def _content(self, i: int, generation: Generation) -> Json:
        """The text of a choice."""

    @abstractmethod
    def _delta(self, i: int, old: CompletionProgress, new: CompletionProgress) -> Json:
        """The text that has been added to a choice since `old` was sent."""

    @abstractmethod
    def _logprobs(self, i: int, old: CompletionProgress, new: CompletionProgress) -> Json | None:
        """Log-probabilities of what has been added since `old`; None if they were not requested."""


class ChatAnswer(Answer):
    """The format of /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    field = "messages"
    body: ChatBody

    def opening(self) -> Iterator[Json]:
        for i in range(len(self.prompts)):
            choice: Json = {
                "index": i,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            yield self._chunk([choice])

    def _content(self, i: int, generation: Generation) -> Json:
        return {"message": {"role": "assistant", "content": generation.text, "refusal": None}}

    def _delta(self, i: int, old: CompletionProgress, new: CompletionProgress) -> Json:
        text = new.text[len(old.text) :]
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, i: int, old: CompletionProgress, new: CompletionProgress) -> Json | None:
        if not self.body.logprobs:
            return None
        return {"content": self._scored(i, old, new), "refusal": None}


class CompletionAnswer(Answer):
    """The format of /v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"
    field = "prompt"
    body: CompletionBody

    def _content(self, i: int, generation: Generation) -> Json:
        return {"text": self.echoes[i] + generation.text}

    def _delta(self, i: int, old: CompletionProgress, new: CompletionProgress) -> Json:
        text = new.text[len(old.text) :]
        return {"text": self.echoes[i] + text if old == CompletionProgress() else text}

    def _logprobs(self, i: int, old: CompletionProgress, new: CompletionProgress) -> Json | None:
        """Includes a stop token, as in vLLM: lm-evaluation-harness drops the last token, whatever
        it is, to keep those of the prompt."""
        if self.body.logprobs is None:
            return None
        generation, name = self.generations[i], self.model.token_name
        scored: list[TokenLogprob | None] = [*generation.logprobs[old.length : new.length]]
        if new.finish_reason and generation.stop_logprob:
            scored.append(generation.stop_logprob)
        ids = [t.id for t in scored if t]
        if self.body.echo and old == CompletionProgress():
            ids = [*self.prompts[i], *ids]
            scored = [*generation.prompt_logprobs, *scored]  # the first has none
        names = [name(token) for token in ids]
        *offsets, self._offsets[i] = accumulate(map(len, names), initial=self._offsets[i])
        more = {"content": self._scored(i, old, new)} if self.body.return_token_ids else {}
        return more | {
            "tokens": names,
            "token_logprobs": [t and t.logprob for t in scored],
            "top_logprobs": [t and self._top(t) for t in scored],
            "text_offset": offsets,
        }

    def _top(self, scored: TokenLogprob) -> Json:
        """The likeliest tokens by name; of two with the same name, the likelier."""
        return {self.model.token_name(token): p for token, p in reversed(scored.top)}
