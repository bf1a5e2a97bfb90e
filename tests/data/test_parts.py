"""A corpus made in parts: the same whatever the number of tasks, and after kills."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from prepared import run, snapshot, write_jsonl
from pydantic import ValidationError

from gptsmith.data import parts
from gptsmith.data.options import PrepareConfig
from gptsmith.data.parts import prepare_task
from gptsmith.data.prepare import prepare
from gptsmith.data.shards import Corpus


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """200 documents in five files of different sizes."""
    words, folder = random.Random(1), tmp_path / "texts"
    folder.mkdir()
    for number, count in enumerate((20, 90, 5, 60, 25)):
        lines = [" ".join(words.choices("abcdef", k=words.randrange(1, 60))) for _ in range(count)]
        write_jsonl(folder / f"{number}.jsonl", lines)
    return folder


def config(texts: Path | str, out: Path, **options: object) -> PrepareConfig:
    settings = {"tokenizer": "byte", "shard_tokens": 900, "on_error": "skip", **options}
    return PrepareConfig(sources=(str(texts),), out=out, **settings)  # type: ignore[arg-type]


def test_the_corpus_does_not_depend_on_the_number_of_tasks(tmp_path: Path, texts: Path) -> None:
    with (texts / "2.jsonl").open("a") as file:
        file.write('{"text": ""}\n')
    in_one = prepare(config(texts, tmp_path / "1" / "c", tasks=1))
    for number in range(4):  # as jobs of an array
        prepare(config(texts, tmp_path / "4" / "c", tasks=4, task=number))
    in_four = prepare(config(texts, tmp_path / "4" / "c", join=True))
    assert snapshot(in_one) == snapshot(in_four)
    corpus = Corpus.open(in_four)
    corpus.verify()
    # the same documents in the same order as without tasks; only the cuts between shards differ
    whole = run(tmp_path / "whole", texts, shard_tokens=900, on_error="skip")
    for split in ("train", "val"):
        joined, plain = (np.concatenate(getattr(c, split)) for c in (corpus, whole))
        assert np.array_equal(joined, plain)
        records = [c.manifest["splits"][split] for c in (corpus, whole)]
        assert records[0]["documents"] == records[1]["documents"]
        assert records[0]["bytes"] == records[1]["bytes"]
    assert corpus.manifest["validation"] == whole.manifest["validation"]
    assert corpus.manifest["left_out"] == whole.manifest["left_out"] == {"empty document": 1}
    assert not (in_four / "unfinished").exists()
    before = snapshot(in_four)
    prepare(config(texts, tmp_path / "4" / "c", tasks=2))  # nothing to do
    assert snapshot(in_four) == before


def test_local_tasks_are_processes(tmp_path: Path, texts: Path) -> None:
    corpus = Corpus.open(prepare(config(texts, tmp_path / "a" / "c", tasks=2, val_fraction=0.2)))
    assert {len(name.split("-")) for name in snapshot(corpus.path) if name[-4:] == ".npy"} == {3}
    bad = tmp_path / "texts" / "3.jsonl"
    bad.write_text("{broken\n")
    with pytest.raises(ValueError, match=r"3\.jsonl:1: not JSON"):
        prepare(config(bad, tmp_path / "b" / "c", tasks=2, on_error="stop"))
    assert not (tmp_path / "b" / "c").exists()


def test_the_alternative_that_is_used_is_named_once(
    tmp_path: Path, texts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.jsonl"
    asked = f"{missing}|{texts}"
    prepare(config(asked, tmp_path / "whole"))
    said = [line for line in capfd.readouterr().err.splitlines() if "used" in line]
    assert said[0].startswith(f"not used: {missing}")
    assert said[1:] == [f"{asked}: {texts} is used"]
    for word in ({"tasks": 2}, {"tasks": 2, "overwrite": True, "task": 1}, {"join": True}):
        prepare(config(asked, tmp_path / "parts", **word))
        assert [line for line in capfd.readouterr().err.splitlines() if "used" in line] == said


def test_validation_of_its_own_and_of_token_files(tmp_path: Path, texts: Path) -> None:
    ids = tmp_path / "ids"
    ids.mkdir()
    np.array([1, 2, 3, 256] * 150, "<u2").tofile(ids / "train.bin")
    np.array([9, 9, 256] * 7, "<u2").tofile(ids / "val.bin")
    for source, options in ((texts, {"val": str(ids / "val.bin")}), (ids, {})):
        name = source.name
        joined = prepare(config(source, tmp_path / "out" / name / "a", tasks=1, **options))
        plain = prepare(config(source, tmp_path / "out" / name / "b", **options))
        for split in ("train", "val"):
            streams = [np.concatenate(getattr(Corpus.open(c), split)) for c in (joined, plain)]
            assert np.array_equal(*streams)
        assert (
            Corpus.open(joined).manifest["validation"] == Corpus.open(plain).manifest["validation"]
        )


def test_a_killed_task_resumes_alone(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL of one task in the middle of a part; the others are not made again."""
    whole = prepare(config(texts, tmp_path / "whole" / "c", tasks=1))
    out = tmp_path / "killed" / "c"
    slow = (
        "import sys, time\n"
        "from gptsmith.data import corpus_writer, encode\n"
        "from gptsmith.data.options import PrepareConfig\n"
        "from gptsmith.data.prepare import prepare\n"
        "encode.BATCH_SIZE, corpus_writer._JOURNAL_SECONDS = 200, 0\n"
        "write = corpus_writer.CorpusWriter.write\n"
        "def slow_write(*args): write(*args); time.sleep(0.03)\n"
        "corpus_writer.CorpusWriter.write = slow_write\n"
        "prepare(PrepareConfig.model_validate_json(sys.argv[1]))\n"
    )
    request = config(texts, out, tasks=2, task=1).model_dump_json()
    process = subprocess.Popen([sys.executable, "-c", slow, request], stderr=subprocess.PIPE)
    journal = out / "unfinished" / "part-00001" / "unfinished" / "progress.json"
    while process.poll() is None and not (
        journal.exists() and '"batches": 3' in journal.read_text()
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(ValueError, match=r"part 0, 1, 2, 3, 4 of 0\.\.4 is not prepared"):
        prepare(config(texts, out, join=True))
    prepare(config(texts, out, tasks=2, task=0))
    done = out / "unfinished" / "part-00000" / "manifest.json"
    made = done.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptsmith.data.encode.BATCH_SIZE", 200)  # the division of the killed task
        capsys.readouterr()
        prepare(config(texts, out, tasks=2, task=1))
        assert "resuming after" in capsys.readouterr().err
    assert done.stat().st_mtime_ns == made
    prepare(config(texts, out, join=True))
    assert snapshot(out) == snapshot(whole)


def test_the_old_corpus_stays_until_the_new_one_is_whole(tmp_path: Path, texts: Path) -> None:
    out = prepare(config(texts, tmp_path / "c"))
    old = snapshot(out)
    other = {"val_fraction": 0.3}
    with pytest.raises(FileExistsError, match="holds another corpus"):
        prepare(config(texts, out, tasks=2, task=0, **other))
    prepare(config(texts, out, tasks=2, task=0, overwrite=True, **other))
    assert snapshot(out) == old
    prepare(config(texts, out, tasks=2, task=1, overwrite=True, **other))
    prepare(config(texts, out, join=True, overwrite=True, **other))
    assert snapshot(out) != old
    Corpus.open(out).verify()
    assert not (out / "unfinished").exists()
    # and the other way round: what tasks left is cleared by a run without them
    prepare(config(texts, out, tasks=2, task=0, overwrite=True))
    prepare(config(texts, out, overwrite=True))
    assert snapshot(out) == old


def test_join_survives_a_kill_while_it_moves_files(tmp_path: Path, texts: Path) -> None:
    whole = snapshot(prepare(config(texts, tmp_path / "whole" / "c", tasks=1)))
    for after in (1, 4, 11):
        out = tmp_path / str(after) / "c"
        for number in range(2):
            prepare(config(texts, out, tasks=2, task=number))
        moves = 0

        def replace(source: Path, target: Path, after: int = after) -> None:
            nonlocal moves
            moves += 1
            if moves > after:
                raise KeyboardInterrupt
            os.rename(source, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gptsmith.data.output_dir.os.replace", replace)
            with pytest.raises(KeyboardInterrupt):
                prepare(config(texts, out, join=True))
        prepare(config(texts, out, join=True))
        assert snapshot(out) == whole


def test_what_depends_on_all_documents_is_rejected(tmp_path: Path, texts: Path) -> None:
    for option in (
        {"tokenizer": "bpe"},
        {"tokenizer": "char"},
        {"deduplicate": True},
        {"max_documents": 5},
        {"max_tokens": 5},
    ):
        with pytest.raises(ValidationError, match="depends on all documents, which no task sees"):
            config(texts, tmp_path / "out", tasks=2, **option)
    with pytest.raises(ValidationError, match="--task 2 is one of --tasks: give --tasks 3 or more"):
        config(texts, tmp_path / "out", tasks=2, task=2)
    with pytest.raises(ValueError, match=r"pydocs .*: --tasks divides files, and this source is"):
        prepare(config("pydocs", tmp_path / "out", tasks=2))


def test_many_files_become_parts_of_about_equal_size(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_MAX_PARTS", 2)
    found = parts.make_plan(config(texts, tmp_path / "out", tasks=4)).parts
    names = [[path.name for path in part.source.files] for part in found]
    assert [name for group in names for name in group] == [f"{number}.jsonl" for number in range(5)]
    assert len(names) == 2


def test_a_pipeline_of_datatrove_runs_the_tasks(tmp_path: Path, texts: Path) -> None:
    local = pytest.importorskip("datatrove.executor.local")
    whole = prepare(config(texts, tmp_path / "whole" / "c", tasks=1))
    out = config(texts, tmp_path / "c", tasks=4)
    step = partial(prepare_task, out)
    logs = str(tmp_path / "logs")
    local.LocalPipelineExecutor([step], tasks=4, workers=2, logging_dir=logs).run()
    prepare(out.model_copy(update={"tasks": None, "join": True}))
    assert snapshot(out.out) == snapshot(whole)
