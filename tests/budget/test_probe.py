"""A scaling law from two short runs, on a machine that is taken to have a known speed."""

from collections.abc import Iterator
from pathlib import Path

import prepared
import pytest
import torch

from gptsmith.budget import probe as probing
from gptsmith.budget.machine import Machine
from gptsmith.budget.probe import probe
from gptsmith.budget.scaling_law import Point
from gptsmith.budget.step_time import Cluster
from gptsmith.data.shards import Corpus

DOCS = Path(__file__).resolve().parents[2] / "docs"
MACHINE = Machine("box", "cpu", Cluster(peak=100e9, memory=20e9), 2**33, shares={2: 0.5})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepared.run(tmp_path_factory.mktemp("probe") / "corpus", DOCS)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads wait for each other where other tests compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_law_from_either_run_of_the_probe_predicts_the_other(
    corpus: Corpus, one_thread, monkeypatch, capsys
) -> None:
    seen: list[Point] = []
    scaled = probing.scaled

    def record(points, bytes_per_token):
        seen.extend(points)
        return scaled(points, bytes_per_token)

    monkeypatch.setattr(probing, "scaled", record)
    law = probe(corpus, 8, MACHINE)
    assert len(seen) == 2
    assert seen[0].N < seen[1].N
    assert all(1 < run.loss < 5 for run in seen)  # of bytes after tens of steps; 5.55 before
    train = corpus.manifest["splits"]["train"]
    for known, held_out in (seen, seen[::-1]):
        N, D, loss = held_out
        one = scaled([known], train["bytes"] / train["tokens"])
        assert one.loss(N, D) == pytest.approx(loss, rel=0.2)
    assert law.loss(1e6, 1e7) < min(loss for *_, loss in seen)
    assert capsys.readouterr().out == ""


def test_too_short_a_probe_is_a_one_line_error(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="--probe 1s is too short for 20 steps here: give more"):
        probe(corpus, 1, MACHINE)


def test_a_corpus_that_is_too_small_is_named(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    prepared.write_jsonl(text, ["a few words " * 20] * 20)
    small = prepared.run(tmp_path / "corpus", text)
    message = rf"corpus: {small.train_tokens:,} training tokens are too few for --probe"
    with pytest.raises(ValueError, match=message):
        probe(small, 60, MACHINE)
