"""The file format of tokenizers: write and recognize tokenizer.json, find GPT-2's files.

Every kind is a "BPE" model of Hugging Face `tokenizers`, so other libraries can open it; character
and byte tokenizers are BPE without merges.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptsmith import files
from gptsmith.tokenizer import bpe

ENDOFTEXT = "<|endoftext|>"

_SUFFIX, _LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# How well-known byte-level BPEs split text, under the names of llama.cpp (src/llama-vocab.cpp):
# GPT-2, Llama 3, Qwen 2 and 3, GPT-4o.
SPLITS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": rf"{_SUFFIX}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_SUFFIX}|{_LETTERS}|\p{{N}}|{_REST}",
    "gpt-4o": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}?|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

_GPT2 = "openai-community/gpt2"  # on the Hub
_GPT2_MERGES = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"
_TABLES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def recognize(document: dict[str, Any]) -> tuple[str, list[str]]:
    """The kind and, for byte-level BPE, its merges as "left right". Decided by content alone."""
    try:
        return _recognize(document)
    except (AttributeError, KeyError, TypeError):  # malformed: `tokenizers` will raise the error
        return "other", []


def _recognize(document: dict[str, Any]) -> tuple[str, list[str]]:
    model, added = document["model"], document.get("added_tokens") or []
    vocab, rules = model.get("vocab"), model.get("merges")
    unsupported = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if (
        model.get("type") != "BPE"
        or any(model.get(key) for key in (*unsupported, "ignore_merges"))
        or document.get("normalizer")
        or not all(token.get("special") for token in added)
        or not isinstance(vocab, dict)
    ):
        return "other", []
    entries = vocab | {token["content"]: token["id"] for token in added}
    if not all(type(name) is str and type(i) is int for name, i in entries.items()):
        return "other", []
    if sorted(entries.values()) != list(range(len(entries))) or entries | vocab != entries:
        return "other", []
    own = vocab.keys() - {token["content"] for token in added}
    pre, decoder = document.get("pre_tokenizer"), (document.get("decoder") or {}).get("type")
    if pre is None:
        characters = not rules and not model.get("unk_token") and all(len(c) == 1 for c in own)
        return ("char" if characters and own and decoder == "Fuse" else "other"), []
    alphabet = bpe.byte_alphabet()
    byte_level = pre.get("type") == decoder == "ByteLevel" and not pre.get("add_prefix_space")
    if not byte_level or not own.issuperset(alphabet):
        return "other", []
    merges = [rule if isinstance(rule, str) else " ".join(rule) for rule in rules]
    if not merges and len(own) == 256 and all(vocab[c] == i for i, c in enumerate(alphabet)):
        return "byte", []
    parts = ((*merge.split(" "), merge.replace(" ", "")) for merge in merges)
    if not pre.get("use_regex", True) or not all(map(own.issuperset, parts)):
        return "other", []
    digest = hashlib.sha256("\n".join(merges).encode()).hexdigest()
    return ("gpt2" if digest == _GPT2_MERGES else "bpe"), merges


def byte_level_text(vocab: dict[str, int], merges: list[str], use_regex: bool = True) -> str:
    """The text of tokenizer.json for byte-level BPE; <|endoftext|> is special if `vocab` has it."""
    special = [(ENDOFTEXT, vocab[ENDOFTEXT])] if ENDOFTEXT in vocab else []
    level = _BYTE_LEVEL | {"use_regex": use_regex}
    return document_text(vocab, merges, special, level, level)


def document_text(
    vocab: dict[str, int],
    merges: list[str],
    special: list[tuple[str, int]],
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
) -> str:
    """The text of tokenizer.json, written here so that it does not depend on a library version."""
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
        "merges": merges,
    }
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special_token(name, i) for name, i in special],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(document, ensure_ascii=False)


def special_token(name: str, token_id: int) -> dict[str, Any]:
    """One entry of "added_tokens"."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": name, **flags, "special": True}


def with_special_tokens(text: str, ids: Mapping[str, int]) -> str:
    """The text of a tokenizer.json in which these tokens are special; new ones are added."""
    document = json.loads(text)
    added = document.get("added_tokens") or []
    by_name = {token["content"]: token for token in added}
    for name, i in ids.items():
        if name in by_name:
            by_name[name]["special"] = True
        else:
            added.append(special_token(name, i))
    document["added_tokens"] = sorted(added, key=lambda token: token["id"])
    return json.dumps(document, ensure_ascii=False)


def tables_in(folder: Path) -> tuple[Path, Path]:
    """The vocabulary and merges files in `folder`, under either of their two names."""
    for names in _TABLES:
        if all((folder / name).is_file() for name in names):
            return folder / names[0], folder / names[1]
    raise FileNotFoundError(
        f"{folder}: no tokenizer here; expected tokenizer.json, or encoder.json and vocab.bpe, "
        "or vocab.json and merges.txt"
    )


def find_gpt2() -> tuple[Path, Path]:
    """GPT-2's two files: $GPTSMITH_DATA/gpt2_bpe, else the Hugging Face cache, else the Hub."""
    data = os.environ.get("GPTSMITH_DATA")
    if data and (Path(data) / "gpt2_bpe").is_dir():
        return tables_in(Path(data) / "gpt2_bpe")
    try:
        from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

        paths = [try_to_load_from_cache(_GPT2, name) for name in _TABLES[1]]
        if not all(isinstance(path, str) for path in paths):
            # without a network this fails at once; hf_hub_download would retry for 24 seconds
            HfApi().model_info(_GPT2, timeout=10)
            paths = [hf_hub_download(_GPT2, name) for name in _TABLES[1]]
    except Exception as error:  # not installed, no network, no account, a full disk ...
        raise ValueError(
            "GPT-2's tokenizer is neither in $GPTSMITH_DATA/gpt2_bpe nor in the Hugging Face cache"
            f" nor on the Hub ({type(error).__name__}): put its encoder.json and vocab.bpe into a"
            " folder gpt2_bpe and set GPTSMITH_DATA to the folder above it, or learn a tokenizer"
            " from your text: --tokenizer bpe"
        ) from None
    vocab, merges = (Path(str(path)) for path in paths)
    return vocab, merges


def read_tables(vocab_path: Path, merges_path: Path) -> tuple[dict[str, int], list[str]]:
    """Vocabulary {piece: id} and merges ["left right", ...] from encoder.json and vocab.bpe.

    ValueError naming file and line when one of them is malformed.
    """
    vocab = files.read_json(vocab_path)
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError(f"{vocab_path}: expected one JSON object {{token: id}}")
    merges = []
    lines = files.read_text(merges_path).replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise ValueError(f"{merges_path}, line {number}: expected two tokens, got {line!r}")
        for piece in (left, right, left + right):
            if piece not in vocab:
                raise ValueError(f"{merges_path}, line {number}: {piece!r} is not in {vocab_path}")
        merges.append(f"{left} {right}")
    return vocab, merges
