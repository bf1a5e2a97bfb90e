"""A tokenizer as GGUF stores it: tokens, their types, merges, and the name of a pre-tokenizer.

llama.cpp has one byte-level BPE and a fixed list of named pre-tokenizers (regular expressions, in
src/llama-vocab.cpp); a tokenizer with any other cannot be exported. It maps the bytes of a text to
GPT-2's printable alphabet, applies the merges, and looks up the results.
"""

import json
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any

from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.bpe import byte_alphabet
from gptsmith.tokenizer.formats import SPLITS

# The types of tokens in a GGUF (gguf.TokenType).
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# llama.cpp requires at least one merge: this one, of the byte 0xFF, never occurs in UTF-8.
_NO_MERGE = ["ÿ ÿ"]


@dataclass(frozen=True)
class GgufVocabulary:
    """What a GGUF file stores about a tokenizer. Tokens are written in GPT-2's byte alphabet,
    control and user-defined tokens in plain text."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    bos: int
    eos: int
    eos_ids: tuple[int, ...]
    """All ids that end a text, eos among them."""
    pad: int | None
    add_bos: bool
    add_eos: bool
    notes: list[str]


def table(tokenizer: Tokenizer) -> GgufVocabulary:
    """The GGUF form of a tokenizer. ValueError with the reason if llama.cpp does not support it."""
    document = json.loads(tokenizer.to_json())
    pre = "gpt-2" if tokenizer.kind == "char" else _split_name(document)
    added = {token["content"]: token for token in document.get("added_tokens") or []}
    merges = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
    notes: list[str] = []
    if tokenizer.kind == "char":
        merges = _character_merges(tokenizer.vocab.keys() - added.keys())
        notes.append("llama.cpp silently drops characters that are not in the vocabulary")
    if document.get("normalizer"):
        notes.append("llama.cpp does not normalize text to NFC, as the tokenizer does")
    strips = [name for name, token in added.items() if token.get("lstrip") or token.get("rstrip")]
    if strips:
        notes.append(f"llama.cpp keeps white space around {strips[0]}, which the tokenizer strips")
    ids = tokenizer.special_ids
    if len(ids.prefix) > 1:
        raise _unsupported(f"puts {len(ids.prefix)} tokens before a text")
    if ids.suffix not in ((), (ids.eos,)):
        raise _unsupported("puts something else than the end of text after a text")
    tokens, types = [""] * tokenizer.vocab_size, [UNUSED] * tokenizer.vocab_size
    for text, i in tokenizer.vocab.items():
        if text in added:
            tokens[i], types[i] = text, CONTROL if added[text].get("special") else USER_DEFINED
        else:
            tokens[i] = _byte_characters(text) if tokenizer.kind == "char" else text
            types[i] = NORMAL
    used = Counter(tokens)
    tokens = [token or _unused_name(i, used) for i, token in enumerate(tokens)]
    if twice := next((token for token, n in used.items() if token and n > 1), None):
        raise _unsupported(f"has two tokens that a GGUF spells {twice!r}")
    return GgufVocabulary(
        pre,
        tokens,
        types,
        merges or _NO_MERGE,
        # llama.cpp defaults to 11 if none is given.
        bos=(*ids.start_ids, tokenizer.eos_id)[0],
        eos=tokenizer.eos_id,
        eos_ids=tuple(dict.fromkeys((tokenizer.eos_id, *ids.eos_ids))),
        pad=ids.pad,
        add_bos=bool(ids.prefix),
        add_eos=bool(ids.suffix),
        notes=notes,
    )


def _unused_name(i: int, used: Container[str]) -> str:
    """For an id without a token, as llama.cpp's converter names it."""
    return next(name for n in count() if (name := f"[PAD{i}]{'_' * n}") not in used)


def _byte_characters(text: str) -> str:
    alphabet = byte_alphabet()
    return "".join(alphabet[byte] for byte in text.encode())


def _character_merges(characters: Iterable[str]) -> list[str]:
    """Merges that build the given characters from their UTF-8 bytes, and nothing else.

    Every merge starts at the first byte of a character and ends within it, so none crosses into
    the next character.
    """
    merges: dict[str, None] = {}  # an ordered set
    for character in sorted(characters):
        piece = _byte_characters(character)
        merges.update({f"{piece[:i]} {piece[i]}": None for i in range(1, len(piece))})
    return list(merges)


def _split_name(document: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer of this tokenizer.json."""
    model, normalizer = document["model"], document.get("normalizer")
    unsupported = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    found = next((key for key in (*unsupported, "byte_fallback") if model.get(key)), None)
    if model.get("type") != "BPE" or found:
        raise _unsupported(f"is not plain byte-level BPE ({found or model.get('type')})")
    if normalizer and normalizer.get("type") != "NFC":
        raise _unsupported(f"normalizes text ({normalizer.get('type')})")
    pre = document.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _unsupported(f"splits text by {_step_types(steps)}")
    words = last.get("use_regex", True)  # GPT-2's own regular expression
    name = None
    if not before:
        name = "gpt-2" if words or not model["merges"] else None
    elif len(before) == 1 and words:
        digits = before[0].get("type") == "Digits" and before[0].get("individual_digits")
        name = "smollm" if digits else None
    elif len(before) == 1:
        isolated = before[0].get("behavior") == "Isolated" and not before[0].get("invert")
        pattern = (before[0].get("pattern") or {}).get("Regex", "")
        known = (name for name in ("llama-bpe", "qwen2") if SPLITS[name] == pattern)
        name = next(known, None) if isolated else None
    # With "llama-bpe", llama.cpp does not apply merges to a word that is itself a token.
    if name is None or bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise _unsupported(f"splits text by {_step_types(steps)}, with an unknown expression")
    return name


def _step_types(steps: list[dict[str, Any]]) -> str:
    return " and ".join(str(step.get("type")) for step in steps)


def _unsupported(what: str) -> ValueError:
    return ValueError(
        f"llama.cpp cannot compute this tokenizer, which {what}: GGUF export supports those of "
        "gptsmith, GPT-2, Llama 3, Qwen and SmolLM; --format hf supports any"
    )
