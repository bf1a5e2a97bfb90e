"""Raw text to token shards: `gptsmith prepare SOURCE... --out data/NAME`.

Documents are divided into training and validation (split), encoded (encode) and appended to shards
(shards). Every few seconds a journal records how many batches the shards hold; resuming cuts the
shards back to that, reads the sources up to that batch without encoding them, and continues.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from gptsmith import files, terminal
from gptsmith.data import output_dir
from gptsmith.data.corpus_writer import CorpusWriter
from gptsmith.data.documents import Document, Source
from gptsmith.data.encode import (
    BATCH_SIZE,
    available_cores,
    encode,
    encode_in_order,
    make_batches,
)
from gptsmith.data.options import PrepareConfig, ReadOptions
from gptsmith.data.output_dir import Identity
from gptsmith.data.report import ReadReport
from gptsmith.data.shards import FORMAT, MANIFEST, UNFINISHED, fingerprint, manifest_digest
from gptsmith.data.sources import open_source
from gptsmith.data.split import DocumentSplit
from gptsmith.data.text_files import CHUNK_BYTES
from gptsmith.data.tokenized import tokenized_documents
from gptsmith.data.vocabulary import given_tokenizer, train_tokenizer
from gptsmith.progress import WorkProgress
from gptsmith.tokenizer import DocumentTokens, Tokenizer


def prepare(config: PrepareConfig) -> Path:
    """Make the corpus that `config` describes; its folder.

    Called again after a kill it resumes, and the files are the same byte for byte. ValueError,
    FileNotFoundError or FileExistsError, in one line, for user errors; a corpus that is in the
    folder already is then unchanged, and nothing of the new one is left.
    """
    started = time.monotonic()
    separator = config.document_separator
    options = ReadOptions(
        encoding=config.encoding,
        delimiter=config.delimiter,
        text_column=config.text_column,
        document_separator=separator and separator.replace("\\n", "\n").replace("\\t", "\t"),
    )
    report = ReadReport(config.on_error)
    sources = [open_source(asked, options, report) for asked in config.sources]
    val = open_source(config.val, options, report) if config.val is not None else None
    opened = [*sources, val] if val else sources
    given = given_tokenizer(config.tokenizer, config.vocab_size, opened, config.eos_token)
    if given is not None:
        assert given.eos_id is not None  # raises, before anything is read
    identity = _identity(config, opened, given)
    _print_choices(opened)
    paths = [path for source in opened for path in source.files]
    total = 0
    for path in paths:
        report.starts[path] = total
        total += path.stat().st_size
    documents = DocumentSplit(
        sources,
        val,
        lambda source: _documents(source, given, report),
        val_fraction=config.val_fraction,
        max_documents=config.max_documents,
        deduplicate=config.deduplicate,
    )
    out = config.out
    files.make_folder(out)
    with files.lock(out, "or choose another --out"):
        if output_dir.holds_corpus(out, identity, paths, overwrite=config.overwrite):
            terminal.note(f"{out}: this corpus is complete; nothing to do")
            if (out / UNFINISHED).is_dir():
                terminal.note(
                    f"{out / UNFINISHED}: left by --overwrite; resume with that, or remove it"
                )
            return out
        try:
            manifest = _make(config, documents, report, total, given, identity)
        except ValueError:
            output_dir.discard(out)
            raise
        output_dir.publish(out)
    terminal.note(_summary(out, manifest, report, time.monotonic() - started))
    return out


def _documents(source: Source, given: Tokenizer | None, report: ReadReport) -> Iterator[Document]:
    if source.layout is None:
        return source.documents()
    assert given is not None
    return tokenized_documents(
        source.files, source.layout, given.special_ids.document, given.vocab_size, report
    )


def _make(
    config: PrepareConfig,
    documents: DocumentSplit,
    report: ReadReport,
    total: int,
    given: Tokenizer | None,
    identity: Identity,
) -> dict[str, Any]:
    """Tokenizer, shards and manifest in `unfinished`, from the start or as the journal says.

    total: bytes of the source files.
    """
    writer = _resume(config, given, identity)
    if writer is None:
        output_dir.start_over(config.out, identity)
        tokenizer = given or train_tokenizer(config.tokenizer, config.vocab_size, documents, total)
        tokenizer.save(config.out / UNFINISHED)
        writer = CorpusWriter(config, tokenizer, identity)
    if writer.batches:
        terminal.note(f"resuming after {writer.totals[1]:,} tokens")
    tokenizer = writer.tokenizer
    report.skipped.clear()  # of the pass that trained the tokenizer

    def left_out() -> dict[str, int]:
        duplicates = {"duplicate": documents.duplicates} if config.deduplicate else {}
        return report.skipped.counts() | duplicates

    whole = tokenizer.kind == "other" or bool(tokenizer.special_ids.document.after)
    batches = make_batches(documents, whole=whole, left_out=left_out)
    remaining = islice(batches, writer.batches, None)
    encode_one = partial(encode, tokenizer=tokenizer, token_bytes=writer.token_bytes)
    threads = config.workers or available_cores()
    resumed_at, started = writer.totals[0], time.monotonic()

    def status() -> str:
        text_bytes, tokens = writer.totals
        speed = (text_bytes - resumed_at) / 1e6 / max(time.monotonic() - started, 1e-6)
        return f"{tokens:,} tokens, {text_bytes / 1e6:,.0f} MB, {speed:.1f} MB/s"

    with (
        closing(writer),
        closing(encode_in_order(remaining, encode_one, threads)) as stream,
        WorkProgress("preparing", total, percent=True) as progress,
    ):
        for batch, encoded in stream:
            if writer.full:
                break
            writer.write(batch, encoded)
            progress.update(report.position, status())
        else:
            writer.left_out = left_out()  # with what was skipped after the last batch
        progress.update(total or report.position, status())
        for hint in report.hints:
            terminal.note(hint)
        _check_splits(config, writer, documents)
        splits = writer.finish()
    manifest = _manifest(config, writer, splits, documents.rules)
    files.write_json(config.out / UNFINISHED / MANIFEST, manifest)
    return manifest


def _manifest(
    config: PrepareConfig, writer: CorpusWriter, splits: dict[str, Any], rules: list[str]
) -> dict[str, Any]:
    tokenizer = writer.tokenizer
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
        "validation": "; ".join(rules),
        "left_out": writer.left_out,
        "settings": writer.identity["settings"],
        "sources": writer.identity["sources"],
    }
    if around := _document(tokenizer):
        manifest["document"] = around
    manifest["fingerprint"] = fingerprint(manifest)
    return manifest | {"digest": manifest_digest(manifest)}


def _resume(
    config: PrepareConfig, given: Tokenizer | None, identity: Identity
) -> CorpusWriter | None:
    """The writer of an interrupted run; None if there is none, or its files were damaged."""
    journal = output_dir.read_journal(config.out, identity)
    if journal is None:
        return None
    tokenizer = given or Tokenizer.load(config.out / UNFINISHED)
    state = journal.pop("state")
    files.sweep(config.out / UNFINISHED)
    try:
        # with the journal's reasons why alternatives were passed over: the manifest keeps them
        return CorpusWriter(config, tokenizer, journal, state)
    except (ValueError, FileNotFoundError) as error:
        terminal.note(f"{error}; starting over")
        return None


def _check_splits(config: PrepareConfig, writer: CorpusWriter, documents: DocumentSplit) -> None:
    """ValueError if a split is empty."""
    train, val = writer.tokens("train"), writer.tokens("val")
    where, rules = " ".join(config.sources), "; ".join(documents.rules)
    if not train and not val:
        skipped = ", ".join(f"{count} {kind}" for kind, count in writer.left_out.items() if count)
        raise ValueError(f"{where}: no documents" + (f" (skipped: {skipped})" if skipped else ""))
    if not val:
        raise ValueError(
            f"{where}: nothing is left for validation, which gets {rules}; "
            "give more text, a larger --val-fraction, or --val FILE"
        )
    if not train:
        raise ValueError(
            f"{where}: nothing is left for training, validation gets {rules}; "
            "give more text, or smaller --shard-tokens"
        )


def _document(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """What is around a document, by field; empty if it is an end of text before it."""
    around = tokenizer.special_ids.document
    if around == DocumentTokens((tokenizer.eos_id,)):
        return {}
    return {name: list(ids) for name, ids in around._asdict().items()}


def _identity(config: PrepareConfig, sources: list[Source], given: Tokenizer | None) -> Identity:
    """What must be unchanged to resume an unfinished corpus, or to keep a complete one."""

    def facts(source: Source) -> dict[str, Any]:
        sizes = [(path.name, path.stat().st_size) for path in source.files]
        return {
            "asked": source.requested,
            "used": source.used,
            "passed": list(source.unavailable),
            "rows": None if source.layout is None else str(source.layout),
            "files": len(sizes),
            "bytes": sum(size for _, size in sizes),
            "listing": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
        }

    unset = set() if config.eos_token else {"eos_token"}  # of earlier versions, which lacked it
    settings = config.model_dump(mode="json", exclude={"out", "overwrite", "workers", *unset})
    if given is not None and (around := _document(given)):
        settings["document"] = around
    times = [(str(path), path.stat().st_mtime_ns) for source in sources for path in source.files]
    return {
        "settings": settings | {"given_tokenizer": given.fingerprint if given else None},
        "sources": [facts(source) for source in sources],
        "seen": hashlib.sha256(json.dumps([BATCH_SIZE, CHUNK_BYTES, times]).encode()).hexdigest(),
    }


# --- messages ------------------------------------------------------------------------------------


def _print_choices(sources: list[Source]) -> None:
    """Which alternatives are used, and why others are not."""
    for source in sources:
        for reason in source.unavailable:
            terminal.note(f"not used: {reason}")
        if source.unavailable or source.layout is not None:
            layout = f" ({source.layout})" if source.layout is not None else ""
            terminal.note(f"{source.requested}: {source.used}{layout} is used")


def _summary(out: Path, manifest: dict[str, Any], report: ReadReport, seconds: float) -> str:
    left_out = {kind: count for kind, count in manifest["left_out"].items() if count}
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())
    skipped = report.share(sum(left_out.values()))
    lines = [f"{out}: skipped {skipped}: {kinds}"] if left_out else []
    lines += [
        f"{out}: {split} {r['tokens']:,} tokens in {len(r['shards'])} shard(s), "
        f"{r['documents']:,} document(s), {r['bytes'] / 1e6:,.1f} MB"
        for split, r in manifest["splits"].items()
    ]
    text_bytes = sum(r["bytes"] for r in manifest["splits"].values())
    tokens = sum(r["tokens"] for r in manifest["splits"].values())
    lines.append(
        f"{out}: vocabulary {manifest['tokenizer']['vocab_size']:,}, "
        f"{text_bytes / tokens:.2f} bytes per token; validation: {manifest['validation']}"
    )
    return "\n".join([*lines, f"{out}: done in {seconds:.1f} s"])
