"""Ids of special tokens by role, and the ids added around a text and around a document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from gptsmith.tokenizer.roles import TokenRoles, roles_from_spelling

Around = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class SpecialIds:
    """Ids of special tokens by role.

    bos, eos, pad, unk  as the tokenizer names them, else as the model does
    ends                all ids that end a generated text; only eos unless the model names others
    before, after       ids that the tokenizer's post-processor adds around a text
    start               the prompt for an empty text: before, else bos, else eos
    control             special tokens that are not part of a text: all but unk
    document            ids around a document in a stream of tokens
    """

    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None
    ends: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    control: frozenset[int]

    @classmethod
    def of(
        cls,
        roles: TokenRoles,
        vocab: Mapping[str, int],
        special: Mapping[str, int],
        post_processor: Any,
    ) -> SpecialIds:
        """vocab: all tokens. special: the special ones. post_processor: that of tokenizer.json."""

        def named(role: str) -> int | None:
            name = roles.tokenizer.get(role)
            return None if name is None else vocab[name]

        bos, eos, unk = named("bos_token"), named("eos_token"), named("unk_token")
        known = frozenset(special.values())
        if bos is None:  # a default of the model's configuration may be any token
            bos = next((i for i in roles.ids("bos_token_id") if i in known), None)
        ends = tuple(dict.fromkeys(roles.ids("eos_token_id")))
        if eos is None and ends:
            eos = ends[0]
        if (
            eos is None
            and (name := roles_from_spelling(special).tokenizer["eos_token"]) is not None
        ):
            eos = special[name]
        pad = named("pad_token")
        if pad is None:
            pad = next(iter(roles.ids("pad_token_id")), None)
        return cls(
            bos, eos, pad, unk,
            ends or (() if eos is None else (eos,)),
            *around(post_processor),
            known - {unk},
        )  # fmt: skip

    @property
    def start(self) -> tuple[int, ...]:
        bos = self.eos if self.bos is None else self.bos
        return self.before or (() if bos is None else (bos,))

    @property
    def document(self) -> DocumentTokens:
        """`start` and an end token, unless `start` itself ends a text, as <|endoftext|> does."""
        ends = {*self.ends, self.eos}
        before, after = self.start, self.after
        if after and not self.before and self.bos is None:
            before = ()  # only the end token separates two documents
        if not after and self.eos is not None and not ends.intersection(before):
            after = (self.eos,)
        return DocumentTokens(before, after, tuple(i for i in before if i not in ends))


class DocumentTokens(NamedTuple):
    """Ids before and after each document in a stream of tokens.

    context_only: those that are never targets, because they do not end a text.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    context_only: tuple[int, ...] = ()

    def starts(self, ids: np.ndarray) -> np.ndarray:
        """Which of the ids (..., T) are the first of a document: bools (..., T)."""
        found = np.zeros(ids.shape, bool)
        if self.before:
            places = max(ids.shape[-1] - len(self.before) + 1, 0)
            found[..., :places] = True
            for i, token in enumerate(self.before):
                found[..., :places] &= ids[..., i : places + i] == token
        elif self.after:
            found[..., 1:] = ids[..., :-1] == self.after[-1]
        return found


def around(post_processor: Any) -> Around:
    """The ids that the post-processor of a tokenizer.json adds before and after a text.

    Covers every kind of post-processor in `tokenizers`. ValueError for one that is malformed, for
    example that refers to a token without ids.
    """
    try:
        return _around(post_processor)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the post_processor of tokenizer.json is malformed ({error!r})") from None


def _around(post_processor: Any) -> Around:
    match (post_processor or {}).get("type"):
        case "TemplateProcessing":
            special, pieces = post_processor["special_tokens"], post_processor["single"]
            ids = [
                special[piece["SpecialToken"]["id"]]["ids"] if "SpecialToken" in piece else []
                for piece in pieces
            ]
            text = next((i for i, piece in enumerate(pieces) if "Sequence" in piece), len(pieces))
            return tuple(chain(*ids[:text])), tuple(chain(*ids[text:]))
        case "BertProcessing" | "RobertaProcessing":
            return (post_processor["cls"][1],), (post_processor["sep"][1],)
        case "Sequence":
            before: tuple[int, ...] = ()
            after: tuple[int, ...] = ()
            for step in post_processor["processors"]:
                first, last = _around(step)
                before, after = first + before, after + last
            return before, after
        case _:
            return (), ()
