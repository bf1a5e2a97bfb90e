"""Our tokenizers in the terms of llama.cpp: tokens, their types, merges, and a named split.

llama.cpp has one byte-level BPE and knows the regular expressions in front of it by name
(src/llama-vocab.cpp); a split that has no name there cannot be exported. It reads the bytes of a
text through GPT-2's printable alphabet, joins them by the merges, and looks the results up.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gptsmith.tokenizer import BEGINNINGS, PADS, Tokenizer
from gptsmith.tokenizer.bpe import byte_alphabet

# The types of tokens in a GGUF (gguf.TokenType).
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# the regular expression of a tokenizer.json -> its name in llama.cpp
_SPLITS = {
    _LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _LETTERS + r"\p{N}" + _REST: "qwen2",
}
# A reader without any merge is refused; no UTF-8 has the byte 0xFF, which is written as this.
_NO_MERGE = ["ÿ ÿ"]


@dataclass(frozen=True)
class Table:
    """What a GGUF stores of a tokenizer. Texts of tokens are in GPT-2's alphabet of bytes, those
    of control and user-defined tokens as they are."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    bos: int
    eos: int
    pad: int | None
    add_bos: bool
    notes: list[str]


def table(tokenizer: Tokenizer) -> Table:
    """ValueError for a tokenizer that llama.cpp cannot compute, naming what is in the way."""
    document = json.loads(tokenizer.to_json())
    pre = "gpt-2" if tokenizer.kind == "char" else _split_name(document)
    added = {token["content"]: token for token in document.get("added_tokens") or []}
    vocab = {**document["model"]["vocab"], **{name: t["id"] for name, t in added.items()}}
    merges = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
    notes: list[str] = []
    if tokenizer.kind == "char":
        merges = _character_merges(vocab.keys() - added.keys())
        notes.append("llama.cpp drops characters that the tokenizer does not have, silently")
    if document.get("normalizer"):
        notes.append("llama.cpp does not bring text to the form NFC, as the tokenizer does")
    greedy = [name for name, token in added.items() if token.get("lstrip") or token.get("rstrip")]
    if greedy:
        notes.append(f"in llama.cpp {greedy[0]} takes no white space with it, as it does here")
    if len(tokenizer.prefix) > 1:
        raise _refusal(f"begins a text with {len(tokenizer.prefix)} tokens")
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]  # ids without a token
    types = [UNUSED] * tokenizer.vocab_size
    for text, i in vocab.items():
        if text in added:
            tokens[i], types[i] = text, CONTROL if added[text].get("special") else USER_DEFINED
        else:
            tokens[i] = _in_bytes(text) if tokenizer.kind == "char" else text
            types[i] = NORMAL
    assert len(set(tokens)) == len(tokens)
    begins = [*tokenizer.prefix, *(vocab[name] for name in BEGINNINGS if name in added)]
    return Table(
        pre,
        tokens,
        types,
        merges or _NO_MERGE,
        # A reader would take a number of its own (11) for what is not given.
        bos=begins[0] if begins else tokenizer.eos_id,
        eos=tokenizer.eos_id,
        pad=next((vocab[name] for name in PADS if name in added), None),
        add_bos=bool(tokenizer.prefix),
        notes=notes,
    )


def _in_bytes(text: str) -> str:
    alphabet = byte_alphabet()
    return "".join(alphabet[byte] for byte in text.encode())


def _character_merges(characters: Iterable[str]) -> list[str]:
    """Merges that make the given characters from the bytes of UTF-8, and nothing else.

    A merge begins with the first byte of a character and ends within it, so that none crosses from
    one character into the next.
    """
    merges: dict[str, None] = {}  # an ordered set
    for character in sorted(characters):
        piece = _in_bytes(character)
        merges.update({f"{piece[:i]} {piece[i]}": None for i in range(1, len(piece))})
    return list(merges)


def _split_name(document: dict[str, Any]) -> str:
    """What llama.cpp calls the way in which this tokenizer.json cuts a text before the merges."""
    model, normalizer = document["model"], document.get("normalizer")
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    found = next((key for key in (*odd, "byte_fallback") if model.get(key)), None)
    if model.get("type") != "BPE" or found:
        raise _refusal(f"is no plain byte-level BPE ({found or model.get('type')})")
    if normalizer and normalizer.get("type") != "NFC":
        raise _refusal(f"normalizes text ({normalizer.get('type')})")
    pre = document.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _refusal(f"cuts text by {_kinds(steps)}")
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
        name = _SPLITS.get(pattern) if isolated else None
    # With "llama-bpe", llama.cpp takes a word that is a token as it is, whatever the merges say.
    if name is None or bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise _refusal(f"cuts text by {_kinds(steps)}, with an expression it does not have")
    return name


def _kinds(steps: list[dict[str, Any]]) -> str:
    return " and ".join(str(step.get("type")) for step in steps)


def _refusal(what: str) -> ValueError:
    return ValueError(
        f"llama.cpp cannot compute this tokenizer, which {what}: a GGUF can have the tokenizers of "
        "gptsmith, GPT-2, Llama 3, Qwen and SmolLM; --format hf keeps any"
    )
