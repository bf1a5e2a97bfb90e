"""Encode texts to arrays of ids: by a table of characters, by bytes, or by BPE."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from gptsmith.tokenizer import bpe

Encoder = Callable[[Sequence[str]], list[np.ndarray]]


def fastest_encoder(
    kind: str, vocab: Mapping[str, int], merges: Sequence[str], reference: Encoder
) -> Encoder:
    """The fastest encoder that is exact for a tokenizer.

    vocab: without special tokens. reference: an encoder that is exact for any text, but slow.
    """
    if kind == "char":
        return CharacterEncoder(vocab)
    if kind == "byte":
        return lambda texts: [np.frombuffer(text.encode(), np.uint8) for text in texts]
    # GPT-2's table was recognized by its digest; a test checks this condition for it.
    if kind != "gpt2" and not (kind == "bpe" and bpe.tiktoken_is_exact(vocab, merges)):
        return reference
    fast = bpe.FastEncoder(bpe.ranks(vocab, merges))

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        if all(map(fast.accepts, texts)):
            return fast(texts)
        return [(fast if fast.accepts(text) else reference)([text])[0] for text in texts]

    return encode


class CharacterEncoder:
    """Encodes by a table over code points; ValueError naming an unknown character."""

    def __init__(self, vocab: Mapping[str, int]) -> None:
        """vocab: the id of each character, without special tokens."""
        self._size = len(vocab)
        points = {ord(character): i for character, i in vocab.items()}
        # -1 for unknown ones; the last entry is for all higher code points
        self._id_of_point = np.full(max(points) + 2, -1, np.int32)
        self._id_of_point[list(points)] = list(points.values())

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        ids = self._id_of_point[np.minimum(points, len(self._id_of_point) - 1)]
        if len(ids) and ids.min() < 0:
            offset = int(np.argmin(ids))
            raise ValueError(
                f"character {text[offset]!r} at offset {offset} is not one of the "
                f"{self._size} of this tokenizer: make it from "
                "text that contains it, or use a byte or bpe tokenizer"
            )
        return ids


def check_no_surrogates(texts: Sequence[str]) -> None:
    """ValueError naming the first lone surrogate in one of the texts."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has a lone surrogate U+{ord(text[error.start]):04X} at offset "
                f"{error.start}, which UTF-8 cannot represent: its source was not UTF-8"
            ) from None


def require_text(texts: Iterable[str]) -> Iterator[str]:
    """Yield the training texts of a tokenizer; ValueError if all of them are empty."""
    empty = True
    for text in texts:
        check_no_surrogates([text])
        empty = empty and not text
        yield text
    if empty:
        raise ValueError("no text to train a tokenizer on: the sources are empty")
