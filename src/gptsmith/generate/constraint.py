"""Constraints on a completion: a JSON schema, a regular expression, a choice, or a grammar.

After each token, the constraint allows some next tokens; the others are not sampled. llguidance
(extra `serve`) computes them on the trie of the tokens' bytes.

V vocabulary.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from gptsmith.tokenizer import Tokenizer

_MAX_LENGTH = 50_000  # characters of a constraint, which take up to half a second to compile
_MAX_SYMBOLS = 20_000  # of its grammar
_MAX_ITEMS = 20_000  # of the parser in one step, about a millisecond
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # parts of a JSON schema
_NUMBERED = ("anyOf", "oneOf", "allOf", "prefixItems")
_STUCK = "nothing that the model's tokens can spell matches it"
# One space, or a new line and its indentation: a model that writes nothing else comes to an end.
_WHITESPACE = r"(\x20|\n[\x20\t]{0,16})?"


@dataclass(frozen=True)
class Constraint:
    """What a completion must match as a whole. Use one of the constructors below."""

    kind: Literal["json", "regex", "choice", "grammar"]
    source: str

    @classmethod
    def json(cls, schema: Mapping[str, Any] | str) -> Constraint:
        """JSON that a JSON schema allows, in the order of its properties. ValueError for a schema
        that is not a JSON object."""
        try:
            document = json.loads(schema) if isinstance(schema, str) else schema
            if not isinstance(document, Mapping):
                raise ValueError("a JSON schema is an object")
            return cls("json", json.dumps(document, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a JSON schema: {textwrap.shorten(str(error), 200)}") from None

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls.json({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Text that a regular expression matches as a whole; without look-around and
        back-references."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Constraint:
        """One of several texts. ValueError if there are none, or an empty one."""
        if isinstance(texts, str) or not texts or "" in texts:
            raise ValueError(f"choice {texts!r:.60}: give a list of texts, none of them empty")
        return cls("choice", json.dumps(list(texts), ensure_ascii=False))

    @classmethod
    def grammar(cls, text: str) -> Constraint:
        """Text of a context-free grammar, in Lark's form as llguidance reads it, or in GBNF."""
        return cls("grammar", text)


class Matcher:
    """The tokens that may come next in one completion.

    finished: the completion is whole, and nothing can follow.
    """

    def __init__(self, state: LLMatcher, is_text: np.ndarray) -> None:
        """is_text (V,): tokens that are text; no others can be part of a completion. ValueError
        if no completion matches the constraint."""
        self._state, self._is_text = state, is_text
        self._update()

    def mask(self, x: Tensor, ends: Collection[int]) -> None:
        """Set the logits x (V,) of tokens that cannot come next to -inf. ends: tokens that end the
        completion, which may come once it is whole."""
        kept = {i: x[i].clone() for i in ends if self._complete and i < len(x)}
        x.masked_fill_(self._forbidden.to(x.device), -math.inf)
        for i, logit in kept.items():
            x[i] = logit

    def push(self, token: int) -> None:
        """The next token of the completion. ValueError if the constraint becomes too complex to
        follow, and if no token of the vocabulary can continue it."""
        self._state.consume_token(token)
        self._update()

    def accepted(self, tokens: Sequence[int]) -> Sequence[int]:
        """Those of the tokens that come before the first that the constraint forbids."""
        return tokens[: self._state.validate_tokens(list(tokens))]

    def forced(self, count: int) -> list[int]:
        """At most `count` tokens that are the only ones that can come next."""
        return self._state.compute_ff_tokens()[:count]

    def _update(self) -> None:
        bits = np.frombuffer(self._state.compute_bitmask(), np.uint8)
        if self._state.is_error():
            raise _failed(self._state.get_error())
        # By numpy, since torch would wake its threads for 50,000 bits.
        mask = np.unpackbits(bits, count=len(self._is_text), bitorder="little").view(np.bool_)
        allowed = mask & self._is_text
        self._forbidden = torch.from_numpy(~allowed)
        self._complete, stuck = self._state.is_accepting(), not allowed.any()
        self.finished = self._complete and stuck
        if stuck and not self._complete:
            raise _failed(_STUCK)


class ConstraintCompiler:
    """Compiles constraints for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, V: int) -> None:
        """V: ids that can be sampled. ValueError without llguidance, and for a tokenizer whose ids
        do not stand for fixed bytes."""
        if not tokenizer.has_fixed_bytes:
            raise ValueError(
                f"{tokenizer!r}: constraints need a tokenizer whose ids stand for fixed bytes,"
                " such as a byte-level BPE"
            )
        try:
            from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper
        except ModuleNotFoundError:
            raise ValueError("constraints need llguidance: pip install 'gptsmith[serve]'") from None
        self._tokenizer = tokenizer
        self._trie = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)))
        self._limits = LLParserLimits(
            max_grammar_size=_MAX_SYMBOLS, step_max_items=_MAX_ITEMS, verbose_errors=False
        )
        special = set(tokenizer.special_tokens.values())
        is_text = [i not in special and bool(tokenizer.decode_bytes([i])) for i in range(V)]
        self._is_text = np.array(is_text)

    def compile(self, constraint: Constraint) -> Matcher:
        """For one completion. ValueError for a constraint that is wrong, too large or too complex,
        and for one that no completion matches, or only the empty one."""
        from llguidance import LLMatcher

        if len(constraint.source) > _MAX_LENGTH:
            raise ValueError(f"the constraint is longer than {_MAX_LENGTH:,} characters")
        if constraint.kind == "choice":
            for text in json.loads(constraint.source):
                self._tokenizer.encode(text)  # ValueError for an unknown character
        # Copies of one matcher would share its lexer, whose limits count what all have met.
        state = LLMatcher(self._trie, _grammar(constraint), log_level=0, limits=self._limits)
        if state.is_error():
            place = ""
            if constraint.kind == "json":
                schema = json.loads(constraint.source)
                shared = {k: v for k, v in schema.items() if k in ("$defs", "definitions")}
                place = _place(schema, shared, state.get_error())
            raise _failed(state.get_error(), place)
        matcher = Matcher(state, self._is_text)
        if matcher.finished:
            raise _failed("only the empty completion matches it")
        return matcher


class _Vocabulary:
    """A tokenizer as llguidance expects one."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode
        self.special_token_ids = list(tokenizer.special_tokens.values())
        self.eos_token_id = (self.special_token_ids or [0])[0]  # not what ends a completion
        self.tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]

    def __call__(self, text: str) -> list[int]:
        try:
            return self._encode(text)
        except ValueError:  # an unknown character, at which the completion will be stuck
            return []


def _grammar(constraint: Constraint) -> str:
    """In the form of llguidance. ValueError for text that is not one."""
    from llguidance import LLMatcher, grammar_from

    match constraint.kind:
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.source)
        case "choice":
            texts = [
                re.sub(r"[\0-/:-@\[-`{-\x7f]", _escape, t) for t in json.loads(constraint.source)
            ]
            return LLMatcher.grammar_from_lark("start: " + " | ".join(f"/{t}/" for t in texts))
    try:
        if constraint.kind == "grammar":
            return grammar_from("grammar", constraint.source)
        return LLMatcher.grammar_from_json_schema(
            constraint.source, overrides={"whitespace_pattern": _WHITESPACE}
        )
    except ValueError as error:
        raise _failed(str(error)) from None


def _escape(character: re.Match[str]) -> str:
    return f"\\x{ord(character[0]):02x}"


def _place(schema: Mapping[str, Any], shared: Mapping[str, Any], error: str) -> str:
    """Where in a JSON schema an error is, as a JSON pointer: the innermost part that has it, if it
    is among the first. shared: definitions that the parts refer to."""
    from llguidance import LLMatcher

    for step, part in islice(_parts(schema), 500):
        grammar = _grammar(Constraint.json({**shared, **part}))
        if LLMatcher.validate_grammar(grammar) == error:
            return step + _place(part, shared, error)
    return ""


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas directly inside a schema, with their JSON pointers."""
    for key, value in schema.items():
        parts: Iterable[tuple[object, object]] = ()
        if key in _NAMED and isinstance(value, Mapping):
            parts = value.items()
        elif key in _NUMBERED and isinstance(value, list):
            parts = enumerate(value)
        elif key in ("items", "additionalProperties"):
            parts = [("", value)]
        for name, part in parts:
            if isinstance(part, Mapping):
                yield f"/{key}/{name}".rstrip("/"), part


def _failed(error: str, place: str = "") -> ValueError:
    """A short form of llguidance's error."""
    lines = error.replace("<non-verbose/>", "").splitlines() or [""]
    text = next((x.removeprefix("error: ") for x in lines if x.startswith("error: ")), lines[0])
    if text.startswith("NoExtension"):
        text = _STUCK
    where = f" at {place}" if place else ""
    return ValueError(f"the constraint{where}: {textwrap.shorten(text, 300)}")
