"""Text to token ids and back: GPT-2's vocabulary, trained BPE, characters, bytes, other files.

One class and one file format, `tokenizer.json` of Hugging Face `tokenizers`, for every kind.
`encode` treats its text as plain text: "<|end|>" typed by a user is seven characters and not the
special token (split_special_tokens=True in transformers). Chat templates write special ids.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from gptsmith import files
from gptsmith.arguments import check_several
from gptsmith.tokenizer import bpe
from gptsmith.tokenizer.formats import (
    ENDOFTEXT,
    byte_level_text,
    document_text,
    find_gpt2,
    read_tables,
    recognize,
    special_token,
    tables_in,
)
from gptsmith.tokenizer.reference import Reference
from gptsmith.tokenizer.stream import TokenStream

SPECIAL_TOKENS = (ENDOFTEXT, "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# Names of the end of a document (gptsmith, GPT-2, Qwen; Llama 3; Llama 2 and Mistral; Gemma;
# DeepSeek), of its beginning, and of padding: tokenizer.json does not say which tokens they are.
ENDS = (ENDOFTEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
BEGINNINGS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<｜begin▁of▁sentence｜>")
PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>")

Encoder = Callable[[Sequence[str]], list[np.ndarray]]


class Tokenizer:
    """An immutable tokenizer, defined by the text of its tokenizer.json.

    kind            "gpt2", "bpe" (byte-level with GPT-2's split), "char", "byte" or "other"
    vocab_size      ids are 0..vocab_size-1, including special tokens
    special_tokens  {literal: id}
    fingerprint     sha256 of the text of tokenizer.json
    dtype           the smaller of uint16 and uint32 that holds every id
    """

    def __init__(self, text: str, origin: str | Path = "tokenizer.json") -> None:
        """ValueError naming `origin` if `text` is not a tokenizer.json."""
        document = files.parse_json(text, origin)
        if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
            raise ValueError(f'{origin}: not a tokenizer.json of `tokenizers` (no "model")')
        self._text = text
        self._origin = str(origin)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.kind, self._merges = recognize(document)
        if self.kind == "other":
            special = self._reference.special
            self._vocab: Mapping[str, int] = self._reference.vocab
        else:
            special = {
                token["content"]: token["id"] for token in document.get("added_tokens") or []
            }
            self._vocab = document["model"]["vocab"] | special
        if not self._vocab:
            raise ValueError(f"{origin}: the tokenizer has no tokens")
        self.special_tokens: dict[str, int] = dict(sorted(special.items(), key=lambda t: t[1]))
        self.vocab_size = max(self._vocab.values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

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
        vocab, merges = bpe.train(_not_empty(texts), vocab_size - 1)
        return cls(byte_level_text(vocab | {ENDOFTEXT: len(vocab)}, merges))

    @classmethod
    def char(cls, texts: Iterable[str]) -> "Tokenizer":
        """One id per character of the texts, in code point order, then <|endoftext|>."""
        seen: set[str] = set()
        for text in _not_empty(texts):
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
        """A tokenizer.json, or the folder that holds it (or holds vocab.json and merges.txt)."""
        path = Path(path)
        if path.is_dir() and not (path / "tokenizer.json").exists():
            vocab_path, merges_path = tables_in(path)
            return cls(byte_level_text(*read_tables(vocab_path, merges_path)), vocab_path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: not a regular file; expected a tokenizer.json")
        try:
            return cls(path.read_bytes().decode(), path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path}: no such file; expected a tokenizer.json or the folder that holds one"
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, byte {error.start}: not UTF-8 ({error.reason})") from None

    def save(self, path: str | Path) -> Path:
        """Write tokenizer.json durably to `path`, or into it if it is a folder."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        files.write_text(path, self._text)
        return path

    def to_json(self) -> str:
        return self._text

    @property
    def eos_id(self) -> int:
        """The id of <|endoftext|>, or of its equivalent in a foreign tokenizer."""
        for name in ENDS:
            if name in self.special_tokens:
                return self.special_tokens[name]
        raise ValueError(
            f"{self._origin}: no {ENDOFTEXT} among the special tokens "
            f"{list(self.special_tokens)}; add it with add_special_tokens"
        )

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`; ValueError for a lone surrogate or an unknown character.

        By default all of it is plain text. allow_special: the spelling of a special token becomes
        its id. Use that only for text of your own, never for text from a user or a corpus, which
        could end a message or start one in another role.
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
        """Ids to generate from: the prefix that the file adds to every text (Llama's
        <|begin_of_text|>; none in our own kinds) and the text; <|endoftext|> if both are empty."""
        return [*self.prefix, *self.encode(text)] or [self.eos_id]

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """Ids that the post-processor of the file adds before a text."""
        if not json.loads(self._text).get("post_processor"):
            return ()
        bare, whole = self._reference.encode(["a"])[0].tolist(), self._reference.encode_whole("a")
        where = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return tuple(whole[:where])

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
            _refuse_surrogates(texts)
            raise

    def decode(self, ids: Iterable[int]) -> str:
        """Text of any ids; special tokens as spelled, invalid UTF-8 as U+FFFD."""
        if self._exact:
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        checked = self._checked(ids)
        return self._reference.decode(checked)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of any sequence of ids; ValueError for an id outside the vocabulary."""
        if not self._exact:
            return self.decode(ids).encode()
        pieces = self._pieces
        return b"".join([pieces[i] for i in self._checked(ids)])

    def stream(self) -> TokenStream:
        return TokenStream(self)

    def add_special_tokens(self, names: Iterable[str]) -> "Tokenizer":
        """A new tokenizer with `names` added after the existing ids; existing ones keep theirs."""
        check_several(names, "names")
        document = json.loads(self._text)
        added, next_id = document.setdefault("added_tokens", []), self.vocab_size
        for name in dict.fromkeys(names):
            if not name or (name in self._vocab and name not in self.special_tokens):
                raise ValueError(f"special token {name!r} is empty or already an ordinary token")
            if name not in self.special_tokens:
                added.append(special_token(name, next_id))
                next_id += 1
        tokenizer = Tokenizer(json.dumps(document, ensure_ascii=False), self._origin)
        if tokenizer.vocab_size != next_id:
            raise ValueError(
                f"{self._origin}: its ids have gaps, which `tokenizers` would fill; "
                f"new tokens cannot be added at {self.vocab_size}"
            )
        return tokenizer

    def token_bytes(self) -> np.ndarray:
        """Bytes of text of each id, int32 (V,), 0 for special tokens; for bits per byte."""
        lengths = np.array([len(piece) for piece in self._pieces], np.int32)
        lengths[list(self.special_tokens.values())] = 0
        return lengths

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str, str]]:
        return Tokenizer, (self._text, self._origin)

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size})"

    @cached_property
    def _reference(self) -> Reference:
        """The file as `tokenizers` reads it: slower, but correct for every file."""
        return Reference(self._text, json.loads(self._text), self._origin)

    @cached_property
    def _exact(self) -> bool:
        """Whether each id stands for fixed bytes. False for foreign files that, for example,
        drop the first space of a text (SentencePiece) or insert spaces between words (BERT)."""
        if self.kind != "other":
            return True
        return (json.loads(self._text).get("decoder") or {}).get("type") == "ByteLevel"

    @cached_property
    def _pieces(self) -> list[bytes]:
        pieces = [b""] * self.vocab_size
        for piece, i in self._vocab.items():
            pieces[i] = piece.encode() if i in self._special_ids else self._bytes_of(piece)
        return pieces

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    def _bytes_of(self, piece: str) -> bytes:
        if self.kind == "char":
            return piece.encode()
        if self._exact:
            try:
                return bpe.to_bytes(piece)
            except KeyError:  # a token added as plain text, such as a run of spaces
                return piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])  # SentencePiece's byte fallback
        return piece.removeprefix("##").replace("▁", " ").encode()

    def _checked(self, ids: Iterable[int]) -> list[int]:
        numbers = ids.tolist() if isinstance(ids, np.ndarray) else [int(i) for i in ids]
        if numbers and not (min(numbers) >= 0 and max(numbers) < self.vocab_size):
            bad = next(i for i in numbers if not 0 <= i < self.vocab_size)
            raise ValueError(f"token id {bad} is outside 0..{self.vocab_size - 1}")
        return numbers

    @cached_property
    def _encoder(self) -> Encoder:
        if self.kind == "char":
            return self._encode_characters
        if self.kind == "byte":
            return lambda texts: [np.frombuffer(text.encode(), np.uint8) for text in texts]
        vocab = {p: i for p, i in self._vocab.items() if p not in self.special_tokens}
        # GPT-2's own table was recognized by its digest; a test holds it to the same condition.
        ranked = self.kind == "gpt2" or (self.kind == "bpe" and bpe.is_ranked(vocab, self._merges))
        if not ranked:
            return self._encode_by_reference
        fast = bpe.FastEncoder(bpe.ranks(vocab, self._merges))

        def encode(texts: Sequence[str]) -> list[np.ndarray]:
            if all(map(fast.takes, texts)):
                return fast(texts)
            return [
                (fast if fast.takes(text) else self._encode_by_reference)([text])[0]
                for text in texts
            ]

        return encode

    def _encode_by_reference(self, texts: Sequence[str]) -> list[np.ndarray]:
        _refuse_surrogates(texts)
        return self._reference.encode(texts)

    def _encode_characters(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode_one_by_one(text) for text in texts]

    def _encode_one_by_one(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        ids = self._id_of_point[np.minimum(points, len(self._id_of_point) - 1)]
        if len(ids) and ids.min() < 0:
            offset = int(np.argmin(ids))
            raise ValueError(
                f"character {text[offset]!r} at offset {offset} is not one of the "
                f"{len(self._vocab) - len(self.special_tokens)} of this tokenizer: make it from "
                "text that contains it, or use a byte or bpe tokenizer"
            )
        return ids

    @cached_property
    def _id_of_point(self) -> np.ndarray:
        """Id by code point, -1 for unseen ones; its last entry is for all higher code points."""
        points = {ord(c): i for c, i in self._vocab.items() if c not in self.special_tokens}
        table = np.full(max(points) + 2, -1, np.int32)
        table[list(points)] = list(points.values())
        return table


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        _refuse_surrogates([text])
        empty = empty and not text
        yield text
    if empty:
        raise ValueError("no text to train a tokenizer on: the sources are empty")


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has a lone surrogate U+{ord(text[error.start]):04X} at offset "
                f"{error.start}, which UTF-8 cannot represent: its source was not UTF-8"
            ) from None
