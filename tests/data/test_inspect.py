import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from gptsmith import files
from gptsmith.data import statistics
from gptsmith.data.inspect import RunReport, draw, histogram, inspect, run_report, show, visible
from gptsmith.data.prepare import PrepareConfig, prepare
from gptsmith.data.shards import FORMAT, fingerprint
from gptsmith.data.statistics import CorpusReport, corpus_report
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.run import Run
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint

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
        "tokenizer": {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint},
        "dtype": tokenizer.dtype.name,
        "splits": splits,
    }
    files.write_json(path / "manifest.json", manifest | {"fingerprint": fingerprint(manifest)})
    return path


def shown(report: CorpusReport | RunReport, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    show(report, console)
    return console.export_text()


@pytest.mark.parametrize(("shard_tokens", "piece"), [(1 << 20, 1 << 22), (11, 1 << 22), (13, 5)])
def test_corpus_is_counted_right_however_it_is_cut(
    shard_tokens: int, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_PIECE", piece)
    tokenizer = Tokenizer.byte()
    report = corpus_report(
        write_corpus(tmp_path / "rings", tokenizer, TRAIN, VAL, shard_tokens), samples=3, context=8
    )
    train, val = report.splits["train"], report.splits["val"]
    assert train.lengths.tolist() == [len(text) for text in TRAIN]
    assert train.tokens == sum(len(text) + 1 for text in TRAIN)
    assert train.shards == -(-train.tokens // shard_tokens)
    assert train.text_bytes == sum(map(len, TRAIN))
    assert (train.documents, train.duplicates) == (6, 2)
    assert (val.documents, val.duplicates, report.leaked) == (2, 0, 1)
    everything = "".join(TRAIN + VAL).encode()
    assert report.counts.sum() == train.tokens + val.tokens
    assert report.counts[ord("n")] == everything.count(b"n")
    assert report.top(1) == [(ord("n"), everything.count(b"n"))]
    assert report.used == len(set(everything)) + 1
    ranked = sorted(report.counts, reverse=True)
    needed = report.needed(0.5)
    assert sum(ranked[:needed]) >= report.counts.sum() / 2 > sum(ranked[: needed - 1])
    fresh = sum(c not in "".join(TRAIN) for c in "".join(VAL))
    assert report.unseen == pytest.approx(fresh / val.tokens)
    assert len(report.samples) == 3
    for sample in report.samples:
        assert len(sample.x) == len(sample.y) == 8
        assert sample.x[1:] == sample.y[:-1]
        shard = np.load(report.path / sample.place)
        assert shard[sample.start : sample.start + 9].tolist() == [*sample.x, sample.y[-1]]


def test_one_document_split_in_two(tmp_path: Path) -> None:
    tokenizer = Tokenizer.char(["to be or not to be"])
    path = write_corpus(tmp_path / "c", tokenizer, ["to be or not"], [" to be"], headless=True)
    report = corpus_report(path)
    assert report.splits["val"].lengths.tolist() == [6]
    assert report.samples[0].x == [tokenizer.eos_id, *tokenizer.encode("to be or no")]
    assert "document lengths" not in shown(report)
    assert "12" in shown(report)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe", "char"])
def test_a_prepared_corpus_agrees_with_its_manifest(tokenizer: str, tmp_path: Path) -> None:
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
    assert "training pairs" in shown(inspect(out))


def test_corpus_is_shown_plainly(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train_bpe(TRAIN * 3, 280)
    path = write_corpus(tmp_path / "rings", tokenizer, TRAIN * 20, VAL)
    report = inspect(path)
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


def test_tokens_are_made_visible() -> None:
    tokenizer = Tokenizer.byte()
    assert [visible(tokenizer, i) for i in b" \n\ta\x00\xe2"] == [
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
    assert histogram(np.array([], np.int64)) == []


def test_picture(tmp_path: Path) -> None:
    report = corpus_report(write_corpus(tmp_path / "rings", Tokenizer.byte(), TRAIN, VAL))
    drawn: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        save = Figure.savefig
        patch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
        picture = draw(report, tmp_path / "rings.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    left, right = drawn[0].axes
    assert (left.get_title(), right.get_title()) == ("document lengths", "token frequencies")
    assert left.get_xlim() == (1, 100)  # 0 to 18 tokens
    assert right.get_xlim()[0] == right.get_ylim()[0] == 1
    assert [label.get_text() for label in right.get_yticklabels()][1:3] == ["1", "10"]
    with pytest.raises(ValueError, match=r"rings\.pdf: .* ends in \.png"):
        draw(report, tmp_path / "rings.pdf")


def test_what_is_no_corpus_and_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no run folder"):
        inspect(tmp_path)
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="unfinished"):
        inspect(tmp_path)


def test_ids_that_the_tokenizer_does_not_have(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "rings", Tokenizer.byte(), TRAIN, VAL)
    shard = np.load(path / "train-00000.npy")
    shard[7] = 300
    np.save(path / "train-00000.npy", shard)
    with pytest.raises(ValueError, match=r"train-00000\.npy: holds token id 300, .* ends at 256"):
        inspect(path)


def test_run_is_reported(tmp_path: Path) -> None:
    tokenizer = Tokenizer.byte()
    config = ModelConfig.preset("nano", vocab_size=tokenizer.vocab_size)
    with Run.create(tmp_path / "run", {"data": {"path": "x"}}, config, tokenizer) as run:
        pass
    model = GPTModel(config)
    assert "unfinished" in shown(inspect(run.path))
    assert "none" in shown(inspect(run.path)).splitlines()[-1]

    events = [
        {"event": "train", "step": 5, "train_loss": 5.5, "tokens": 1280, "learning_rate": 1e-3},
        {"event": "val", "step": 5, "val_loss": 5.25},
        {"event": "train", "step": 10, "train_loss": 4.5, "tokens": 2560, "learning_rate": 5e-4},
        {"event": "val", "step": 10, "val_loss": 5.75},
    ]
    run.metrics.write_text("".join(json.dumps(event) + "\n" for event in events))
    groups = {"model": model.state_dict(), "optimizer": {"m": torch.zeros(4)}}
    for step in (5, 10):
        stored = checkpoint.save(run.checkpoints, step, groups, {})
    (stored / "optimizer.safetensors").write_bytes(b"cut short")
    (run.checkpoints / "step-000011").write_text("no checkpoint")
    checkpoint.save_tensors(run.weights, model.state_dict())

    report = run_report(run.path)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.metrics["step"] == 10
    assert report.metrics["train_loss"] == 4.5
    assert report.best == (5.25, 5)
    assert [(s.step, s.damage is None) for s in report.checkpoints] == [(5, True), (10, False)]
    assert report.checkpoints[0].size > 4 * report.parameters
    text = " ".join(shown(inspect(run.path), 200).split())
    for part in (
        "1 layers, 64 wide, 2 heads of 32",
        "mask causal()",
        f"{report.parameters:,}",
        "train_loss 4.5",
        "best val_loss 5.2500 at step 5",
        "step 5",
        "damaged",
        "optimizer.safetensors",
        "model.safetensors",
    ):
        assert part in text, part
