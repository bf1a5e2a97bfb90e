"""Text to ids, one per character."""

from collections.abc import Mapping, Sequence

import numpy as np


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
