"""Tokenizers: GPT-2's vocabulary, trained BPE, characters, bytes, and any tokenizer.json.

All kinds share one class and one file format, `tokenizer.json` of Hugging Face `tokenizers`.
`encode` treats its input as plain text: "<|end|>" typed by a user is seven characters, not the
special token (split_special_tokens=True in transformers). Only chat templates write special ids.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from gptsmith import files
from gptsmith.arguments import check_several, token_ids
from gptsmith.tokenizer import bpe
from gptsmith.tokenizer.encoders import Encoder, check_no_surrogates, fastest_encoder, require_text
from gptsmith.tokenizer.formats import (
    ENDOFTEXT,
    byte_level_text,
    document_text,
    find_gpt2,
    read_tables,
    recognize,
    tables_in,
    with_special_tokens,
)
from gptsmith.tokenizer.reference import ReferenceTokenizer
from gptsmith.tokenizer.roles import ROLES_FILE, TokenRoles, fingerprint, roles_from_spelling
from gptsmith.tokenizer.special_ids import SpecialIds
from gptsmith.tokenizer.stream import TokenStream

SPECIAL_TOKENS = (ENDOFTEXT, "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

_TOKENIZER_FILE = "tokenizer.json"
_MAX_BYTES = 64 << 20  # of a tokenizer.json; Gemma's has 33 million
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


class Tokenizer:
    """An immutable tokenizer: the text of its tokenizer.json, and the roles of its special tokens.

    kind            "gpt2", "bpe" (byte-level with GPT-2's split), "char", "byte" or "other"
    vocab           {token: id}, including special tokens
    vocab_size      ids are 0..vocab_size-1
    special_tokens  {literal: id}
    roles           which special tokens begin and end a text, pad ...; by spelling if undeclared
    declared_roles  the same; None if no file declares them
    notes           declarations of its files that cannot be used, for the user
    fingerprint     sha256 of the text of tokenizer.json, and of the declared roles
    dtype           the smaller of uint16 and uint32 that holds every id
    """

    def __init__(
        self,
        text: str,
        origin: str | Path = "tokenizer.json",
        roles: TokenRoles | None = None,
    ) -> None:
        """roles: as declared by the model's files. ValueError naming `origin` if `text` is not a
        tokenizer.json."""
        document = files.parse_json(text, origin)
        if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
            raise ValueError(f'{origin}: not a tokenizer.json of `tokenizers` (no "model")')
        self._text = text
        steps = {name: document.get(name) for name in _STEPS}
        self._steps = {name: step if isinstance(step, dict) else {} for name, step in steps.items()}
        self._origin = str(origin)
        self.kind, self._merges = recognize(document)
        if self.kind == "other":
            special = self._reference.special
            self.vocab: Mapping[str, int] = self._reference.vocab
        else:
            special = {
                token["content"]: token["id"] for token in document.get("added_tokens") or []
            }
            self.vocab = document["model"]["vocab"] | special
        if not self.vocab:
            raise ValueError(f"{origin}: the tokenizer has no tokens")
        self.special_tokens: dict[str, int] = dict(sorted(special.items(), key=lambda t: t[1]))
        self.vocab_size = max(self.vocab.values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.declared_roles: TokenRoles | None = None
        self.notes: list[str] = []
        if roles is not None:
            self.declared_roles, self.notes = roles.restricted_to(self.vocab, self.vocab_size)
        self.roles = self.declared_roles or roles_from_spelling(self.special_tokens)
        declared = None if self.declared_roles is None else self.declared_roles.to_json().encode()
        self.fingerprint = fingerprint(text.encode(), declared)

    @classmethod
    def gpt2(cls, folder: str | Path | None = None) -> "Tokenizer":
        """GPT-2's 50257 tokens, from encoder.json + vocab.bpe or vocab.json + merges.txt.

        Without a folder: $GPTSMITH_DATA/gpt2_bpe, else the Hugging Face cache or Hub.
        """
        vocab_path, merges_path = tables_in(Path(folder)) if folder else find_gpt2()
        vocab, merges = read_tables(vocab_path, merges_path)
        tokenizer = cls(byte_level_text(vocab, merges), vocab_path)
        if tokenizer.kind != "gpt2" or tokenizer.vocab_size != 50257:
            raise ValueError(
                f"{vocab_path}, {merges_path}: not GPT-2's tables ({len(vocab)} tokens and "
                f"{len(merges)} merges, expected 50257 and 50000); for another tokenizer use load"
            )
        return tokenizer

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE with GPT-2's split; <|endoftext|> is the last of at most vocab_size ids.

        Fewer ids if no further pair occurs twice in the text.
        """
        check_several(texts, "texts")
        if vocab_size < 257:
            raise ValueError(f"vocab_size {vocab_size} is less than 257: 256 bytes and {ENDOFTEXT}")
        vocab, merges = bpe.train(require_text(texts), vocab_size - 1)
        return cls(byte_level_text(vocab | {ENDOFTEXT: len(vocab)}, merges))

    @classmethod
    def char(cls, texts: Iterable[str]) -> "Tokenizer":
        """One id per character of the texts, in code point order, then <|endoftext|>."""
        seen: set[str] = set()
        for text in require_text(texts):
            seen.update(text)
        vocab = {character: i for i, character in enumerate(sorted(seen))}
        # BPE without merges and without a split: `tokenizers` then splits text into characters and
        # joins them without separators, so white space is kept.
        return cls(document_text(vocab, [], [(ENDOFTEXT, len(vocab))], None, {"type": "Fuse"}))

    @classmethod
    def byte(cls) -> "Tokenizer":
        """The 256 bytes of UTF-8, each its own id, then <|endoftext|>."""
        vocab = {character: byte for byte, character in enumerate(bpe.byte_alphabet())}
        return cls(byte_level_text(vocab | {ENDOFTEXT: 256}, [], use_regex=False))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """A tokenizer.json, or the folder that holds it (or holds vocab.json and merges.txt).

        The other files in its folder tell the roles of special tokens (see TokenRoles.read).
        """
        path = Path(path)
        if path.is_dir() and not (path / _TOKENIZER_FILE).exists():
            vocab_path, merges_path = tables_in(path)
            text = byte_level_text(*read_tables(vocab_path, merges_path))
            return cls(text, vocab_path, TokenRoles.read(path))
        path = path / _TOKENIZER_FILE if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: no such file; expected a tokenizer.json or the folder that holds one"
            )
        if not path.is_file():
            raise ValueError(f"{path}: not a regular file; expected a tokenizer.json")
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ValueError(f"{path}: {size:,} bytes, more than the {_MAX_BYTES:,} allowed")
        roles = TokenRoles.read(path.parent) if path.name == _TOKENIZER_FILE else None
        return cls(files.read_text(path), path, roles)

    def save(self, path: str | Path) -> Path:
        """Write tokenizer.json durably to `path`, or into it if it is a folder; beside it,
        special_tokens.json where the roles of special tokens are declared."""
        path = Path(path)
        path = path / _TOKENIZER_FILE if path.is_dir() else path
        if path.name != _TOKENIZER_FILE:
            files.write_text(path, self._text)
            return path
        if self.declared_roles is None:
            path.with_name(ROLES_FILE).unlink(missing_ok=True)
        for name, text in self.contents().items():
            files.write_text(path.with_name(name), text)
        return path

    def contents(self) -> dict[str, str]:
        """The files that `save` writes, in their order."""
        roles = {} if self.declared_roles is None else {ROLES_FILE: self.declared_roles.to_json()}
        return {**roles, _TOKENIZER_FILE: self._text}

    def to_json(self) -> str:
        return self._text

    @cached_property
    def special_ids(self) -> SpecialIds:
        """Ids by role, and those that are added before and after a text."""
        if self._steps["post_processor"]:
            assert self._reference is not None  # opening it raises if it is malformed
        return SpecialIds.of(
            self.roles, self.vocab, self.special_tokens, self._steps["post_processor"]
        )

    @property
    def eos_id(self) -> int:
        """The token that ends a text; ValueError if no file names it."""
        if self.special_ids.eos is None:
            raise ValueError(
                f"{self._origin}: nothing says which token ends a text; special tokens are "
                f"{list(self.special_tokens)[:10]}: name it with --eos-token, of import and prepare"
            )
        return self.special_ids.eos

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids that the file's post-processor puts before a text (Llama's <|begin_of_text|>)."""
        return self.special_ids.prefix

    def with_eos(self, names: Sequence[str]) -> "Tokenizer":
        """The same tokenizer, except that these tokens are special and end a text.

        ValueError for a name that is not one of its tokens.
        """
        for name in names:
            if name not in self.vocab:
                raise ValueError(f"--eos-token {name!r:.60} is not a token of {self._origin}")
        ids = {name: self.vocab[name] for name in names}
        new = any(name not in self.special_tokens for name in names)
        text = with_special_tokens(self._text, ids) if new else self._text
        roles = self.roles.with_eos(names, list(ids.values()))
        return Tokenizer(text, self._origin, roles)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`; ValueError for a lone surrogate or an unknown character.

        By default all of it is plain text. allow_special: spelled-out special tokens become their
        ids. Use this only for text that you wrote yourself; text from a user or a corpus could end
        a message or start one in another role.
        """
        if not allow_special or not self.special_tokens:
            return self.encode_array(text).tolist()
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        encoded = iter(self.encode_batch(parts[::2]))
        ids = next(encoded)
        for name, plain in zip(parts[1::2], encoded, strict=True):
            ids += [self.special_tokens[name], *plain]
        return ids

    def prompt(self, text: str) -> list[int]:
        """Ids to generate from: the prefix and the text or, if both are empty, the start token."""
        ids = [*self.prefix, *self.encode(text)] or [*self.special_ids.start_ids]
        if not ids:
            raise ValueError(
                f"an empty text, and nothing says which token of {self._origin} starts one: "
                "give some text, or import the model again with --eos-token NAME"
            )
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        return self.encode_arrays([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of `dtype` per text; the fastest way, because short texts share one call."""
        check_several(texts, "texts")
        try:
            return [ids.astype(self.dtype, copy=False) for ids in self._encoder(texts)]
        except UnicodeEncodeError:
            check_no_surrogates(texts)
            raise

    def decode(self, ids: Iterable[int]) -> str:
        """Text of any ids; special tokens as spelled, invalid UTF-8 as U+FFFD."""
        if self.has_fixed_bytes:
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        checked = self._checked(ids)
        return self._reference.decode(checked)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of any sequence of ids; ValueError for an id outside the vocabulary."""
        if not self.has_fixed_bytes:
            return self.decode(ids).encode()
        pieces = self._pieces
        return b"".join([pieces[i] for i in self._checked(ids)])

    def piece(self, token_id: int) -> bytes:
        """decode_bytes of a single id, of a tokenizer that `has_fixed_bytes`: a server asks for it
        with each token."""
        if not 0 <= token_id < len(self._pieces):
            raise ValueError(f"token id {token_id} is outside 0..{self.vocab_size - 1}")
        return self._pieces[token_id]

    def stream(self, prompt: Sequence[int] = ()) -> TokenStream:
        """A stream that decodes ids one at a time, as the continuation of a prompt."""
        return TokenStream(self, prompt)

    def add_special_tokens(self, names: Iterable[str]) -> "Tokenizer":
        """A new tokenizer with `names` added after the existing ids; existing ones keep theirs."""
        check_several(names, "names")
        added: dict[str, int] = {}
        for name in dict.fromkeys(names):
            if not name or (name in self.vocab and name not in self.special_tokens):
                raise ValueError(f"special token {name!r} is empty or already an ordinary token")
            if name not in self.special_tokens:
                added[name] = self.vocab_size + len(added)
        if not added:
            return self
        text = with_special_tokens(self._text, added)
        tokenizer = Tokenizer(text, self._origin, self.declared_roles)
        if tokenizer.vocab_size != self.vocab_size + len(added):
            raise ValueError(
                f"{self._origin}: its ids have gaps, which `tokenizers` would fill; "
                f"new tokens cannot be added at {self.vocab_size}"
            )
        return tokenizer

    def token_bytes(self) -> np.ndarray | None:
        """Bytes of text of each id, int32 (V,), 0 for special tokens; None where ids do not stand
        for fixed bytes."""
        if not self.has_fixed_bytes:
            return None
        lengths = np.array([len(piece) for piece in self._pieces], np.int32)
        lengths[list(self.special_tokens.values())] = 0
        return lengths

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str, str, TokenRoles | None]]:
        return Tokenizer, (self._text, self._origin, self.declared_roles)

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size})"

    @cached_property
    def _reference(self) -> ReferenceTokenizer:
        """The file as `tokenizers` reads it: slower, but correct for every file."""
        return ReferenceTokenizer(self._text, json.loads(self._text), self._origin)

    @cached_property
    def has_fixed_bytes(self) -> bool:
        """Whether each id stands for fixed bytes. False for foreign files that, for example,
        drop the first space of a text (SentencePiece) or insert spaces between words (BERT)."""
        if self.kind != "other":
            return True
        return bool(self._steps["decoder"].get("type") == "ByteLevel")

    @cached_property
    def keeps_bytes(self) -> bool:
        """Whether the bytes of a text's ids are its UTF-8 bytes: nothing normalized or added."""
        before = self._steps["pre_tokenizer"]
        steps = before.get("pretokenizers") or [before]
        spaced = any(step.get("add_prefix_space") for step in steps)
        return self.has_fixed_bytes and not self._steps["normalizer"] and not spaced

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of single bytes, which the decoder combines into characters (SentencePiece)."""
        if '"ByteFallback"' not in json.dumps(self._steps["decoder"]):
            return frozenset()
        return frozenset(i for p, i in self.vocab.items() if re.fullmatch("<0x[0-9A-F]{2}>", p))

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of each id; special tokens as spelled."""
        special = set(self.special_tokens.values())
        pieces = [b""] * self.vocab_size
        for piece, i in self.vocab.items():
            pieces[i] = piece.encode()
            if self.kind != "char" and i not in special:
                with suppress(KeyError):  # a token added as plain text, such as a run of spaces
                    pieces[i] = bpe.to_bytes(piece)
        return pieces

    def _checked(self, ids: Iterable[int]) -> list[int]:
        numbers = token_ids(ids)
        if numbers and not (min(numbers) >= 0 and max(numbers) < self.vocab_size):
            bad = next(i for i in numbers if not 0 <= i < self.vocab_size)
            raise ValueError(f"token id {bad} is outside 0..{self.vocab_size - 1}")
        return numbers

    @cached_property
    def _encoder(self) -> Encoder:
        vocab = {p: i for p, i in self.vocab.items() if p not in self.special_tokens}
        return fastest_encoder(self.kind, vocab, self._merges, self._encode_by_reference)

    def _encode_by_reference(self, texts: Sequence[str]) -> list[np.ndarray]:
        check_no_surrogates(texts)
        return self._reference.encode(texts)
