"""From documents to the files of a corpus: encode, write, journal, resume, and the manifest."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

from gptsmith import files, terminal
from gptsmith.data import output_dir
from gptsmith.data.corpus_tokenizer import train_tokenizer
from gptsmith.data.corpus_writer import CorpusWriter
from gptsmith.data.documents import Document, Source
from gptsmith.data.encode import available_cores, encode, encode_in_order, make_batches
from gptsmith.data.options import PrepareConfig, ReadOptions
from gptsmith.data.output_dir import Identity
from gptsmith.data.report import ReadReport
from gptsmith.data.shards import FORMAT, MANIFEST, SPLITS, UNFINISHED, fingerprint, manifest_digest
from gptsmith.data.sources import open_source
from gptsmith.data.split import DocumentSplit, PartSplit
from gptsmith.progress import WorkProgress
from gptsmith.tokenizer import Tokenizer


def open_sources(config: PrepareConfig, report: ReadReport) -> tuple[list[Source], Source | None]:
    """The sources of a corpus, and that of its validation documents, if there is one."""
    options = ReadOptions(**config.model_dump(include=set(ReadOptions.model_fields)))
    sources = [open_source(name, options, report) for name in config.sources]
    return sources, None if config.val is None else open_source(config.val, options, report)


def print_choices(sources: Iterable[Source]) -> None:
    """Which alternatives are used, and why others are not."""
    for source in sources:
        for reason in source.unavailable:
            terminal.note(f"not used: {reason}")
        if source.unavailable or source.token_ids is not None:
            ids = f" ({source.token_ids})" if source.token_ids is not None else ""
            terminal.note(f"{source.requested}: {source.used}{ids} is used")


def documents_of(
    source: Source, tokenizer: Tokenizer | None, report: ReadReport
) -> Iterator[Document]:
    """The documents of a source. tokenizer: the one that made its ids, if it holds such."""
    if source.token_ids is None:
        return source.documents()
    assert tokenizer is not None
    return source.token_ids.documents(tokenizer.special_ids.document, tokenizer.vocab_size, report)


def make_corpus(
    config: PrepareConfig,
    documents: DocumentSplit | PartSplit,
    report: ReadReport,
    total: int,
    existing: Tokenizer | None,
    identity: Identity,
    part: int | None = None,
) -> dict[str, Any]:
    """Write tokenizer, shards and manifest to `unfinished`, from the start or from the journal.

    total: bytes of the source files. part: number of the part of a corpus that is made in parts;
    its splits may be empty.
    """
    writer = _resume(config, existing, identity, part)
    if writer is None:
        output_dir.start_over(config.out, identity)
        tokenizer = existing or train_tokenizer(config, documents, total)
        tokenizer.save(config.out / UNFINISHED)
        writer = CorpusWriter(config, tokenizer, identity, part=part)
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
        WorkProgress("preparing", total, percent=True, quiet=part is not None) as progress,
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
        if part is None:
            tokens = {split: writer.tokens(split) for split in SPLITS}
            check_splits(config, tokens, documents.rules, writer.left_out)
        splits = writer.finish()
    return write_manifest(config, tokenizer, identity, splits, documents.rules, writer.left_out)


def write_manifest(
    config: PrepareConfig,
    tokenizer: Tokenizer,
    identity: Identity,
    splits: dict[str, Any],
    rules: list[str],
    left_out: dict[str, int],
) -> dict[str, Any]:
    """Write the manifest to `unfinished`, after which the corpus can be published."""
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
        "left_out": left_out,
        "settings": identity["settings"],
        "sources": identity["sources"],
    }
    if document_tokens := output_dir.document_token_fields(tokenizer):
        manifest["document"] = document_tokens
    manifest["fingerprint"] = fingerprint(manifest)
    manifest |= {"digest": manifest_digest(manifest)}
    files.write_json(config.out / UNFINISHED / MANIFEST, manifest)
    return manifest


def _resume(
    config: PrepareConfig, existing: Tokenizer | None, identity: Identity, part: int | None
) -> CorpusWriter | None:
    """The writer of an interrupted run; None if there is none, or its files were damaged."""
    journal = output_dir.read_journal(config.out, identity)
    if journal is None:
        return None
    tokenizer = existing or Tokenizer.load(config.out / UNFINISHED)
    state = journal.pop("state")
    files.remove_temporary_files(config.out / UNFINISHED)
    try:
        # with the journal's reasons why alternatives were passed over: the manifest keeps them
        return CorpusWriter(config, tokenizer, journal, state, part=part)
    except (ValueError, FileNotFoundError) as error:
        terminal.note(f"{error}; starting over")
        return None


def check_splits(
    config: PrepareConfig, tokens: Mapping[str, int], rules: list[str], left_out: dict[str, int]
) -> None:
    """ValueError if a split has no tokens."""
    where = " ".join(config.sources)
    if not any(tokens.values()):
        skipped = ", ".join(f"{count} {kind}" for kind, count in left_out.items() if count)
        raise ValueError(f"{where}: no documents" + (f" (skipped: {skipped})" if skipped else ""))
    for split, purpose, remedy in (
        ("val", "validation", "a larger --val-fraction, or --val FILE"),
        ("train", "training", "or smaller --shard-tokens"),
    ):
        if not tokens[split]:
            raise ValueError(
                f"{where}: nothing is left for {purpose} (validation gets {'; '.join(rules)}); "
                f"give more text, {remedy}"
            )
