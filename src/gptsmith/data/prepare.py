"""Prepare a corpus, raw text to token shards: `gptsmith prepare SOURCE... --out data/NAME`.

Documents are split into training and validation (split), encoded (encode) and appended to shards
(shards). Every few seconds a journal records how many batches the shards contain. To resume, the
shards are truncated to these batches, and the sources are read, without encoding, up to there.
"""

import time
from itertools import accumulate
from pathlib import Path
from typing import Any

from gptsmith import files, terminal
from gptsmith.data import output_dir
from gptsmith.data.corpus_files import documents_of, make_corpus, open_sources, print_choices
from gptsmith.data.corpus_tokenizer import existing_tokenizer
from gptsmith.data.options import PrepareConfig
from gptsmith.data.parts import prepare_in_parts
from gptsmith.data.report import ReadReport
from gptsmith.data.shards import UNFINISHED
from gptsmith.data.split import DocumentSplit
from gptsmith.terminal import counted


def prepare(config: PrepareConfig) -> Path:
    """Make the corpus that `config` describes; returns its folder.

    Called again after a kill, it resumes and produces byte-identical files. ValueError,
    FileNotFoundError or FileExistsError, in one line, for user errors; an existing corpus in the
    folder is then unchanged, and nothing of the new one is left.
    """
    started = time.monotonic()
    report = ReadReport(config.on_error)
    if config.tasks is not None or config.join:
        manifest_of_parts = prepare_in_parts(config)
        if manifest_of_parts is not None:
            seconds = time.monotonic() - started
            terminal.note(_summary(config.out, manifest_of_parts, report, seconds))
        return config.out
    sources, val = open_sources(config, report)
    opened = [*sources, *([] if val is None else [val])]
    existing = existing_tokenizer(config, opened)
    identity = output_dir.identify(config, opened, existing)
    print_choices(opened)
    paths = [path for source in opened for path in source.files]
    sizes = [path.stat().st_size for path in paths]
    report.starts = dict(zip(paths, accumulate(sizes, initial=0), strict=False))
    documents = DocumentSplit(
        sources,
        val,
        lambda source: documents_of(source, existing, report),
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
            manifest = make_corpus(config, documents, report, sum(sizes), existing, identity)
        except ValueError:
            output_dir.discard(out)
            raise
        output_dir.publish(out)
    terminal.note(_summary(out, manifest, report, time.monotonic() - started))
    return out


# --- messages ------------------------------------------------------------------------------------


def _summary(out: Path, manifest: dict[str, Any], report: ReadReport, seconds: float) -> str:
    left_out = manifest["left_out"]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items() if count)
    skipped = report.share(sum(left_out.values()))
    lines = [f"{out}: skipped {skipped}: {kinds}"] if kinds else []
    lines += [
        f"{out}: {split} {counted(r['tokens'], 'token')} in {counted(len(r['shards']), 'shard')}, "
        f"{counted(r['documents'], 'document')}, {r['bytes'] / 1e6:,.1f} MB"
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
