"""Token ids of nanoGPT, llm.c and datatrove as sources: documents, widths, damage."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from prepared import run
from text_sources import opened

from gptsmith.data import token_files
from gptsmith.data.options import PrepareConfig
from gptsmith.data.prepare import prepare
from gptsmith.data.report import ReadReport
from gptsmith.tokenizer import DocumentTokens, Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
EOT = 256  # of the byte tokenizer
TEXTS = [f"document {i} " + "abc " * (i % 5) for i in range(12)]
DOCUMENTS = [list(text.encode()) for text in TEXTS]


def nanogpt(path: Path, documents: list[list[int]], dtype: str = "<u2") -> Path:
    """As data/openwebtext/prepare.py writes it: the end of text after each document."""
    ids = [token for document in documents for token in (*document, EOT)]
    array = np.memmap(path, dtype, "w+", shape=(len(ids),))
    array[:] = ids
    array.flush()
    return path


def llm_c(path: Path, documents: list[list[int]], magic: int = 20240520, version: int = 1) -> Path:
    """As write_datafile of dev/data/data_common.py writes it: the end of text before each."""
    ids = [token for document in documents for token in (EOT, *document)]
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids)
    data = np.array(ids, np.uint32 if magic == 20240801 else np.uint16)
    path.write_bytes(header.tobytes() + data.tobytes())
    return path


def documents_of(path: Path | str) -> list[list[int]]:
    files = opened(path).token_ids
    assert isinstance(files, token_files.TokenFiles)
    found = files.documents(DocumentTokens((EOT,)), 257, ReadReport("stop"))
    return [np.concatenate(list(document.chunks)).tolist() for document in found]


def test_documents_end_at_the_end_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (1, 7, 1 << 20):
        monkeypatch.setattr(token_files, "_BLOCK", block)
        assert documents_of(nanogpt(tmp_path / "a.bin", DOCUMENTS)) == DOCUMENTS
        assert documents_of(llm_c(tmp_path / "b.bin", DOCUMENTS)) == DOCUMENTS
        assert documents_of(llm_c(tmp_path / "c.bin", DOCUMENTS, 20240801, 7)) == DOCUMENTS
        assert documents_of(nanogpt(tmp_path / "d.bin", DOCUMENTS, "<u4")) == DOCUMENTS
    np.array(DOCUMENTS[0], "<u2").tofile(tmp_path / "no_end.bin")
    assert documents_of(tmp_path / "no_end.bin") == DOCUMENTS[:1]


def test_files_of_datatrove_are_divided_by_their_index(tmp_path: Path) -> None:
    """The fixture is written by datatrove 0.10.1's DocumentTokenizer, in shuffled order."""
    path = FIXTURES / "datatrove" / "00000_doc_shuffled.ds"
    assert sorted(documents_of(path)) == sorted(DOCUMENTS)
    assert str(opened(path).token_ids) == (
        "230 token ids in files of datatrove, made with tokenizer.json"
    )
    for left_out in (".index", ".metadata"):  # either of them is sufficient
        copied = tmp_path / left_out / path.name
        shutil.copytree(path.parent, copied.parent)
        copied.with_name(path.name + left_out).unlink()
        assert documents_of(copied) == documents_of(path)


def test_datatroves_own_writer_is_understood(tmp_path: Path) -> None:
    writer = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
    for size in (2, 4):
        file = writer.TokenizedFile(str(tmp_path), f"{size}.ds", token_size=size)
        for document in DOCUMENTS:
            file.write([*document, EOT], None)
        file.close()
        assert documents_of(tmp_path / f"{size}.ds") == DOCUMENTS


def test_a_corpus_of_token_ids_equals_that_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text)
    val = tmp_path / "val.txt"
    val.write_text(TEXTS[3])
    text = run(tmp_path / "a", tmp_path / "texts", val=str(val))
    (tmp_path / "ids").mkdir()
    nanogpt(tmp_path / "ids" / "train.bin", DOCUMENTS)
    nanogpt(tmp_path / "ids" / "val.bin", DOCUMENTS[3:4])
    (tmp_path / "ids" / "readme.md").write_text("about the data")
    ids = run(tmp_path / "b", tmp_path / "ids")  # a folder: val.bin is for validation
    assert ids.fingerprint == text.fingerprint
    assert ids.manifest["splits"] == text.manifest["splits"]
    again = run(tmp_path / "c", tmp_path / "ids/train.bin", val=str(tmp_path / "ids/val.bin"))
    assert again.fingerprint == text.fingerprint


def test_shards_of_a_pattern_are_read_in_order(tmp_path: Path) -> None:
    for number in (1, 0):
        llm_c(tmp_path / f"fineweb_train_{number:06}.bin", DOCUMENTS[number * 6 : number * 6 + 6])
    llm_c(tmp_path / "fineweb_val_000000.bin", DOCUMENTS[:1])
    assert documents_of(str(tmp_path / "*_train_*.bin")) == DOCUMENTS
    assert documents_of(tmp_path) == DOCUMENTS
    source = opened(tmp_path)
    assert source.validation is not None
    assert "12 token ids" in str(source.validation.token_ids)


def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    path = nanogpt(tmp_path / "train.bin", [[1, 2], [3, 300, 4]])
    with pytest.raises(
        ValueError, match=r"train\.bin, token 4: token id 300 is outside .* 0\.\.256"
    ):
        run(tmp_path / "out", path)
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_in_a_pickle_is_not_read(tmp_path: Path) -> None:
    nanogpt(tmp_path / "train.bin", DOCUMENTS)
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04\x95 not to be opened")
    config = PrepareConfig(sources=(str(tmp_path / "train.bin"),), out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"meta\.pkl, a pickle, which is not read: prepare the"):
        prepare(config)
    Tokenizer.byte().save(tmp_path)
    assert run(tmp_path / "out", tmp_path / "train.bin", tokenizer=str(tmp_path)).train_tokens


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    whole = llm_c(tmp_path / "whole.bin", DOCUMENTS).read_bytes()
    ds = FIXTURES / "datatrove" / "00000_doc_shuffled.ds"
    (tmp_path / "no_index.ds").write_bytes(ds.read_bytes())
    shutil.copytree(ds.parent, tmp_path / "cut")
    (tmp_path / "cut" / ds.name).write_bytes(ds.read_bytes()[:-2])
    shutil.copytree(ds.parent, tmp_path / "latin")
    (tmp_path / "latin" / f"{ds.name}.metadata").write_bytes(b"caf\xe9|2\n230\n")
    evaluation = np.zeros(256, np.int32)
    evaluation[0] = 20240522
    for name, data, message in (
        ("cut.bin", whole[:-1], r"230 tokens \(1,484 bytes\), the file has 1,483"),
        ("header.bin", whole[:100], r"the file has 100 bytes"),
        ("version.bin", whole[:4] + b"\2" + whole[5:], r"header of version 2"),
        ("eval.bin", evaluation.tobytes(), "another file of llm.c"),
        ("odd.bin", b"abc", "is a file of weights or arrays, not a file of token ids"),
        ("model.bin", b"PK\x03\x04\x00\x00" * 10, "is a file of weights or arrays"),
        ("empty.bin", b"", "no token ids in it"),
        ("no_index.ds", None, r"no_index\.ds\.index or .* should be next to it"),
        (f"cut/{ds.name}", None, "458 bytes, but its index and metadata say 230"),
        (f"latin/{ds.name}", None, r"\.metadata, byte 3: not UTF-8"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            opened(tmp_path / name)


@pytest.mark.parametrize("choice", ["bpe", "char"])
def test_a_tokenizer_cannot_be_learned_from_ids(tmp_path: Path, choice: str) -> None:
    with pytest.raises(ValueError, match="holds token ids; give the --tokenizer that made them"):
        run(tmp_path / "out", nanogpt(tmp_path / "train.bin", DOCUMENTS), tokenizer=choice)
