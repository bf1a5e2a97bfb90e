"""Named corpora, local or downloaded, and data sets of the Hub."""

import hashlib
import re
import sys
from pathlib import Path

import pytest
from data_sets import complete_data
from local_web import Site
from text_sources import ROWS, opened, read, texts, write_rows

from gptsmith.data import corpora, hub
from gptsmith.data.documents import row_documents
from gptsmith.data.options import ReadOptions
from gptsmith.data.report import ReadReport


def test_pydocs_contains_documentation() -> None:
    documents = {d.place: "".join(map(str, d.chunks)) for d in corpora.pydocs()}
    assert 1_500_000 < sum(map(len, documents.values())) < 4_000_000
    assert "class TextWrapper" in documents["textwrap"]
    assert "The lazy import" not in documents["textwrap"]
    assert "while" in documents["topic while"]
    assert list(documents) == [d.place for d in corpora.pydocs()]
    assert "this" not in sys.modules
    assert "antigravity" not in sys.modules  # it would have opened a browser


def test_pycode_is_source() -> None:
    documents = {d.place: "".join(map(str, d.chunks)) for d in corpora.pycode()}
    assert documents["textwrap.py"] == Path(sys.modules["textwrap"].__file__ or "").read_text()
    assert not [place for place in documents if "/tests/" in place]


@pytest.mark.parametrize("name", ["wikipedia", "openwebtext", "fineweb-edu", "wikitext-103"])
def test_corpus_without_network_says_where_to_put_files(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPTSMITH_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=rf"put {name}/.*GPTSMITH_DATA"):
        opened(name)


def test_hub_name_without_network_is_an_error_with_a_remedy() -> None:
    with pytest.raises(FileNotFoundError, match=r"^owner/name: not available .* their folder inst"):
        opened("owner/name")


def test_shakespeare_without_network_says_where_to_put_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(corpora, "_SHAKESPEARE", "http://127.0.0.1:9/input.txt")  # no server
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("GPTSMITH_DATA", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(FileNotFoundError, match=r"put http://.* into .*tinyshakespeare/input\.txt"):
        opened("shakespeare")


def test_shakespeare_needs_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("GPTSMITH_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"home directory.* set XDG_CACHE_HOME"):
        opened("shakespeare")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/here")
    with pytest.raises(FileNotFoundError, match=r"/dev/null/here.* set XDG_CACHE_HOME"):
        opened("shakespeare")


@pytest.mark.parametrize("name", ["tinyshakespeare/input.txt", "wikitext-2/train.txt"])
def test_invalid_utf8_in_a_named_corpus(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.parent.mkdir()
    path.with_name("valid.txt").write_text(" = A = \n text\n")
    monkeypatch.setenv("GPTSMITH_DATA", str(tmp_path))
    path.write_bytes(b" = A = \n\n one \n \xff two\n\n = B = \n")
    corpus = name.partition("/")[0].replace("tiny", "")
    with pytest.raises(ValueError, match=rf"{path}:4: not UTF-8"):
        read(corpus)
    assert "".join(read(corpus, ReadReport("skip"))) == " = A = \n\n one \n\n = B = \n"


def test_shakespeare_is_downloaded_once_and_verified(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = b"First Citizen"
    monkeypatch.setattr(corpora, "_SHAKESPEARE", f"{site.url}/input.txt")
    monkeypatch.setattr(corpora, "_SHAKESPEARE_SIZE", len(text))
    monkeypatch.setattr(corpora, "_SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GPTSMITH_DATA", raising=False)
    site.files["/input.txt"] = b"Third Citizen"
    with pytest.raises(ValueError, match=r"^shakespeare: .* it is deleted, run this again"):
        read("shakespeare")
    site.files["/input.txt"] = text
    site.asked.clear()
    assert read("shakespeare") == read("shakespeare") == ["First Citizen"]
    assert len(site.asked) == 1


def test_named_corpus_is_found_in_the_data_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GPTSMITH_DATA", str(tmp_path))
    (tmp_path / "fineweb-edu").mkdir()
    write_rows(tmp_path / "fineweb-edu" / "000.parquet", ROWS)
    source = opened("fineweb-edu")
    assert texts(source.documents()) == ROWS
    assert source.first_shard
    assert not opened("pydocs").first_shard


def test_wikitext_is_cut_into_articles() -> None:
    lines = (
        " \n = One = \n \n text\n = = Part = = \n \n x = y = \n = not a title = \n \n = Two = \n"
    )
    found = texts(corpora.articles(lines.splitlines(keepends=True), "w"))
    assert [text.count("\n") for text in found] == [9, 1]
    assert "".join(found) == lines


@pytest.mark.parametrize(("articles", "of_validation"), [(4, 2), (601, 60)])
def test_wikitext_2(
    articles: int, of_validation: int, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"wikitext-2/train.txt": 10_797_148, "wikitext-2/valid.txt": 1_121_681}
    folder = real_data if articles == 4 else complete_data(sizes)
    monkeypatch.setenv("GPTSMITH_DATA", str(folder))
    source = opened("wikitext")
    train = texts(source.documents())
    assert source.validation is not None
    val = texts(source.validation.documents())
    assert source.used == "wikitext-2"
    assert (len(train), len(val)) == (articles, of_validation)
    assert "".join(train) == (folder / "wikitext-2" / "train.txt").read_text()
    assert "".join(val) == (folder / "wikitext-2" / "valid.txt").read_text()


def test_tinystories(real_data: Path) -> None:
    path = real_data / "tinystories_sample" / "tinystories_10k.txt"
    stories = read(path, document_separator="<|endoftext|>")
    assert len(stories) == 12
    assert "endoftext" not in "".join(stories)
    assert len(read(path)) == 1


def test_rows_of_the_hub_are_streamed(tmp_path: Path) -> None:
    """`datasets` reads a folder as it reads the Hub, which no test may reach."""
    pytest.importorskip("datasets")
    write_rows(tmp_path / "train.jsonl", ROWS)
    rows = hub.hub_rows(hub.HubName(str(tmp_path)), None)
    assert texts(row_documents(rows, ReadOptions(), ReadReport())) == ROWS


def test_configurations_and_splits_of_the_hub_are_listed_where_none_or_another_is_named(
    tmp_path: Path,
) -> None:
    pytest.importorskip("datasets")
    configs = "".join(
        f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("en", "de")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("en", "de"):
        write_rows(tmp_path / f"{name}.jsonl", ROWS)
    for given, listed in (
        ((), "['en', 'de']"),
        (("fr",), "['en', 'de']"),
        (("en", "x"), "['train']"),
    ):
        with pytest.raises(
            ValueError, match=rf"{re.escape(listed)}; write .*:CONFIG:SPLIT$"
        ) as raised:
            next(hub.hub_rows(hub.HubName(str(tmp_path), *given), None))
        assert str(raised.value).startswith(f"{tmp_path}: ")
        assert "\n" not in str(raised.value)
