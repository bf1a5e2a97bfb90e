"""Ids of special tokens by role, and the ids before and after a text or a document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from gptsmith.tokenizer.roles import TokenRoles, roles_from_spelling

Ids = tuple[int, ...]


@dataclass(frozen=True)
class SpecialIds:
    """Ids of special tokens by role.

    bos, eos, pad, unk  as the tokenizer names them, else as the model does
    eos_ids             all ids that end a generated text; only eos unless the model names others
    prefix, suffix      ids that the tokenizer's post-processor adds before and after a text
    start_ids           what generation starts from without a prompt: prefix, else bos, else eos
    control             special tokens that are not part of a text: all but unk
    document            ids before and after a document in a stream of tokens
    """

    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None
    eos_ids: tuple[int, ...]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
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
        eos_ids = tuple(dict.fromkeys(roles.ids("eos_token_id")))
        if eos is None and eos_ids:
            eos = eos_ids[0]
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
            eos_ids or (() if eos is None else (eos,)),
            *prefix_and_suffix(post_processor),
            known - {unk},
        )  # fmt: skip

    @property
    def start_ids(self) -> tuple[int, ...]:
        bos = self.eos if self.bos is None else self.bos
        return self.prefix or (() if bos is None else (bos,))

    @property
    def document(self) -> DocumentTokens:
        """`start_ids` and an end token, unless `start_ids` end a text, as <|endoftext|> does."""
        ends = {*self.eos_ids, self.eos}
        before, after = self.start_ids, self.suffix
        if after and not self.prefix and self.bos is None:
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

    def around(self, ids: np.ndarray) -> list[np.ndarray]:
        """The ids of a document (n,) between those before and after it."""
        return [np.array(self.before, ids.dtype), ids, np.array(self.after, ids.dtype)]

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


def prefix_and_suffix(post_processor: Any) -> tuple[Ids, Ids]:
    """The ids that the post-processor of a tokenizer.json adds before and after a text.

    Covers every kind of post-processor in `tokenizers`. ValueError for one that is malformed, for
    example that refers to a token without ids.
    """
    try:
        return _prefix_and_suffix(post_processor)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the post_processor of tokenizer.json is malformed ({error!r})") from None


def _prefix_and_suffix(post_processor: Any) -> tuple[Ids, Ids]:
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
                first, last = _prefix_and_suffix(step)
                before, after = first + before, after + last
            return before, after
        case _:
            return (), ()
