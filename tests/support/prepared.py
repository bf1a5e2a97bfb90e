"""Prepared corpora for tests."""

from pathlib import Path

import numpy as np
from tables import write

from gptsmith.data.options import PrepareConfig
from gptsmith.data.prepare import prepare
from gptsmith.data.shards import Corpus


def run(out: Path, *sources: str | Path, **options: object) -> Corpus:
    """A prepared corpus; characters as bytes unless told otherwise."""
    config = {"tokenizer": "byte", **options}
    return Corpus.open(
        prepare(PrepareConfig(sources=tuple(map(str, sources)), out=out, **config))  # type: ignore[arg-type]
    )


def decoded(corpus: Corpus, split: str) -> list[str]:
    """The documents of a split, the first of which may have begun elsewhere."""
    ids = np.concatenate(getattr(corpus, split))
    return corpus.tokenizer.decode(ids).split("<|endoftext|>")


def write_jsonl(path: Path, texts: list[str]) -> Path:
    return write(path, *({"text": text} for text in texts))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
