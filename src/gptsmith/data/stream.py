"""Any text as one stream of tokens in memory, for measuring on what was never prepared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gptsmith.data.documents import Reader
from gptsmith.data.sources import open_source
from gptsmith.tokenizer import Tokenizer


def text_stream(asked: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """The ids of all documents of the sources, each behind <|endoftext|> (or what the tokenizer has
    texts begin with), so that every token of the text has something before it and is scored.

    ValueError, FileNotFoundError as from open_source, and ValueError for a source without text or
    one that holds ids.
    """
    parts = [part for name in asked for part in _parts(name, tokenizer)]
    if not parts:
        raise ValueError(f"{', '.join(asked)}: no text in it")
    return np.concatenate(parts)


def _parts(name: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    source = open_source(name, Reader())
    if source.layout is not None:
        raise ValueError(f"{source.used}: holds token ids; gptsmith prepare makes a corpus of it")
    begin = np.array(tokenizer.prompt(""), tokenizer.dtype)
    for document in source.documents():
        text = "".join(map(str, document.pieces))  # whole: pieces could cut a word
        try:
            ids = tokenizer.encode_array(text)
        except ValueError as error:
            raise ValueError(f"{document.place}: {error}") from None
        yield from (begin, ids.astype(tokenizer.dtype)) if document.begins else (ids,)
