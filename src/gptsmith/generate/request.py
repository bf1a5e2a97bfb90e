"""A request for text, the text generated so far, and what the engine keeps for it.

V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from gptsmith.generate.options import DEFAULT_SAMPLING, SamplingConfig

if TYPE_CHECKING:
    from gptsmith.tokenizer import TokenStream

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    prompt: Sequence[int]
    sampling: SamplingConfig = DEFAULT_SAMPLING
    """Its seed is the seed of this text."""
    stop: str | Sequence[str] = ()
    """Strings that end the text and are not part of it; one string is one of them."""
    stop_ids: Sequence[int] | None = None
    """Tokens that end the text and are not part of it (default: all that
    the tokenizer's model ends a text with)."""
    on_text: OnText | None = None
    """Called with each piece of text as soon as it is certain."""
    context_shift: bool = True
    """At the end of the model's context, continue from the newest half of the text; if False,
    finish there."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))


@dataclass(eq=False)
class Generation:
    """The continuation of one prompt; it grows with each step of the engine until it finishes."""

    ids: list[int]
    """The new tokens, without a stop id, but including those of a stop string."""
    text: str = ""
    """What is new in the text of prompt and ids, without the stop string; empty if the engine has
    no tokenizer."""
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
    """stop: a stop id or stop string; length: max_new_tokens or the end of the context; None: not
    finished yet."""
    dropped_tokens: int = 0
    """Oldest tokens that were dropped because the text outgrew the model's context."""
    notice: str | None = None
    """For the user: why the KV cache could not be used at first; None if it could."""


class StopStrings:
    """Passes text through until a stop string is complete.

    Text that may turn out to be the beginning of a stop string is held back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.stopped = False
        self.held = ""

    def push(self, piece: str, last: bool = False) -> str:
        """The text that is certain after this piece; the stop string completed first ends it."""
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


class Row:
    """A request in progress.

    stream: gives the text of the new tokens; None: the engine has no tokenizer.
    """

    def __init__(
        self,
        request: Request,
        stop_ids: frozenset[int],
        limit: int,
        stream: TokenStream | None,
    ) -> None:
        self.request = request
        self.generation = Generation([])
        self.context = list(request.prompt)  # what the model reads
        self.generator = torch.Generator().manual_seed(request.sampling.seed)
        self.seen: Tensor | None = None  # (V,) tokens of prompt and text, for repetition_penalty
        self._stream, self._stop = stream, StopStrings(request.stop)
        self._stop_ids = stop_ids
        self._limit = limit
        self.remaining = request.sampling.max_new_tokens
        """Tokens that may still be generated."""
        if not request.context_shift:
            self.remaining = min(self.remaining, limit - len(self.context))

    def shift(self) -> None:
        """Keep the newest half of the context, to be read again."""
        dropped = len(self.context) - max(1, self._limit // 2)
        del self.context[:dropped]
        self.generation.dropped_tokens += dropped

    def push(self, token: int) -> None:
        """Append the next token; the last one sets finish_reason."""
        generation, stream, stop = self.generation, self._stream, self._stop
        piece = ""
        if token in self._stop_ids:
            generation.finish_reason = "stop"
        else:
            generation.ids.append(token)
            self.context.append(token)
            self.remaining -= 1
            if self.seen is not None:
                self.seen[token] = True
            if stream is not None:
                piece = stop.push(stream.push(token))
            if stop.stopped:
                generation.finish_reason = "stop"
            elif self.remaining == 0:
                generation.finish_reason = "length"
        if generation.finish_reason is not None and stream is not None:
            piece += stop.push(stream.flush(), last=True)
        generation.text += piece
        if piece and self.request.on_text is not None:
            self.request.on_text(piece)
