import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from gptsmith import files
from gptsmith.data.options import PrepareConfig
from gptsmith.data.prepare import prepare
from gptsmith.data.shards import FORMAT, fingerprint
from gptsmith.inspect import statistics
from gptsmith.inspect.corpus import draw_corpus, show_corpus, visible_token
from gptsmith.inspect.render import histogram
from gptsmith.inspect.statistics import CorpusReport, corpus_report
from gptsmith.tokenizer import Tokenizer

TRAIN = ["one ring", "", "two rings of iron", "one ring", "a [bold] ring\n\x1b[31m", "one ring"]
VAL = ["one ring", "quiet jade"]


def write_corpus(
    path: Path,
    tokenizer: Tokenizer,
    train: list[str],
    val: list[str],
    shard_tokens: int = 1 << 20,
    headless: bool = False,
) -> Path:
    """A corpus as `prepare` leaves it; headless: no <|endoftext|> before the first val document."""
    path.mkdir()
    tokenizer.save(path)
    splits = {}
    for name, texts in (("train", train), ("val", val)):
        parts = [part for text in texts for part in ([tokenizer.eos_id], tokenizer.encode(text))]
        stream = np.concatenate(parts[headless and name == "val" :]).astype(tokenizer.dtype)
        shards = []
        for start in range(0, len(stream), shard_tokens):
            file = path / f"{name}-{len(shards):05d}.npy"
            np.save(file, stream[start : start + shard_tokens])
            tokens = min(shard_tokens, len(stream) - start)
            shards.append({"file": file.name, "tokens": tokens, "sha256": files.sha256(file)})
        size = len("".join(texts).encode())
        splits[name] = {
            "shards": shards,
            "tokens": len(stream),
            "documents": len(texts),
            "bytes": size,
        }
    manifest = {
        "format": FORMAT,
        "name": path.name,
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        },
        "dtype": tokenizer.dtype.name,
        "splits": splits,
    }
    files.write_json(path / "manifest.json", manifest | {"fingerprint": fingerprint(manifest)})
    return path


def shown(report: CorpusReport, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    show_corpus(report, console)
    return console.export_text()


@pytest.mark.parametrize(("shard_tokens", "chunk"), [(1 << 20, 1 << 22), (11, 1 << 22), (13, 5)])
def test_statistics_do_not_depend_on_shards_or_chunks(
    shard_tokens: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_CHUNK", chunk)
    tokenizer = Tokenizer.byte()
    report = corpus_report(
        write_corpus(tmp_path / "rings", tokenizer, TRAIN, VAL, shard_tokens), pairs=3, context=8
    )
    train, val = report.splits["train"], report.splits["val"]
    assert train.lengths.tolist() == [len(text) for text in TRAIN]
    assert train.tokens == sum(len(text) + 1 for text in TRAIN)
    assert train.shards == -(-train.tokens // shard_tokens)
    assert train.text_bytes == sum(map(len, TRAIN))
    assert (train.documents, train.duplicates) == (6, 2)
    assert (val.documents, val.duplicates, report.contaminated) == (2, 0, 1)
    everything = "".join(TRAIN + VAL).encode()
    assert report.counts.sum() == train.tokens + val.tokens
    assert report.counts[ord("n")] == everything.count(b"n")
    assert report.most_frequent(1) == [(ord("n"), everything.count(b"n"))]
    assert report.used_ids == len(set(everything)) + 1
    ranked = sorted(report.counts, reverse=True)
    count = report.ids_covering(0.5)
    assert sum(ranked[:count]) >= report.counts.sum() / 2 > sum(ranked[: count - 1])
    fresh = sum(c not in "".join(TRAIN) for c in "".join(VAL))
    assert report.unseen_share == pytest.approx(fresh / val.tokens)
    assert len(report.pairs) == 3
    for pair in report.pairs:
        assert len(pair.x) == len(pair.y) == 8
        assert pair.x[1:] == pair.y[:-1]
        shard = np.load(report.path / pair.file)
        assert shard[pair.start : pair.start + 9].tolist() == [*pair.x, pair.y[-1]]


def test_one_document_split_between_train_and_val(tmp_path: Path) -> None:
    tokenizer = Tokenizer.char(["to be or not to be"])
    path = write_corpus(tmp_path / "c", tokenizer, ["to be or not"], [" to be"], headless=True)
    report = corpus_report(path)
    assert report.splits["val"].lengths.tolist() == [6]
    assert report.pairs[0].x == [tokenizer.eos_id, *tokenizer.encode("to be or no")]
    assert "document lengths" not in shown(report)
    assert "12" in shown(report)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe", "char"])
def test_statistics_agree_with_the_manifest(tokenizer: str, tmp_path: Path) -> None:
    text = tmp_path / "rings.txt"
    text.write_text("\n\n".join(f"Ring {i % 7} is round, n\u00e4mlich." for i in range(200)))
    out = prepare(
        PrepareConfig(
            sources=(str(text),),
            out=tmp_path / "corpus",
            tokenizer=tokenizer,
            vocab_size=300 if tokenizer == "bpe" else None,
            document_separator="\\n\\n",
            shard_tokens=500,
        )
    )
    report = corpus_report(out)
    for name, split in report.splits.items():
        record = report.manifest["splits"][name]
        assert split.tokens == record["tokens"]
        assert split.documents == record["documents"]
        assert split.text_bytes == record["bytes"]
        assert split.shards == len(record["shards"])
    assert report.splits["train"].duplicates >= report.splits["train"].documents - 7
    assert "training pairs" in shown(corpus_report(out))


def test_report_is_printed_without_control_characters(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train_bpe(TRAIN * 3, 280)
    path = write_corpus(tmp_path / "rings", tokenizer, TRAIN * 20, VAL)
    report = corpus_report(path)
    text = shown(report)
    for part in (
        "corpus rings",
        "bpe, ",
        "make up 90%",
        "val documents also in train",
        "116 (96.7%)",  # of 120 training documents, four are different
        "document lengths",
        "█",
        "most frequent tokens",
        "[bold]",
        "training pairs",
        "train-00000.npy, token",
        "<|endoftext|>",
    ):
        assert part in text, part
    assert "\x1b" not in text
    assert "\\x1b" in text
    assert not [line for line in text.split("\n") if line.endswith(" ")]
    assert max(map(len, shown(report, 60).splitlines())) <= 60


def test_visible_token_spells_out_spaces_and_bytes() -> None:
    tokenizer = Tokenizer.byte()
    assert [visible_token(tokenizer, i) for i in b" \n\ta\x00\xe2"] == [
        "·",
        "⏎",
        "⇥",
        "a",
        "\\x00",
        "\\xe2",
    ]


def test_histogram_covers_every_length() -> None:
    lengths = np.array([0, 1, 2, 3, 4, 1000])
    assert histogram(lengths)[:4] == [(0, 0, 1), (1, 1, 1), (2, 3, 2), (4, 7, 1)]
    assert histogram(lengths)[-1] == (512, 1023, 1)
    assert histogram(np.array([5, 4])) == [(4, 7, 2)]


def test_picture_shows_lengths_and_frequencies(tmp_path: Path) -> None:
    name = "rings $x$ \x1b"
    report = corpus_report(write_corpus(tmp_path / name, Tokenizer.byte(), TRAIN, VAL))
    drawn: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        save = Figure.savefig
        patch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
        picture = draw_corpus(report, tmp_path / "rings.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    title = drawn[0].get_suptitle()
    assert title.startswith(r"rings \$x\$ \x1b: ")
    left, right = drawn[0].axes
    assert (left.get_title(), right.get_title()) == ("document lengths", "token frequencies")
    assert left.get_xlim() == (1, 100)  # 0 to 18 tokens
    assert right.get_xlim()[0] == right.get_ylim()[0] == 1
    assert [label.get_text() for label in right.get_yticklabels()][1:3] == ["1", "10"]
    with pytest.raises(ValueError, match=r"rings\.pdf: .* ends in \.png"):
        draw_corpus(report, tmp_path / "rings.pdf")


def test_token_id_outside_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "rings", Tokenizer.byte(), TRAIN, VAL)
    shard = np.load(path / "train-00000.npy")
    shard[7] = 300
    np.save(path / "train-00000.npy", shard)
    manifest = files.read_json(path / "manifest.json")
    manifest["splits"]["train"]["shards"][0]["sha256"] = files.sha256(path / "train-00000.npy")
    files.write_json(path / "manifest.json", manifest | {"fingerprint": fingerprint(manifest)})
    with pytest.raises(ValueError, match=r"train-00000\.npy: holds token id 300, .* ends at 256"):
        corpus_report(path)
