"""Raw text to token shards: `gptsmith prepare SOURCE... --out data/NAME`."""

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from gptsmith import files
from gptsmith.data.build import FRAME, Build, cores, cut_frames, encode, encode_in_order
from gptsmith.data.destination import (
    JOURNAL,
    MANIFEST,
    Identity,
    begin_journal,
    choose_folder,
    clear,
    open_journal,
    replace,
    replacement,
)
from gptsmith.data.documents import Document, Source
from gptsmith.data.options import PrepareConfig, ReadOptions
from gptsmith.data.progress import PrepareProgress
from gptsmith.data.report import ReadReport
from gptsmith.data.selection import Selection
from gptsmith.data.shards import FORMAT, fingerprint
from gptsmith.data.sources import open_source
from gptsmith.data.text_files import CHUNK_BYTES
from gptsmith.data.tokenized import tokenized_documents
from gptsmith.data.vocabulary import given_tokenizer, learn
from gptsmith.tokenizer import Tokenizer


def prepare(config: PrepareConfig) -> Path:
    """Make the corpus that `config` describes; its folder.

    Killed and called again, it goes on, and the files become the same byte for byte. ValueError,
    FileNotFoundError or FileExistsError, in one line, for what the user can mend; a corpus that is
    in the folder already is then untouched, and nothing of the new one is left.
    """
    started = time.monotonic()
    separator = config.document_separator
    options = ReadOptions(
        text_column=config.text_column,
        document_separator=separator and separator.replace("\\n", "\n").replace("\\t", "\t"),
    )
    report = ReadReport(config.on_error)
    sources = [open_source(asked, options, report) for asked in config.sources]
    val = open_source(config.val, options, report) if config.val is not None else None
    opened = [*sources, val] if val else sources
    given = given_tokenizer(config.tokenizer, config.vocab_size, opened)
    paths = [path for source in opened for path in source.files]
    total = 0
    for path in paths:
        report.starts[path] = total
        total += path.stat().st_size
    identity = _identity(config, opened, given)
    _tell(opened)
    folder = choose_folder(config.out, identity, paths, overwrite=config.overwrite)
    if folder is None:
        _say(f"{config.out}: this corpus is there already; nothing to do")
        if left := replacement(config.out):
            _say(f"{left} would have replaced it: --overwrite goes on with that, or remove it")
        return config.out
    selection = Selection(
        sources,
        val,
        lambda source: _documents(source, given, report),
        val_fraction=config.val_fraction,
        max_documents=config.max_documents,
        deduplicate=config.deduplicate,
    )
    with files.lock(folder, "or choose another --out"):
        journal = open_journal(folder, identity)
        try:
            manifest = _make(config, folder, selection, report, total, given, identity, journal)
        except ValueError:
            clear(folder)
            raise
        if folder != config.out:
            replace(config.out, folder)
    _say(_summary(config.out, manifest, time.monotonic() - started))
    return config.out


def _documents(source: Source, given: Tokenizer | None, report: ReadReport) -> Iterator[Document]:
    if source.layout is None:
        return source.documents()
    assert given is not None
    return tokenized_documents(source.files, source.layout, given.eos_id, given.vocab_size, report)


def _make(
    config: PrepareConfig,
    folder: Path,
    selection: Selection,
    report: ReadReport,
    total: int,
    given: Tokenizer | None,
    identity: Identity,
    journal: dict[str, Any] | None,
) -> dict[str, Any]:
    """Tokenizer, shards and manifest in `folder`, from the beginning or as the journal says."""
    if journal is None:
        tokenizer = given or learn(config.tokenizer, config.vocab_size, selection, total)
        tokenizer.save(folder)
    else:
        tokenizer = given or Tokenizer.load(folder)
    token_bytes = tokenizer.token_bytes()
    report.skipped.clear()

    def left_out() -> dict[str, int]:
        return report.skipped.counts() | (
            {"duplicate": selection.duplicates} if config.deduplicate else {}
        )

    start_build = partial(
        Build,
        folder,
        tokenizer,
        token_bytes,
        shard_tokens=config.shard_tokens,
        max_tokens=config.max_tokens,
        identity=identity,
    )
    try:
        build = start_build(state=(journal or {}).get("state"))
    except (ValueError, FileNotFoundError) as error:  # a finished part was damaged or removed
        _say(f"{error}; beginning anew")
        begin_journal(folder, identity)
        tokenizer.save(folder)
        build = start_build(state=None)
    if build.frames:
        _say(f"going on after {build.totals[1]:,} tokens")
    frames = cut_frames(selection, whole=tokenizer.kind == "other", left_out=left_out)
    todo = islice(frames, build.frames, None)
    encode_one = partial(encode, tokenizer=tokenizer, token_bytes=token_bytes)
    with (
        closing(build),
        closing(encode_in_order(todo, encode_one, config.workers or cores())) as encoded,
        PrepareProgress(total) as progress,
    ):
        for frame, tokens in encoded:
            if build.full:
                break
            build.write(frame, tokens)
            progress.update(report.position, *build.totals)
        else:
            build.left_out = left_out()
        progress.update(total or report.position, *build.totals)
        for hint in report.hints:
            _say(hint)
        _check(config, build, selection)
        splits = build.finish()
    manifest = {
        "format": FORMAT,
        "name": config.out.absolute().name,
        "fingerprint": "",
        "dtype": tokenizer.dtype.name,
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "fingerprint": tokenizer.fingerprint,
        },
        "splits": splits,
        "validation": "; ".join(selection.rules),
        "left_out": build.left_out,
        "settings": identity["settings"],
        "sources": identity["sources"],
    }
    manifest["fingerprint"] = fingerprint(manifest)
    files.write_json(folder / MANIFEST, manifest)
    (folder / JOURNAL).unlink()
    return manifest


def _check(config: PrepareConfig, build: Build, selection: Selection) -> None:
    """ValueError if a split is empty."""
    train, val = build.tokens("train"), build.tokens("val")
    where = " ".join(config.sources)
    dropped = ", ".join(f"{count} {kind}" for kind, count in build.left_out.items() if count)
    if not train and not val:
        raise ValueError(f"{where}: no documents" + (f" (left out: {dropped})" if dropped else ""))
    if not val:
        raise ValueError(
            f"{where}: nothing is left for validation, which gets {'; '.join(selection.rules)}; "
            "give more text, a larger --val-fraction, or --val FILE"
        )
    if not train:
        raise ValueError(
            f"{where}: nothing is left for training, validation gets {'; '.join(selection.rules)}; "
            "give more text, or smaller --shard-tokens"
        )


def _identity(config: PrepareConfig, sources: list[Source], given: Tokenizer | None) -> Identity:
    """What must be equal for an unfinished corpus to be gone on with, or a finished one to do."""

    def about(source: Source) -> dict[str, Any]:
        sizes = [(path.name, path.stat().st_size) for path in source.files]
        return {
            "asked": source.asked,
            "used": source.used,
            "passed": list(source.passed),
            "rows": None if source.layout is None else str(source.layout),
            "files": len(sizes),
            "bytes": sum(size for _, size in sizes),
            "listing": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
        }

    settings = config.model_dump(mode="json", exclude={"out", "overwrite", "workers"})
    times = [(str(path), path.stat().st_mtime_ns) for source in sources for path in source.files]
    return {
        "settings": settings | {"given_tokenizer": given.fingerprint if given else None},
        "sources": [about(source) for source in sources],
        "seen": hashlib.sha256(json.dumps([FRAME, CHUNK_BYTES, times]).encode()).hexdigest(),
    }


# --- words ---------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _tell(sources: list[Source]) -> None:
    for source in sources:
        for reason in source.passed:
            _say(f"not used: {reason}")
        if source.passed or source.layout is not None:
            layout = f" ({source.layout})" if source.layout is not None else ""
            _say(f"{source.asked}: {source.used}{layout} is used")


def _summary(out: Path, manifest: dict[str, Any], seconds: float) -> str:
    lines = [
        f"{out}: {split} {r['tokens']:,} tokens in {len(r['shards'])} shard(s), "
        f"{r['documents']:,} document(s), {r['bytes'] / 1e6:,.1f} MB"
        for split, r in manifest["splits"].items()
    ]
    text = sum(r["bytes"] for r in manifest["splits"].values())
    tokens = sum(r["tokens"] for r in manifest["splits"].values())
    lines.append(
        f"{out}: vocabulary {manifest['tokenizer']['vocab_size']:,}, "
        f"{text / tokens:.2f} bytes per token; validation: {manifest['validation']}"
    )
    dropped = [f"{count} {kind}" for kind, count in manifest["left_out"].items() if count]
    if dropped:
        lines.append(f"{out}: left out {', '.join(dropped)}")
    return "\n".join([*lines, f"{out}: done in {seconds:.1f} s"])
