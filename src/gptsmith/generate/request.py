"""Requests, their generations, and the state that the engine keeps for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from gptsmith.arguments import token_ids
from gptsmith.generate.constraint import Constraint, Matcher
from gptsmith.generate.drafts import DraftLength, PromptLookup
from gptsmith.generate.mean_vector import MeanVector
from gptsmith.generate.options import DEFAULT_SAMPLING, SamplingConfig
from gptsmith.generate.pages import PageTable
from gptsmith.generate.sampling import TokenLogprob

if TYPE_CHECKING:
    from gptsmith.tokenizer import TokenStream

OnText = Callable[[str], None]


class QueueFull(RuntimeError):
    """As many requests are waiting as the engine accepts: try again later."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    prompt: Sequence[int]
    sampling: SamplingConfig = DEFAULT_SAMPLING
    """Its seed is that of this request."""
    stop: str | Sequence[str] = ()
    """Strings that end the completion and are not part of it; a single string is one of them."""
    stop_ids: Sequence[int] | None = None
    """Tokens that end the completion and are not part of it (default: the tokenizer's
    eos_ids)."""
    on_text: OnText | None = None
    """Called with each piece of text, as soon as no later token can change it."""
    context_shift: bool = True
    """At the end of the model's context, continue from the newest half of the text; if False,
    finish there."""
    logprobs: int | None = None
    """Record the log-probability of each new token, and of this many of the likeliest."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, which is then read as a whole."""
    mean_vector: bool = False
    """Also find the mean of the vectors of the prompt's tokens; the prompt is read as a whole."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    constraint: Constraint | Matcher | None = None
    """What the completion must match; it ends as soon as nothing can follow. A matcher, made by
    `Engine.compile`, is for one request."""
    namespace: str = ""
    """What a prompt shares with others is read once among requests of the same namespace only."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", token_ids(self.prompt, "prompt"))
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))

    def check(self, V: int, limit: int, has_tokenizer: bool) -> None:
        """ValueError for what a model with V ids and this context length cannot do."""
        prompt = self.prompt
        if not has_tokenizer and (self.stop or self.on_text or self.constraint):
            raise ValueError(
                "stop strings, constraints and on_text need a tokenizer: Engine(model, tokenizer)"
            )
        if not isinstance(self.stop, list | tuple) or not all(
            isinstance(text, str) for text in self.stop
        ):
            raise ValueError(f"stop={self.stop!r}: give a text, or a list of texts")
        for name in ("logprobs", "prompt_logprobs"):
            if (wanted := getattr(self, name)) is not None and wanted < 0:
                raise ValueError(f"{name}={wanted}: give 0 or more, or None")
        if "" in self.stop:
            raise ValueError("stop contains an empty string, which every text contains: omit it")
        if len(prompt) == 0:
            raise ValueError("an empty prompt: start a text with <|endoftext|>")
        if not (min(prompt) >= 0 and max(prompt) < V):
            bad = next(t for t in prompt if not 0 <= t < V)
            raise ValueError(
                f"id {bad} is outside the vocabulary 0..{V - 1}:"
                " encode the prompt with the model's own tokenizer"
            )
        whole = not self.context_shift or self.prompt_logprobs is not None or self.mean_vector
        if whole and len(prompt) > limit:
            raise ValueError(
                f"{len(prompt)} tokens do not fit into the model's context of {limit}:"
                " shorten the prompt"
            )
        for token, bias in self.logit_bias.items():
            if not (0 <= token < V and math.isfinite(bias)):
                raise ValueError(
                    f"logit_bias {token}: {bias}: give ids from 0 to {V - 1} and numbers"
                )


@dataclass(eq=False)
class Generation:
    """The continuation of one prompt; it grows with each step of the engine until it finishes."""

    ids: list[int]
    """The new tokens, without a stop id, but including those of a stop string."""
    text: str = ""
    """The generated text, without the stop string; empty if the engine has no tokenizer."""
    finish_reason: Literal["stop", "length", "cancelled", "error"] | None = None
    """stop: a stop id, a stop string, or a constraint that is met; length: max_new_tokens or the
    end of the context; error: see `error`; None: not finished yet."""
    error: str | None = None
    """Why the constraint could not be followed to the end."""
    dropped_tokens: int = 0
    """Oldest tokens that were dropped when the sequence became longer than the model's context."""
    cached_tokens: int = 0
    """Tokens of the prompt that were in the cache already."""
    notice: str | None = None
    """For the user: why the KV cache could not be used at first; None if it could."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of each of the ids, if the request asks for them."""
    stop_id: int | None = None
    """The id that ended the completion, which is not among the ids; None if none did."""
    stop_logprob: TokenLogprob | None = None
    """Of the stop id that ended the completion, which is not among the ids."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """Of each token of the prompt, if the request asks for them; None for the first."""
    mean_vector: MeanVector | None = None
    """Of the tokens of the prompt, if the request asks for it."""


class StopStrings:
    """Passes text through until a stop string is complete.

    Text that may turn out to be the beginning of a stop string is held back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.stopped = False
        self.held = ""

    def push(self, piece: str, last: bool = False) -> str:
        """The text that no stop string can end any more; the one completed first ends it."""
        if not self.stop:
            return piece
        if self.stopped:
            return ""
        text = self.held + piece
        found = [(at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        longest = 0 if last else min(len(text), max(map(len, self.stop), default=1) - 1)
        keep = next(
            (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stop)), 0
        )
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


class RequestState:
    """A request in progress.

    limit: the model's context length. stream: gives the text of the new tokens; None: the engine
    has no tokenizer. matcher: of the request's constraint.
    """

    def __init__(
        self,
        request: Request,
        stop_ids: frozenset[int],
        limit: int,
        stream: TokenStream | None,
        matcher: Matcher | None = None,
    ) -> None:
        self.request, self.matcher = request, matcher
        s = request.sampling
        self.changes_logits = bool(
            request.logit_bias
            or matcher is not None
            or s.repetition_penalty != 1
            or s.presence_penalty
            or s.frequency_penalty
        )
        """Whether penalties, a bias or a constraint change the model's logits."""
        self.generation = Generation([], mean_vector=MeanVector() if request.mean_vector else None)
        self.context = list(request.prompt)  # what the model reads
        self.table: PageTable | None = None  # where it is stored; None: not running, or not cached
        self.counts = dict.fromkeys(self.context, 0)  # how often a token was generated
        self._stream, self._stop = stream, StopStrings(request.stop)
        self.stop_ids = stop_ids
        self._lookup = PromptLookup()
        self.draft_length = DraftLength()
        self.drafted: Sequence[int] | None = None
        """By a draft model, for the next step; None: there is no such model."""
        self._limit = limit
        self.remaining = s.max_new_tokens
        """Tokens that may still be generated."""
        if not request.context_shift:
            self.remaining = min(self.remaining, limit - len(self.context))

    @property
    def finished(self) -> bool:
        return self.generation.finish_reason is not None

    @property
    def too_long(self) -> bool:
        """Whether the context is longer than the model's."""
        return len(self.context) > self._limit

    @property
    def read(self) -> int:
        """Tokens of the context whose keys and values are stored."""
        return 0 if self.table is None else self.table.length

    @property
    def position(self) -> int:
        """Position of the next token, counting the prompt and dropped tokens."""
        return len(self.context) + self.generation.dropped_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities or vectors of the prompt's tokens are still to be found."""
        request, found = self.request, self.generation.prompt_logprobs
        mean, length = self.generation.mean_vector, len(request.prompt)
        if mean is not None and mean.count < length:
            return True
        return request.prompt_logprobs is not None and len(found) < length

    def draft_room(self, count: int) -> int:
        """How many draft tokens may be verified in the next step, at most `count`; fewer after
        drafts that were rejected."""
        return self._room(self.draft_length.next(count))

    def _room(self, count: int) -> int:
        """How many draft tokens the request and the context have room for, at most `count`."""
        return max(0, min(count, self.remaining - 1, self._limit - len(self.context)))

    def draft(self, count: int) -> Sequence[int]:
        """At most `count` draft tokens: those that a constraint leaves no choice about, those of a
        draft model, or those that followed when the newest tokens occurred before."""
        if self.matcher is not None and (forced := self.matcher.forced(self._room(count))):
            return forced
        drafted, self.drafted = self.drafted, None
        if drafted is None:
            drafted = self._lookup.draft(self.context, self.draft_room(count))
        return drafted if self.matcher is None else self.matcher.accepted(drafted)

    def shift(self) -> None:
        """Drop the older half of a context that is too long; the rest is read again."""
        if self.too_long:
            dropped = len(self.context) - max(1, self._limit // 2)
            del self.context[:dropped]
            self.generation.dropped_tokens += dropped

    def push(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Append the next token; the last one sets finish_reason."""
        generation, stream, stop = self.generation, self._stream, self._stop
        piece = ""
        if token in self.stop_ids:
            generation.finish_reason = "stop"
            generation.stop_id, generation.stop_logprob = token, logprob
        else:
            generation.ids.append(token)
            if logprob is not None:
                generation.logprobs.append(logprob)
            self.context.append(token)
            self.counts[token] = self.counts.get(token, 0) + 1
            self.remaining -= 1
            if stream is not None:
                piece = stop.push(stream.push(token))
            if stop.stopped:
                generation.finish_reason = "stop"
            else:
                self._follow_constraint(token)
            if self.remaining == 0 and generation.finish_reason is None:
                generation.finish_reason = "length"
        if generation.finish_reason is not None and stream is not None:
            piece += stop.push(stream.flush(), last=True)
        generation.text += piece
        if piece and self.request.on_text is not None:
            self.request.on_text(piece)

    def _follow_constraint(self, token: int) -> None:
        """Advance the matcher, which may end the completion: nothing can follow, or an error."""
        if self.matcher is None:
            return
        try:
            self.matcher.push(token)
        except ValueError as error:
            self.generation.error, self.generation.finish_reason = str(error), "error"
        else:
            if self.matcher.finished:
                self.generation.finish_reason = "stop"
