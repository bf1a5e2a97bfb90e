"""Any text as one stream of tokens in memory, for measuring on what was never prepared."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gptsmith.data.documents import Reader
from gptsmith.data.sources import open_source
from gptsmith.tokenizer import Tokenizer


def text_stream(source: str, tokenizer: Tokenizer, reader: Reader) -> np.ndarray:
    """The ids of all documents of a source (as `prepare` takes it), each behind <|endoftext|> (or
    what the tokenizer has texts begin with), so that every token has one before it and is scored.

    ValueError, FileNotFoundError as from open_source, and ValueError for a source without text or
    one that holds ids.
    """
    parts = list(_parts(source, tokenizer, reader))
    if not parts:
        raise ValueError(f"{source}: no text in it")
    return np.concatenate(parts)


def _parts(name: str, tokenizer: Tokenizer, reader: Reader) -> Iterator[np.ndarray]:
    source = open_source(name, reader)
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
