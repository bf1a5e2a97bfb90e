"""Raw text to token shards: `gptsmith prepare SOURCE... --out data/NAME`."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gptsmith import files
from gptsmith.data.build import JOURNAL, Build, cores, cut_frames, encode, encode_in_order
from gptsmith.data.documents import Document, Reader, Source
from gptsmith.data.progress import PrepareProgress
from gptsmith.data.selection import Selection
from gptsmith.data.shards import FORMAT, fingerprint
from gptsmith.data.sources import open_source
from gptsmith.data.tokenized import Layout, tokenized_documents
from gptsmith.tokenizer import Tokenizer

_SAMPLE = 32 << 20  # characters from which a vocabulary is learned: about four seconds
_DEFAULT_VOCABULARY = 8192
_MANIFEST = "manifest.json"


class PrepareConfig(BaseModel):
    """What to make a corpus from, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[str, ...] = Field(min_length=1)
    """Corpora by name (pydocs, pycode, shakespeare, wikitext-2, wikipedia, openwebtext,
    fineweb-edu), files, folders or patterns of .txt .md .jsonl(.gz) .csv .tsv .parquet .arrow, or
    data sets of the Hub as OWNER/NAME[:CONFIG[:SPLIT]]. `a|b` takes b where a cannot be had."""
    out: Path
    """Folder of the corpus."""
    tokenizer: str = "gpt2"
    """gpt2, bpe (learned from the training documents), char, byte, or a tokenizer.json or the
    folder of a run or corpus that holds one."""
    vocab_size: int | None = Field(None, ge=257)
    """Size of a learned vocabulary (--tokenizer bpe; 8192 if not given)."""
    val: str | None = None
    """A source of validation documents; then all others are for training."""
    val_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of validation where the sources bring none: of one document its last characters, of
    several those with the lowest hash."""
    text_column: str | None = None
    """Column of the text in tables and .jsonl files, where it is not obvious."""
    document_separator: str | None = Field(None, min_length=1)
    r"""What stands between the documents of a text file, for example '<|endoftext|>', or '\n\n'
    for blank lines. Without it a text file is one document."""
    max_documents: int | None = Field(None, ge=1)
    """Stop after this many documents."""
    max_tokens: int | None = Field(None, ge=1)
    """Stop after this many training tokens."""
    deduplicate: bool = False
    """Leave out documents that are exact copies of an earlier one (takes memory: about 100 MB for
    a million documents)."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about lines that cannot be read, bytes that are not UTF-8 and empty documents:
    stop with an error, or leave the line or document out and count it."""
    shard_tokens: int = Field(100_000_000, ge=1)
    """Tokens per shard file."""
    workers: int | None = Field(None, ge=1)
    """Threads that encode; all cores if not given. The result does not depend on it."""
    overwrite: bool = False
    """Replace a corpus that is in the folder already, once the new one is complete."""


def prepare(config: PrepareConfig) -> Path:
    """Make the corpus that `config` describes; its folder.

    Killed and called again, it goes on, and the files become the same byte for byte. ValueError,
    FileNotFoundError or FileExistsError, in one line, for what the user can mend; a corpus that is
    in the folder already is then untouched, and nothing of the new one is left.
    """
    started = time.monotonic()
    separator = config.document_separator
    reader = Reader(
        text_column=config.text_column,
        separator=separator and separator.replace("\\n", "\n").replace("\\t", "\t"),
        skip=config.on_error == "skip",
    )
    sources = [open_source(asked, reader) for asked in config.sources]
    val = open_source(config.val, reader) if config.val is not None else None
    given = _given_tokenizer(config, sources)
    identity = _identity(config, sources, val, given)
    _tell(sources, val)
    folder = _choose_folder(config, identity, sources)
    if folder is None:
        _say(f"{config.out}: this corpus is there already; nothing to do")
        return config.out
    with _locked(folder):
        _make(config, folder, identity, reader, sources, val, given)
        if folder != config.out:
            _replace(config.out, folder)
    manifest = files.read_json(config.out / _MANIFEST)
    _say(_summary(config.out, manifest, time.monotonic() - started))
    return config.out


def _make(
    config: PrepareConfig,
    folder: Path,
    identity: dict[str, Any],
    reader: Reader,
    sources: list[Source],
    val: Source | None,
    given: Tokenizer | None,
) -> None:
    """Tokenizer, shards and manifest in `folder`, from the beginning or from its journal."""
    journal = _journal(folder, identity)
    total = 0
    for path in (path for source in (*sources, val) if source for path in source.files):
        reader.starts[path] = total
        total += path.stat().st_size

    def read(source: Source) -> Iterator[Document]:
        if not isinstance(source.layout, Layout):
            return source.documents()
        assert given is not None
        tables, layout = source.files, source.layout
        return tokenized_documents(tables, layout, given.eos_id, given.vocab_size, reader)

    selection = Selection(
        sources,
        val,
        read,
        val_fraction=config.val_fraction,
        max_documents=config.max_documents,
        deduplicate=config.deduplicate,
    )
    try:
        if journal is None:
            files.write_json(folder / JOURNAL, identity)
            (given or _learn(config, selection, total)).save(folder)
        tokenizer = Tokenizer.load(folder)
        reader.left_out.clear()

        def left_out() -> dict[str, int]:
            counts = {kind: len(places) for kind, places in sorted(reader.left_out.items())}
            return counts | ({"duplicate": selection.duplicates} if config.deduplicate else {})

        token_bytes = tokenizer.token_bytes()
        build = Build(
            folder,
            tokenizer,
            token_bytes,
            shard_tokens=config.shard_tokens,
            max_tokens=config.max_tokens,
            identity=identity,
            journal=journal,
        )
        if build.frames:
            _say(f"going on after {sum(map(build.tokens, ('train', 'val'))):,} tokens")
        frames = cut_frames(selection, whole=tokenizer.kind == "other", left_out=left_out)
        encode_one = partial(encode, tokenizer=tokenizer, token_bytes=token_bytes)
        with PrepareProgress(total) as progress:
            todo = islice(frames, build.frames, None)
            for frame, encoded in encode_in_order(todo, encode_one, config.workers or cores()):
                if build.full:
                    break
                build.write(frame, encoded)
                progress.update(reader.position, *build.totals)
            else:
                build.left_out = left_out()
        for hint in reader.hints:
            _say(hint)
        _check(config, build, selection)
    except ValueError:
        _clear(folder)
        raise
    splits = build.close()
    _write_manifest(config, folder, identity, tokenizer, splits, build.left_out, selection.rules)


def _learn(config: PrepareConfig, selection: Selection, total: int) -> Tokenizer:
    """A tokenizer from the documents themselves."""
    if config.tokenizer == "char":
        # Validation too: a character that only it has would have no id.
        return Tokenizer.char(str(p) for _, document in selection for p in document.pieces)
    _say("learning the vocabulary from the training documents")
    return Tokenizer.train_bpe(_sample(selection, total), config.vocab_size or _DEFAULT_VOCABULARY)


def _sample(selection: Selection, total: int) -> Iterator[str]:
    """Training text, all of it if it is short; else pieces chosen by hash, from everywhere."""
    share = _SAMPLE / total if total > _SAMPLE else 1.0
    room = _SAMPLE
    for split, document in selection:
        for piece in document.pieces if split != "val" else ():
            text = str(piece)
            if share < 1:
                digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
                if int.from_bytes(digest) >= share * 2**64:
                    continue
            yield text[:room]
            room -= len(text)
            if room <= 0:
                return


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


def _write_manifest(
    config: PrepareConfig,
    folder: Path,
    identity: dict[str, Any],
    tokenizer: Tokenizer,
    splits: dict[str, Any],
    left_out: dict[str, int],
    rules: Iterable[str],
) -> None:
    journal = files.read_json(folder / JOURNAL)
    manifest = {
        "format": FORMAT,
        "name": config.out.name,
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
        **{key: journal[key] for key in identity if key != "seen"},
    }
    manifest["fingerprint"] = fingerprint(manifest)
    files.write_json(folder / _MANIFEST, manifest)
    (folder / JOURNAL).unlink()


# --- tokenizer -----------------------------------------------------------------------------------


def _given_tokenizer(config: PrepareConfig, sources: list[Source]) -> Tokenizer | None:
    """The tokenizer that is there before any text is read; None if it is learned from it."""
    if config.vocab_size is not None and config.tokenizer != "bpe":
        raise ValueError(
            f"--vocab-size {config.vocab_size} is for --tokenizer bpe; "
            f"{config.tokenizer} has its own size"
        )
    if config.tokenizer in ("bpe", "char"):
        for source in sources:
            if source.layout is not None:
                raise ValueError(
                    f"{source.used}: holds token ids; give the --tokenizer that made them, "
                    f"not {config.tokenizer}"
                )
        return None
    if config.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    if config.tokenizer == "byte":
        return Tokenizer.byte()
    if not Path(config.tokenizer).exists():
        raise FileNotFoundError(
            f"--tokenizer {config.tokenizer}: neither gpt2, bpe, char or byte nor a file or folder"
        )
    return Tokenizer.load(config.tokenizer)


# --- the folder ----------------------------------------------------------------------------------


def _identity(
    config: PrepareConfig, sources: list[Source], val: Source | None, given: Tokenizer | None
) -> dict[str, Any]:
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
    times = [
        (str(path), path.stat().st_mtime_ns)
        for source in (*sources, val)
        if source is not None
        for path in source.files
    ]
    return {
        "settings": settings | {"given_tokenizer": given.fingerprint if given else None},
        "sources": [about(source) for source in (*sources, val) if source is not None],
        "seen": hashlib.sha256(json.dumps(times).encode()).hexdigest(),
    }


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs between two identities, in the user's words; empty if nothing does."""
    lines = [
        f"{key}: {before!r} there, {now!r} now"
        for key, now in new["settings"].items()
        if (before := old.get("settings", {}).get(key)) != now
    ]
    # why an alternative was passed over may be said differently on another day
    pairs = list(zip(old.get("sources", []), new["sources"], strict=False))
    for before, now in pairs:
        lines += [
            f"{now['asked']}: {key} {before.get(key)!r} there, {now[key]!r} now"
            for key in ("used", "rows", "files", "bytes", "listing")
            if before.get(key) != now[key]
        ]
    return "; ".join(lines)


def _choose_folder(
    config: PrepareConfig, identity: dict[str, Any], sources: list[Source]
) -> Path | None:
    """Where to build: in place, or beside a corpus that is to be replaced. None: it is there."""
    out = config.out
    beside, old = _beside(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out}: is a file; name a folder")
    if not out.exists() and old.exists():  # killed between the two renamings of _replace
        os.replace(beside if (beside / _MANIFEST).is_file() else old, out)
    if (out / _MANIFEST).is_file():
        if old.exists():
            _remove_old(out, old)
        made = files.read_json(out / _MANIFEST)
        difference = _difference(made, identity) or _newer(out, sources)
        if not difference and not config.overwrite:
            (out / JOURNAL).unlink(missing_ok=True)
            return None
        if not config.overwrite:
            raise FileExistsError(
                f"{out}: holds a corpus made otherwise ({difference}); "
                "choose another --out, or --overwrite to replace it"
            )
        folder = beside
    else:
        folder = out
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / JOURNAL).is_file():
        begun = files.read_json(folder / JOURNAL)
        difference = _difference(begun, identity)
        if not difference and begun.get("seen") != identity["seen"]:
            difference = "a source file was changed since"
        if difference and folder == out and not config.overwrite:
            raise FileExistsError(
                f"{out}: holds an unfinished corpus made otherwise ({difference}); "
                "choose another --out, or --overwrite to begin anew"
            )
        if difference:
            _clear(folder)
            folder.mkdir(exist_ok=True)
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise FileExistsError(f"--out {out}: holds other files and no corpus; name a new folder")
    return folder


def _newer(out: Path, sources: list[Source]) -> str:
    """A source file that was written after the corpus was made, if there is one."""
    made = (out / _MANIFEST).stat().st_mtime_ns
    late = (p for source in sources for p in source.files if p.stat().st_mtime_ns > made)
    path = next(late, None)
    return f"{path} was changed since" if path else ""


def _journal(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The journal of an interrupted run whose files are all there, else None and a clean folder."""
    if (folder / JOURNAL).is_file() and (folder / "tokenizer.json").is_file():
        journal: dict[str, Any] = files.read_json(folder / JOURNAL)
        # reasons are kept as they were said the first time: the manifest must not change
        for before, now in zip(journal["sources"], identity["sources"], strict=True):
            now["passed"] = before["passed"]
        return journal
    files.sweep(folder)
    return None


def _clear(folder: Path) -> None:
    """Remove what an unfinished corpus consists of, and the folder if that was all."""
    files.sweep(folder)
    for pattern in ("train-*.npy*", "val-*.npy*", "tokenizer.json", JOURNAL):
        for path in folder.glob(pattern):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _beside(out: Path) -> tuple[Path, Path]:
    return out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")


def _replace(out: Path, new: Path) -> None:
    """Put the finished folder in the place of the old one; what else lay there is kept."""
    old = _beside(out)[1]
    os.replace(out, old)
    os.replace(new, out)
    files.sync(out.parent)
    _remove_old(out, old)


def _remove_old(out: Path, old: Path) -> None:
    (old / _MANIFEST).unlink(missing_ok=True)
    _clear(old)
    if old.exists():
        for path in old.iterdir():
            if not (out / path.name).exists():
                os.replace(path, out / path.name)
        shutil.rmtree(old)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone; released by the system whatever happens to us."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another gptsmith prepare is writing here") from None
        yield
    finally:
        os.close(descriptor)


# --- words ---------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _tell(sources: list[Source], val: Source | None) -> None:
    for source in (*sources, val):
        if source is None:
            continue
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
