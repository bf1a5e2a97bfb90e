"""Which documents validate, and how the manifest describes it."""

import random
from pathlib import Path

import numpy as np
import pytest
from prepared import decoded, run, write_jsonl

from gptsmith.data import encode, text_files
from gptsmith.tokenizer import Tokenizer


def test_one_document_validates_on_its_last_tenth(tmp_path: Path) -> None:
    text = "".join(random.Random(0).choices("abcdé \n", k=1003))
    (tmp_path / "a.txt").write_text(text)
    corpus = run(tmp_path / "out", tmp_path / "a.txt", tokenizer="char")
    assert decoded(corpus, "train") == ["", text[:902]]
    assert decoded(corpus, "val") == [text[902:]]
    assert corpus.manifest["validation"] == "the last 0.1 of one document's characters"
    assert corpus.manifest["splits"]["train"]["documents"] == 1
    assert corpus.manifest["splits"]["train"]["bytes"] == len(text[:902].encode())
    assert corpus.manifest["splits"]["val"]["bytes"] == len(text[902:].encode())


def test_tiny_shakespeare_of_characters(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTSMITH_DATA", str(real_data))
    corpus = run(tmp_path / "out", "shakespeare", tokenizer="char")
    text = (real_data / "tinyshakespeare" / "input.txt").read_text()
    assert (corpus.train_tokens, corpus.val_tokens) == (1 + 89_991, 10_000)
    assert corpus.tokenizer.vocab_size == 61 + 1
    assert decoded(corpus, "val") == [text[89_991:]]


def test_wikitext_2_validates_on_its_own_split(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 700)
    monkeypatch.setattr(encode, "BATCH_SIZE", 1000)
    monkeypatch.setenv("GPTSMITH_DATA", str(real_data))
    corpus = run(tmp_path / "out", "wikipedia|wikitext-2", tokenizer="gpt2", workers=2)
    (source,) = corpus.manifest["sources"]
    assert (source["asked"], source["used"]) == ("wikipedia|wikitext-2", "wikitext-2")
    assert "wikimedia/wikipedia: not available from the Hub" in source["passed"][0]
    text = (real_data / "wikitext-2" / "valid.txt").read_text()
    assert "".join(decoded(corpus, "val")) == text
    # one encoder for the whole file knows nothing of frames, pieces and threads
    val = np.concatenate(corpus.val)
    articles = np.split(val, np.flatnonzero(val == corpus.tokenizer.eos_id))[1:]
    assert len(articles) == corpus.manifest["splits"]["val"]["documents"] == 2
    for ids in articles:
        assert corpus.tokenizer.encode(corpus.tokenizer.decode(ids[1:])) == ids[1:].tolist()


def test_novel_read_in_chunks_has_the_ids_of_the_whole_text(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 700)
    monkeypatch.setattr(encode, "BATCH_SIZE", 1000)
    path = real_data / "english_novels" / "Doyle_Hound_1902.txt"
    tokenizer = Tokenizer.gpt2(real_data / "gpt2_bpe")
    tokenizer.save(tmp_path / "tokenizer.json")
    corpus = run(tmp_path / "out", path, tokenizer=str(tmp_path / "tokenizer.json"))
    text = path.read_bytes().decode("utf-8-sig")
    cut = int(len(text) * 0.9)
    whole = [tokenizer.eos_id, *tokenizer.encode(text[:cut])]
    assert np.concatenate(corpus.train).tolist() == whole
    assert np.concatenate(corpus.val).tolist() == tokenizer.encode(text[cut:])


@pytest.mark.parametrize("count", [2, 9, 99, 100, 300])
def test_several_documents_are_divided_by_hash(tmp_path: Path, count: int) -> None:
    texts = [f"document {i}" for i in range(count)]
    corpus = run(tmp_path / "a", write_jsonl(tmp_path / "a.jsonl", texts))
    train, val = decoded(corpus, "train")[1:], decoded(corpus, "val")[1:]
    assert sorted(train + val) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]  # in their order
    assert 0 < len(val) <= max(1, 0.2 * count)
    if count < 100:
        assert len(val) == max(1, round(count / 10))
    other = run(tmp_path / "b", write_jsonl(tmp_path / "b.jsonl", texts[::-1]))
    assert set(decoded(other, "val")) == set(decoded(corpus, "val"))


def test_validation_from_a_file(tmp_path: Path) -> None:
    train, val = write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), tmp_path / "val.txt"
    val.write_text("v")
    corpus = run(tmp_path / "out", train, val=str(val))
    assert (decoded(corpus, "train"), decoded(corpus, "val")) == (["", "a", "b"], ["", "v"])
    assert [source["asked"] for source in corpus.manifest["sources"]] == [str(train), str(val)]


def test_overlap_of_validation_and_training_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    a = write_jsonl(tmp_path / "in" / "a.jsonl", ["one", "two"])
    link = tmp_path / "link.jsonl"
    link.symlink_to(a)
    for number, val in enumerate((link, a, tmp_path / "in")):
        corpus = run(tmp_path / f"out{number}", tmp_path / "in", val=str(val))
        assert corpus.manifest["validation"].endswith("are trained on too")
        assert "trained on too" in capsys.readouterr().err
    write_jsonl(tmp_path / "in" / "b.jsonl", ["three"])
    corpus = run(tmp_path / "apart", tmp_path / "in", val=str(a), deduplicate=True)
    assert corpus.manifest["validation"] == f"the documents of {a}"
    assert decoded(corpus, "train") == ["", "three"]


def test_fineweb_validates_on_its_first_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole documents, up to the first that the shard cannot hold."""
    monkeypatch.setenv("GPTSMITH_DATA", str(tmp_path))
    monkeypatch.setattr(encode, "BATCH_SIZE", 100)
    (tmp_path / "fineweb-edu").mkdir()
    texts = [f"document {i:03} " + "x" * (i % 7) for i in range(200)]
    write_jsonl(tmp_path / "fineweb-edu" / "a.jsonl", texts)
    corpus = run(tmp_path / "out", "fineweb-edu", shard_tokens=300)
    val = decoded(corpus, "val")[1:]
    assert decoded(corpus, "train")[1:] == texts[len(val) :]
    assert len(corpus.val) == 1
    assert 300 - 20 < corpus.val_tokens <= 300
    splits = corpus.manifest["splits"]
    assert [splits[name]["documents"] for name in ("train", "val")] == [200 - len(val), len(val)]
    assert splits["val"]["bytes"] == len("".join(val))
