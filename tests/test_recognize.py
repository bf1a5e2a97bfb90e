"""What a path is, and the error of a command that takes another kind of path."""

import json
from pathlib import Path

import pytest

from gptsmith import recognize

RUN = {"config.yaml": "stage: chat\n", "model.json": "{}"}
CORPUS = {"manifest.json": "{}", "tokenizer.json": "{}", "train-00000.npy": "x"}


def make(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("files", "what", "use"),
    [
        (RUN, "a run", "gptsmith generate"),
        (CORPUS, "a prepared corpus", "gptsmith pretrain --data"),
        ({"unfinished/progress.json": "{}"}, "a prepared corpus", "--data"),
        ({"manifest.json": "{}", "state.json": "{}"}, "a checkpoint", "--checkpoint"),
        ({"config.json": "{}", "model.safetensors": ""}, "a Hugging Face model", "import"),
        ({"adapter_config.json": "{}"}, "an adapter", "merge it"),
        ({"a/config.yaml": "", "a/model.json": ""}, "a folder of runs", "give one of them: a"),
        ({"c/manifest.json": ""}, "a folder of prepared corpora", "give one of them: c"),
        ({"a.txt": "x", "b.jsonl": "{}"}, "a folder with a.txt, b.jsonl", "gptsmith prepare"),
        ({"m.GGUF": "GGUF"}, "a folder with m.GGUF", "import the model that it was made from"),
        ({}, "an empty folder", ""),
    ],
)
def test_folders(tmp_path: Path, files: dict[str, str], what: str, use: str) -> None:
    (tmp_path / "x").mkdir()
    kind = recognize.recognize(make(tmp_path / "x", files))
    assert kind.what == what
    assert use in kind.use


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt", b"words", "a text file"),
        ("a.py", b"print()", "a text file"),
        ("a.txt", "words".encode("utf-16"), "a text file"),
        ("a.jsonl.gz", b"\x1f\x8b", "a table"),
        ("a.CSV", b"a,b", "a table"),
        ("a.parquet", b"PAR1", "a table"),
        ("a.yaml", b"train:", "a recipe"),
        ("model.gguf", b"", "a GGUF model"),
        ("model", b"GGUF\x03\0\0\0", "a GGUF model"),
        ("model.safetensors", b"", "a file of weights or arrays"),
        ("a", b"%PDF-1.4", "a PDF"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        ("a.docx", b"PK\x03\x04\0", "a ZIP archive (so are .xlsx, .docx and .epub files)"),
        ("BZh.txt", b"BZh is how a bzip2 file begins", "a text file"),
    ],
)
def test_files(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert recognize.recognize(tmp_path / name).what == what


def test_a_file_of_a_run_or_corpus(tmp_path: Path) -> None:
    run, corpus = make(tmp_path / "run", RUN), make(tmp_path / "corpus", CORPUS)
    assert recognize.recognize(run / "model.json").what == f"a file of the run {run}"
    assert recognize.recognize(corpus / "manifest.json").what == f"a file of the corpus {corpus}"


def test_every_verb_says_what_it_got(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gptsmith.cli import main

    monkeypatch.chdir(tmp_path)
    make(tmp_path / "run", RUN | {"tokenizer.json": "{}"})
    make(tmp_path / "corpus", CORPUS)
    Path("novel.txt").write_text("It was a dark night.\n" * 9)
    Path("rows.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    for words, message in {
        "pretrain --data novel.txt --out x": "novel.txt is a text file, not a prepared corpus: "
        "gptsmith prepare novel.txt --out data/NAME",
        "pretrain --data rows.jsonl --out x": "rows.jsonl is a table, not a prepared corpus",
        "pretrain --data run --out x": "run is a run, not a prepared corpus",
        "prepare corpus --out x": "corpus is a prepared corpus, not text: gptsmith pretrain",
        "prepare run --out x": "run is a run, not text",
        "prepare corpus/manifest.json --out x": "is a file of the corpus corpus, not text",
        "prepare novel.txt --tokenizer rows.jsonl --out x": "rows.jsonl is a table, not a tok",
        "generate corpus": "corpus is a prepared corpus, not a run: gptsmith pretrain",
        "generate novel.txt": "novel.txt is a text file, not a run",
        "chat rows.jsonl": "rows.jsonl is a table, not a run",
        "export corpus --format hf --out x": "corpus is a prepared corpus, not a run",
        "evaluate novel.txt": "novel.txt is a text file, not a run",
        "classify corpus words": "corpus is a prepared corpus, not a run",
        "inspect novel.txt": "novel.txt is a",
        "finetune classify --from run --data corpus --out x": "corpus is a prepared corpus, not",
        "pretrain --data corpus --data run --out x": "--data is given twice (corpus and run)",
    }.items():
        assert main(words.split()) == 2, words
        error = capsys.readouterr().err
        assert message in error, words
        assert error.count("\n") == 1, words


def test_data_of_another_kind_is_rejected_by_every_reader(tmp_path: Path) -> None:
    from gptsmith.data.rows import read_rows

    corpus = make(tmp_path / "corpus", CORPUS)
    with pytest.raises(ValueError, match="corpus is a prepared corpus, not a table or a folder"):
        list(read_rows(corpus))
    (tmp_path / "novel.txt").write_text("It was a dark night.")
    with pytest.raises(ValueError, match=r"novel\.txt is a text file, not a table"):
        list(read_rows(tmp_path / "novel.txt"))
