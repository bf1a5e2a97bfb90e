"""The time of a probe, on a machine that is taken to have a known speed."""

from pathlib import Path

import prepared
import pytest

from gptsmith.budget.machine import Machine
from gptsmith.budget.probe import probe
from gptsmith.budget.step_time import Cluster
from gptsmith.data.shards import Corpus

DOCS = Path(__file__).resolve().parents[2] / "docs"
MACHINE = Machine("box", "cpu", Cluster(peak=100e9, memory=20e9), 2**33, shares={2: 0.5})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepared.run(tmp_path_factory.mktemp("probe") / "corpus", DOCS)


def test_too_short_a_probe_is_a_one_line_error(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="--probe 1s is too short for 20 steps here: give more"):
        probe(corpus, 1, MACHINE)
