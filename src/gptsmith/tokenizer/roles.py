"""The roles of special tokens: which begin a text, end it, pad, or stand for unknown text.

A tokenizer.json lists its special tokens but not their roles. The roles are in other files of a
model (tokenizer_config.json, config.json, generation_config.json); runs and corpora keep them in
special_tokens.json. Where no file defines them, they are inferred from known spellings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptsmith import files

ROLES_FILE = "special_tokens.json"
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
CLEAN_UP = "clean_up_tokenization_spaces"

# Known spellings of the token that ends a document (gptsmith, GPT-2, Qwen; Llama 3; Llama 2 and
# Mistral; Gemma; DeepSeek), of the one that begins it, and of padding.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
_BEGINNINGS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<｜begin▁of▁sentence｜>")
_PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>")
_SPELLINGS = {"bos_token": _BEGINNINGS, "eos_token": _ENDS, "pad_token": _PADS}
# Defaults of transformers' classes for what tokenizer_config.json omits.
_CLASS_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
}


@dataclass(frozen=True)
class TokenRoles:
    """What a model's files declare about its special tokens, in transformers' terms.

    tokenizer    bos_token, eos_token, pad_token, unk_token of tokenizer_config.json: names
    config       bos_token_id, eos_token_id, pad_token_id of config.json: ids or lists of ids
    generation   all of generation_config.json; None if there is no such file
    """

    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path) -> TokenRoles | None:
        """The roles declared in a folder, by special_tokens.json or a transformers model's files.

        None if nothing is declared. ValueError naming file and value for what is not a token.
        """
        if (path := folder / ROLES_FILE).is_file():
            stored = _read_object(path)
            parts = [stored.get(name) or {} for name in ("tokenizer", "config", "generation")]
            if not all(isinstance(part, dict) for part in parts):
                raise ValueError(f"{path}: expected objects tokenizer, config and generation")
            given = parts[2] if stored.get("generation") is not None else None
            return cls(_names(parts[0]), _ids(parts[1], path), given and _ids(given, path))
        own, model = folder / "tokenizer_config.json", folder / "config.json"
        config, tokenizer = _read_object(model), _read_object(own)
        kind = str(tokenizer.get("tokenizer_class") or "").removesuffix("Fast")
        if not kind and config.get("model_type") in ("gpt2", "qwen2", "qwen3"):
            kind = "GPT2Tokenizer" if config["model_type"] == "gpt2" else "Qwen2Tokenizer"
        names = {
            **_CLASS_DEFAULTS.get(kind, {}),
            **_names(_read_object(folder / "special_tokens_map.json")),
            **_names(tokenizer),
        }
        path = folder / "generation_config.json"
        generation = _ids(_read_object(path), path) if path.is_file() else None
        ids = {name: value for name, value in _ids(config, model).items() if name in IDS}
        declared = [*names.values(), *ids.values(), *((generation or {}).get(name) for name in IDS)]
        if all(value is None for value in declared):
            return None
        if tokenizer.get(CLEAN_UP):
            names[CLEAN_UP] = True
        for name in ("transformers_version", "_from_model_config"):
            (generation or {}).pop(name, None)
        return cls(names, ids, generation)

    def to_json(self) -> str:
        stored = {"tokenizer": self.tokenizer, "config": self.config, "generation": self.generation}
        return json.dumps(stored, ensure_ascii=False, indent=2, sort_keys=True) + "\n"

    @property
    def names(self) -> dict[str, str]:
        """Token names by role, without roles that no token has."""
        return {role: self.tokenizer[role] for role in NAMES if self.tokenizer.get(role)}

    def restricted_to(self, vocab: Mapping[str, int], size: int) -> tuple[TokenRoles, list[str]]:
        """The roles without tokens that do not exist, and a note for each one dropped.

        vocab: the tokenizer's tokens. size: its number of ids.
        """
        notes: list[str] = []
        names = dict(self.tokenizer)
        for role in NAMES:
            if (name := names.get(role)) is not None and name not in vocab:
                names[role] = None
                if name not in _defaults(role):
                    notes.append(f"{role} {name!r:.60} is not one of the tokenizer's tokens")

        def known(given: Mapping[str, Any], file: str) -> dict[str, Any]:
            ids = dict(given)
            for name in IDS:
                found = as_ids(ids.get(name))
                kept = [i for i in found if 0 <= i < size]
                if kept != found:
                    ids[name] = kept or None
                    beyond = next(i for i in found if i not in kept)
                    notes.append(
                        f"{file} has {name} {beyond}, beyond the tokenizer's {size:,} tokens: "
                        "ignored"
                    )
            return ids

        generation = self.generation
        if generation is not None:
            generation = known(generation, "generation_config.json")
        return TokenRoles(names, known(self.config, "config.json"), generation), notes

    def with_eos(self, names: Sequence[str], ids: Sequence[int]) -> TokenRoles:
        """The same roles, except that these tokens end a text; the first becomes eos_token."""
        given = {"eos_token_id": list(ids) if len(ids) > 1 else ids[0]}
        generation = None if self.generation is None else {**self.generation, **given}
        tokenizer = {**self.tokenizer, "eos_token": names[0]}
        config = {**(self.config or dict.fromkeys(IDS)), **given}
        return TokenRoles(tokenizer, config, generation)

    def ids(self, name: str) -> list[int]:
        """Ids of a field, from generation_config.json or else config.json."""
        return as_ids((self.generation or {}).get(name)) or as_ids(self.config.get(name))


def fingerprint(tokenizer: bytes, roles: bytes | None) -> str:
    """sha256 of tokenizer.json's contents and, if there is one, of special_tokens.json's."""
    return hashlib.sha256(tokenizer if roles is None else tokenizer + b"\0" + roles).hexdigest()


def stored_fingerprint(folder: Path) -> str:
    """The fingerprint of the tokenizer in a run or corpus, without parsing it."""
    roles = folder / ROLES_FILE
    return fingerprint(
        (folder / "tokenizer.json").read_bytes(), roles.read_bytes() if roles.is_file() else None
    )


def roles_from_spelling(special: Iterable[str]) -> TokenRoles:
    """The roles of those special tokens whose spelling is known."""
    found = set(special)
    names = {
        role: next((name for name in known if name in found), None)
        for role, known in _SPELLINGS.items()
    }
    return TokenRoles(names)


def as_ids(value: Any) -> list[int]:
    """The value of an id field (an id, a list of ids, or null) as a list."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _defaults(role: str) -> set[str]:
    return {names[role] for names in _CLASS_DEFAULTS.values() if role in names}


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file or it holds something else."""
    found = files.read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Token names by role."""
    names: dict[str, Any] = {role: token_text(given[role]) for role in NAMES if role in given}
    if given.get(CLEAN_UP) is True:
        names[CLEAN_UP] = True
    return names


def token_text(token: Any) -> str | None:
    """The text of a token that is given as a string or as an AddedToken object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _ids(given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    for name in IDS:
        if any(type(i) is not int for i in as_ids(given.get(name))):
            raise ValueError(
                f"{path}: {name} is {given[name]!r:.60}, expected a token's id or a list of ids"
            )
    return dict(given)
