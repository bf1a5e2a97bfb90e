"""`gptsmith plan`, and `pretrain` with the recipe that it writes."""

import json
import os
import random
import subprocess
from pathlib import Path

import prepared
import pytest
import yaml
from runs import GPTSMITH, events

from gptsmith.budget import rules
from gptsmith.commands import plan
from gptsmith.data.shards import Corpus
from gptsmith.run import Run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("plan")
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "home", "again"]
    documents = [" ".join(rng.choices(words, k=60)) for _ in range(300)]
    return prepared.run(folder / "corpus", prepared.write_jsonl(folder / "text.jsonl", documents))


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert plan.main([*map(str, words)]) == 0
    return "\n".join(capsys.readouterr())


def test_pretrain_runs_the_recipe_as_it_is(corpus: Corpus, tmp_path: Path) -> None:
    """The two real commands; memory is what was said."""
    words = ["plan", "--data", str(corpus.path), "--tokens", "20000", "--out", "recipe.yaml"]
    words += ["--format", "json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def gptsmith(*words: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [*GPTSMITH, *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done

    done = gptsmith(*words)
    assert "wrote recipe.yaml; next: gptsmith pretrain recipe.yaml" in done.stderr
    plan = json.loads(done.stdout)
    chosen = plan["runs"][plan["chosen"]]
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    gptsmith("pretrain", "recipe.yaml", "--monitor.trackers", "none")
    run = Run.open(tmp_path / recipe["out"])
    c = run.model_config
    assert c == rules.shape(c.n_layer, corpus.tokenizer.vocab_size)
    last = events(run.path, "train")[-1]
    assert last["step"] == recipe["train"]["steps"]
    assert last["tokens"] == pytest.approx(20_000, abs=recipe["train"]["total_batch_tokens"])
    peak = max(event["peak_memory_mb"] for event in events(run.path, "val"))
    assert chosen["memory"] / 1e6 == pytest.approx(peak, rel=0.1)


def test_a_machine_that_is_not_here(capsys, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    words = ["--device", "h100", "--count", 8, "--time", "1h", "--price-per-hour", 2, "--out", out]
    text = said(capsys, *words)
    assert "8 x H100, an estimate" in text
    assert "torchrun --nproc-per-node 8 -m gptsmith pretrain" in text
    chosen = next(line for line in text.splitlines() if line.startswith("*"))
    assert "16.0" in chosen or "15.9" in chosen  # eight devices, an hour, 2 each
    train = yaml.safe_load(out.read_text())["train"]
    T = yaml.safe_load(out.read_text())["model"]["context_length"]
    assert train["total_batch_tokens"] % (8 * train["batch_size"] * T) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--time 30x", "--time: should be a number with a unit, such as 90s, 30m, 2h or 1d"),
        ("--memory lots", "--memory: should be a number with a unit, such as 800M or 4G"),
        ("--time 30m --tokens 5", "time and tokens are both given: give one budget"),
        ("--count 8", "count 8 needs device"),
        ("--probe 60s", "probe needs data"),
        ("--out plan.txt", "out 'plan.txt' should end with .yaml"),
        ("--device abacus", "--device 'abacus': choose from h200"),
        ("--data nowhere", "nowhere: no prepared corpus here"),
        ("--device h100 --memory 1M", "nothing can be trained with this budget"),
    ],
)
def test_wrong_input_is_a_one_line_error(words: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        plan.main(words.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine\.yaml exists"):
        plan.main(["--device", "h100", "--out", str(out)])
    assert out.read_text() == "mine"
