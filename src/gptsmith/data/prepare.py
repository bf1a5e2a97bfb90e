"""Prepare a corpus, raw text to token shards: `gptsmith prepare SOURCE... --out data/NAME`.

Documents are split into training and validation (split), encoded (encode) and appended to shards
(shards). Every few seconds a journal records how many batches the shards contain. To resume, the
shards are truncated to these batches, and the sources are read, without encoding, up to there.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from gptsmith import files, terminal
from gptsmith.data import output_dir
from gptsmith.data.corpus_tokenizer import given_tokenizer, train_tokenizer
from gptsmith.data.corpus_writer import CorpusWriter
from gptsmith.data.documents import Document, Source
from gptsmith.data.encode import available_cores, encode, encode_in_order, make_batches
from gptsmith.data.options import PrepareConfig, ReadOptions
from gptsmith.data.output_dir import Identity
from gptsmith.data.report import ReadReport
from gptsmith.data.shards import (
    FORMAT,
    MANIFEST,
    SPLITS,
    UNFINISHED,
    fingerprint,
    manifest_digest,
)
from gptsmith.data.sources import open_source
from gptsmith.data.split import DocumentSplit
from gptsmith.data.token_files import TokenFiles
from gptsmith.data.tokenized import tokenized_documents
from gptsmith.progress import WorkProgress
from gptsmith.tokenizer import Tokenizer


def prepare(config: PrepareConfig) -> Path:
    """Make the corpus that `config` describes; returns its folder.

    Called again after a kill, it resumes and produces byte-identical files. ValueError,
    FileNotFoundError or FileExistsError, in one line, for user errors; an existing corpus in the
    folder is then unchanged, and nothing of the new one is left.
    """
    started = time.monotonic()
    report = ReadReport(config.on_error)
    options = ReadOptions(**config.model_dump(include=set(ReadOptions.model_fields)))
    names = [*config.sources, *([config.val] if config.val is not None else [])]
    opened = [open_source(name, options, report) for name in names]
    given = given_tokenizer(config, opened)
    identity = output_dir.identify(config, opened, given)
    _print_choices(opened)
    paths = [path for source in opened for path in source.files]
    sizes = [path.stat().st_size for path in paths]
    report.starts = dict(zip(paths, accumulate(sizes, initial=0), strict=False))
    documents = DocumentSplit(
        opened[: len(config.sources)],
        opened[-1] if config.val is not None else None,
        lambda source: _documents(source, given, report),
        config,
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
            manifest = _make(config, documents, report, sum(sizes), given, identity)
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
    document_tokens, size = given.special_ids.document, given.vocab_size
    if isinstance(source.layout, TokenFiles):
        return source.layout.documents(document_tokens, size, report)
    return tokenized_documents(source.files, source.layout, document_tokens, size, report)


def _make(
    config: PrepareConfig,
    documents: DocumentSplit,
    report: ReadReport,
    total: int,
    given: Tokenizer | None,
    identity: Identity,
) -> dict[str, Any]:
    """Write tokenizer, shards and manifest to `unfinished`, from the start or from the journal.

    total: bytes of the source files.
    """
    writer = _resume(config, given, identity)
    if writer is None:
        output_dir.start_over(config.out, identity)
        tokenizer = given or train_tokenizer(config, documents, total)
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
    if document_tokens := output_dir.document_token_fields(tokenizer):
        manifest["document"] = document_tokens
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
    files.remove_temporary_files(config.out / UNFINISHED)
    try:
        # with the journal's reasons why alternatives were passed over: the manifest keeps them
        return CorpusWriter(config, tokenizer, journal, state)
    except (ValueError, FileNotFoundError) as error:
        terminal.note(f"{error}; starting over")
        return None


def _check_splits(config: PrepareConfig, writer: CorpusWriter, documents: DocumentSplit) -> None:
    """ValueError if a split is empty."""
    where, rules = " ".join(config.sources), "; ".join(documents.rules)
    if not any(map(writer.tokens, SPLITS)):
        skipped = ", ".join(f"{count} {kind}" for kind, count in writer.left_out.items() if count)
        raise ValueError(f"{where}: no documents" + (f" (skipped: {skipped})" if skipped else ""))
    for split, purpose, remedy in (
        ("val", "validation", "a larger --val-fraction, or --val FILE"),
        ("train", "training", "or smaller --shard-tokens"),
    ):
        if not writer.tokens(split):
            raise ValueError(
                f"{where}: nothing is left for {purpose} (validation gets {rules}); "
                f"give more text, {remedy}"
            )


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
    left_out = manifest["left_out"]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items() if count)
    skipped = report.share(sum(left_out.values()))
    lines = [f"{out}: skipped {skipped}: {kinds}"] if kinds else []
    lines += [
        f"{out}: {split} {r['tokens']:,} tokens in {len(r['shards'])} shard(s), "
        f"{r['documents']:,} document(s), {r['bytes'] / 1e6:,.1f} MB"
        for split, r in manifest["splits"].items()
    ]
    text_bytes, tokens = (
        sum(r[name] for r in manifest["splits"].values()) for name in ("bytes", "tokens")
    )
    lines.append(
        f"{out}: vocabulary {manifest['tokenizer']['vocab_size']:,}, "
        f"{text_bytes / tokens:.2f} bytes per token; validation: {manifest['validation']}"
    )
    return "\n".join([*lines, f"{out}: done in {seconds:.1f} s"])
