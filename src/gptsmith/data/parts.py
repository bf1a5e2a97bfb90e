"""Prepare a corpus in parts, on several processes or machines: `gptsmith prepare ... --tasks N`.

The files of the sources are divided into parts, independent of the number of tasks, and each part
is prepared like a corpus of its own, in unfinished/part-N: with a journal, so that a killed task
resumes, and with its own shards. A corpus is made of them by moving the shards and adding up the
manifests. Validation documents are chosen by hash, which needs no other document.

`prepare_task` is also a step of a pipeline of datatrove, whose executors run it on Slurm or Ray.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from gptsmith import files, terminal
from gptsmith.data import output_dir
from gptsmith.data.corpus_files import (
    check_splits,
    documents_of,
    make_corpus,
    open_sources,
    print_choices,
    write_manifest,
)
from gptsmith.data.corpus_tokenizer import existing_tokenizer
from gptsmith.data.documents import Source
from gptsmith.data.encode import available_cores
from gptsmith.data.options import PrepareConfig
from gptsmith.data.output_dir import Identity, part_folder
from gptsmith.data.report import ReadReport
from gptsmith.data.shards import MANIFEST, MAX_SHARDS, SPLITS, UNFINISHED, too_many_shards
from gptsmith.data.split import PartSplit, Split, hash_rule, overlap_remark
from gptsmith.data.token_files import TokenFiles
from gptsmith.data.token_tables import TokenTables
from gptsmith.progress import WorkProgress
from gptsmith.sandbox import python_command
from gptsmith.tokenizer import Tokenizer

_MAX_PARTS = 200  # parts per source, each with a shard or more per split
_LOCK_SECONDS = 60.0


class Part(NamedTuple):
    """Consecutive files of a source.

    split: of its documents; None: those with a low hash are for validation.
    """

    number: int
    source: Source
    split: Split | None


class Plan(NamedTuple):
    """What all tasks of a corpus agree upon.

    sources: including that of validation. rules: how validation documents are chosen. report: of
    reading the sources, by which a task reads one part after another.
    """

    sources: list[Source]
    parts: list[Part]
    rules: list[str]
    tokenizer: Tokenizer
    identity: Identity
    files: list[Path]
    report: ReadReport


def make_plan(config: PrepareConfig) -> Plan:
    """Raises as prepare does, and ValueError for a source that cannot be divided."""
    report = ReadReport(config.on_error)
    sources, val = open_sources(config, report)
    opened = [*sources, *([] if val is None else [val])]
    tokenizer = existing_tokenizer(config, opened)
    assert tokenizer is not None  # the configuration rejects those that are learned
    parts, rules = divide(sources, val, config.val_fraction)
    identity = output_dir.identify(config, opened, tokenizer)
    identity["settings"]["parts"] = len(parts)
    paths = [path for source in opened for path in source.files]
    return Plan(opened, parts, rules, tokenizer, identity, paths, report)


def divide(
    sources: Sequence[Source], val: Source | None, val_fraction: float
) -> tuple[list[Part], list[str]]:
    """The parts of the sources, those for validation first, and the rules of validation."""
    parts: list[Part] = []
    rules: list[str] = []

    def add(source: Source, split: Split | None, rule: str | None = None) -> None:
        for number, paths in enumerate(_groups(source)):
            rest = "train" if split == "first_shard" and number else split
            parts.append(Part(len(parts), _restricted_to(source, paths), rest))
        if rule is not None and rule not in rules:
            rules.append(rule)

    if val is not None:
        add(val, "val", f"the documents of {val.used}{overlap_remark(val, sources)}")
    for source in sources if val is None else ():
        if source.validation is not None:
            add(source.validation, "val", f"the validation split of {source.used}")
    for source in sources:
        if val is not None or source.validation is not None:
            add(source, "train")
        elif source.first_shard:
            add(source, "first_shard", f"the first shard of {source.used}")
        else:
            add(source, None, hash_rule(val_fraction))
    return parts, rules


def _groups(source: Source) -> list[list[Path]]:
    """Consecutive files, of about equal size where there are many."""
    if not source.files or (source.read is None and not isinstance(source.token_ids, TokenFiles)):
        raise ValueError(f"{source.used}: --tasks divides files, and this source is none")
    if isinstance(source.token_ids, TokenTables):
        raise ValueError(
            f"{source.used}: holds tables of token ids, whose layout follows from all rows: "
            "prepare it without --tasks"
        )
    of_validation = source.validation.files if source.validation is not None else ()
    paths = [path for path in source.files if path not in of_validation]
    sizes = {path: path.stat().st_size for path in paths}
    enough, groups, room = sum(sizes.values()) / _MAX_PARTS, [[paths[0]]], 0.0
    for before, path in pairwise(paths):
        room += sizes[before]
        if room >= enough:
            groups.append([])
            room = 0.0
        groups[-1].append(path)
    return groups


def _restricted_to(source: Source, paths: list[Path]) -> Source:
    """The source with some of its files."""
    if isinstance(source.token_ids, TokenFiles):
        kept = TokenFiles(tuple(file for file in source.token_ids.files if file.path in paths))
        return dataclasses.replace(source, files=tuple(paths), token_ids=kept, validation=None)
    read = source.read
    assert read is not None
    return dataclasses.replace(source, files=tuple(paths), documents=lambda: read(paths))


# --- one part ------------------------------------------------------------------------------------


def prepare_task(
    config: PrepareConfig, data: Any = None, rank: int = 0, world_size: int = 1
) -> None:
    """Prepare every part whose number is `rank` modulo `world_size`, as --task and --tasks do.

    With the configuration bound to it (functools.partial) it is the one step of a pipeline of
    datatrove, which has no `data`.
    """
    assert data is None, "prepare_task reads the sources itself: it is the first step"
    plan = make_plan(config)
    print_choices(plan.sources)
    files.make_folder(config.out)
    with _wait_for_lock(config.out):
        if _is_complete(config, plan):
            return
        output_dir.begin_parts(config.out, plan.identity)
    _prepare_parts(config, plan, rank, world_size)


def _prepare_parts(config: PrepareConfig, plan: Plan, task: int, tasks: int) -> None:
    for part in plan.parts[task::tasks]:
        _prepare_part(config, part, plan.tokenizer, plan.report)
        plan.report.hints.clear()


def _prepare_part(
    config: PrepareConfig, part: Part, tokenizer: Tokenizer, report: ReadReport
) -> None:
    """Make a part, unless it is complete. Raises as prepare does."""
    out = part_folder(config.out, part.number)
    files.make_folder(out)
    config = config.model_copy(update={"out": out})
    identity = _part_identity(config, part, tokenizer)
    with files.lock(out, "or give another --task"):
        if _part_is_complete(config, part, identity):
            return
        documents = PartSplit(
            lambda: documents_of(part.source, tokenizer, report), part.split, config.val_fraction
        )
        total = sum(path.stat().st_size for path in part.source.files)
        try:
            manifest = make_corpus(
                config, documents, report, total, tokenizer, identity, part.number
            )
        except ValueError:
            output_dir.discard(out)
            raise
        output_dir.publish(out)
    tokens = sum(record["tokens"] for record in manifest["splits"].values())
    terminal.note(f"part {part.number}: {tokens:,} tokens")


def _part_identity(config: PrepareConfig, part: Part, tokenizer: Tokenizer) -> Identity:
    identity = output_dir.identify(config, [part.source], tokenizer)
    identity["settings"] |= {"part": part.number, "split": part.split}
    return identity


def _part_is_complete(config: PrepareConfig, part: Part, identity: Identity) -> bool:
    try:
        return output_dir.holds_corpus(config.out, identity, part.source.files, overwrite=False)
    except FileExistsError:
        if not config.overwrite:
            raise
        return False


def _is_complete(config: PrepareConfig, plan: Plan) -> bool:
    complete = output_dir.holds_corpus(
        config.out, plan.identity, plan.files, overwrite=config.overwrite
    )
    if complete:
        terminal.note(f"{config.out}: this corpus is complete; nothing to do")
    return complete


@contextmanager
def _wait_for_lock(out: Path) -> Iterator[None]:
    """The lock of a folder that other tasks hold for a moment."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            held = files.lock(out, "or choose another --out")
            break
        except ValueError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    with held:
        yield


# --- all parts -----------------------------------------------------------------------------------


def prepare_in_parts(config: PrepareConfig) -> dict[str, Any] | None:
    """What --tasks, --task and --join ask for. Returns the manifest of a corpus that was made."""
    if config.task is not None:
        prepare_task(config, None, config.task, config.tasks or 1)
        return None
    plan = make_plan(config)
    print_choices(plan.sources)
    files.make_folder(config.out)
    with files.lock(config.out, "or choose another --out"):
        if _is_complete(config, plan):
            return None
        if config.tasks is not None:
            output_dir.begin_parts(config.out, plan.identity)
            try:
                _run_tasks(config, plan, min(config.tasks, len(plan.parts)))
            except ValueError:
                if not _count_complete(config.out):
                    output_dir.discard(config.out)
                raise
        return _join(config, plan)


def _join(config: PrepareConfig, plan: Plan) -> dict[str, Any]:
    """Make the corpus of complete parts. ValueError naming those that are not."""
    manifests, missing = [], []
    for part in plan.parts:
        folder = part_folder(config.out, part.number)
        part_config = config.model_copy(update={"out": folder})
        identity = _part_identity(part_config, part, plan.tokenizer)
        if folder.is_dir() and _part_is_complete(part_config, part, identity):
            manifests.append(files.read_json(folder / MANIFEST))
        else:
            missing.append(str(part.number))
    if missing:
        raise ValueError(
            f"{config.out}: part {', '.join(missing[:10])}{' ...' if missing[10:] else ''} of "
            f"0..{len(plan.parts) - 1} is not prepared; run the tasks again, which do what is left"
        )
    splits: dict[str, Any] = {}
    for split in SPLITS:
        records = [manifest["splits"][split] for manifest in manifests]
        sums = {name: sum(r[name] for r in records) for name in ("tokens", "documents", "bytes")}
        splits[split] = sums | {"shards": [shard for r in records for shard in r["shards"]]}
        if len(splits[split]["shards"]) > MAX_SHARDS:
            raise too_many_shards(config.shard_tokens)
    left_out = sum((Counter(manifest["left_out"]) for manifest in manifests), Counter[str]())
    tokens = {split: record["tokens"] for split, record in splits.items()}
    check_splits(config, tokens, plan.rules, dict(left_out))
    plan.tokenizer.save(config.out / UNFINISHED)
    skipped = dict(sorted(left_out.items()))
    manifest = write_manifest(config, plan.tokenizer, plan.identity, splits, plan.rules, skipped)
    output_dir.publish(config.out)
    return manifest


# --- processes of this machine -------------------------------------------------------------------


def _run_tasks(config: PrepareConfig, plan: Plan, tasks: int) -> None:
    """Run the tasks, each in a process if there are several. The first error stops all of them."""
    if tasks == 1:
        _prepare_parts(config, plan, 0, 1)
        return
    threads = config.workers or max(1, available_cores() // tasks)
    running: list[subprocess.Popen[str]] = []
    try:
        for task in range(tasks):
            update = {"tasks": tasks, "task": task, "workers": threads}
            request = config.model_copy(update=update).model_dump_json()
            words = python_command("gptsmith.data.parts", "serve", request)
            pipe = subprocess.PIPE
            running.append(subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True))
        with WorkProgress("parts prepared", len(plan.parts)) as progress:
            while left := [process for process in running if process.poll() != 0]:
                if failed := next((p for p in left if p.returncode is not None), None):
                    raise _task_error(failed)
                progress.update(_count_complete(config.out))
                time.sleep(0.05)
            progress.update(len(plan.parts))
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.communicate()


def _count_complete(out: Path) -> int:
    """The number of complete parts."""
    return len(list((out / UNFINISHED).glob(f"*/{MANIFEST}")))


def _task_error(process: subprocess.Popen[str]) -> Exception:
    assert process.stdout is not None
    if message := process.stdout.read():
        return ValueError(json.loads(message))
    how = f"exit code {process.returncode}"
    if process.returncode < 0:
        how = f"signal {-process.returncode}, perhaps for lack of memory"
    return ChildProcessError(
        f"a task of prepare was ended by {how}; run the same command again to resume"
    )


def serve(request: str) -> None:
    """Run a task in a process that `_run_tasks` started, and end with that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    config = PrepareConfig.model_validate_json(request)
    try:
        _prepare_parts(config, make_plan(config), config.task or 0, config.tasks or 1)
    except (ValueError, OSError) as error:
        terminal.write(json.dumps(str(error)))  # ASCII, whatever the encoding
        sys.exit(1)


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the parent's end of the pipe is closed
    os._exit(1)
