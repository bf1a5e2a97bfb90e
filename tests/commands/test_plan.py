"""`gptsmith plan`, and `pretrain` with the recipe that it writes."""

import json
import os
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import prepared
import pytest
import yaml
from runs import GPTSMITH, events

from gptsmith.budget import machine, probe, rules
from gptsmith.budget.machine import Machine, MeasuredStep
from gptsmith.budget.step_time import Cluster
from gptsmith.commands import plan
from gptsmith.config import load_config
from gptsmith.data.shards import Corpus
from gptsmith.recipes.options import PretrainConfig
from gptsmith.run import Run
from gptsmith.train import runtime


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
    gptsmith("pretrain", "recipe.yaml")
    run = Run.open(tmp_path / recipe["out"])
    c = run.model_config
    assert c == rules.shape(c.n_layer, corpus.tokenizer.vocab_size)
    last = events(run.path, "train")[-1]
    assert last["step"] == recipe["train"]["steps"]
    assert last["tokens"] == pytest.approx(20_000, abs=recipe["train"]["total_batch_tokens"])
    peak = max(event["peak_memory_mb"] for event in events(run.path, "val"))
    assert chosen["memory"] / 1e6 == pytest.approx(peak, rel=0.1)


def test_a_size_that_does_not_fit_is_said(capsys) -> None:
    text = said(capsys, "--device", "t4", "--params", 10**13)
    assert "10T parameters do not fit: this is the largest model that does" in text.replace(
        "\n", " "
    )


def test_fewer_tokens_than_a_step_are_said(capsys) -> None:
    few = "is less than one step, which is planned: 2,048"
    assert few in said(capsys, "--device", "t4", "--tokens", 500)
    assert few not in said(capsys, "--device", "t4", "--tokens", 2048)


def test_a_probe_is_advised_with_the_options_that_are_missing(corpus: Corpus, capsys) -> None:
    text = said(capsys, "--device", "t4", "--corpus-tokens", 10**6)
    assert "corpus; --data CORPUS --probe 60s fits one" in text
    assert "corpus; --probe 60s fits one" in said(capsys, "--device", "t4", "--data", corpus.path)


def test_a_machine_that_is_not_here(capsys, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    words = ["--device", "h100", "--count", 8, "--time", "1h", "--price-per-hour", 2, "--out", out]
    text = said(capsys, *words)
    assert "8 x H100, an estimate" in text
    assert "torchrun --nproc-per-node 8 -m gptsmith pretrain" in text
    cost = next(line for line in text.splitlines() if line.startswith("cost"))
    assert "16.0" in cost or "15.9" in cost  # eight devices, an hour, 2 each
    table = text[text.index("layers x width") : text.index("tokens per parameter")]
    assert max(map(len, table.splitlines())) <= 80  # it fits a terminal
    train = yaml.safe_load(out.read_text())["train"]
    T = yaml.safe_load(out.read_text())["model"]["context_length"]
    assert train["total_batch_tokens"] % (8 * train["batch_size"] * T) == 0


def test_several_machines_are_named_in_the_command(capsys, tmp_path: Path) -> None:
    words = ["--device", "h100", "--count", 64, "--time", "1h", "--out", tmp_path / "recipe.yaml"]
    text = " ".join(said(capsys, *words).split())
    assert "on each machine, torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d" in text


def test_pretrain_takes_a_recipe_that_divides_the_model(capsys, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    words = ["--device", "t4", "--count", 8, "--params", 1_500_000_000, "--out", out]
    assert "divided among the devices (train.shard)" in said(capsys, *words)
    recipe = [str(out), "--data", "x", "--out", "y"]
    assert load_config(PretrainConfig, recipe, prog="gptsmith pretrain").train.shard


def test_json_says_what_the_table_says(capsys) -> None:
    words = ["--device", "l4", "--count", 2, "--time", "2h", "--price-per-hour", 3]
    text = said(capsys, *words)
    plan = json.loads(said(capsys, *words, "--format", "json"))
    chosen = plan["runs"][plan["chosen"]]
    assert chosen["cost"] == pytest.approx(2 * 3 * chosen["seconds"] / 3600)
    assert f"{chosen['cost']:,.2f}" in text
    assert f"{chosen['tokens_per_parameter']:.1f} tokens per parameter" in text
    assert f"assumed to reach {chosen['share_of_peak']:.0%}" in " ".join(text.split())
    assert f"vocabulary {chosen['vocab_size']:,}: gptsmith prepare" in text
    assert plan["remarks"]
    for remark in plan["remarks"]:
        assert remark in text


@pytest.mark.parametrize("words", ["--time 1h", "--time 1h --device h100 --count 8"])
def test_a_probe_is_sized_by_the_eager_steps_of_this_machine(
    corpus: Corpus, capsys, monkeypatch, words: str
) -> None:
    """Whatever is planned for, and although the run that is planned will be compiled."""
    here = Machine("here", "cpu", Cluster(peak=1e11, memory=2e10), 2**33)
    measured: list[bool] = []
    probed: list[Machine] = []

    def measure_step(c, B, micro_batches=1, *, compile=False, **_) -> MeasuredStep:
        measured.append(compile)
        design = rules.design(c.n_layer, c.vocab_size, 1e6, B)
        step = replace(here, shares={2: 0.8 if compile else 0.4}).step_seconds(design)
        return MeasuredStep(step, step + 30 * compile)

    monkeypatch.setattr(machine, "measure_step", measure_step)
    monkeypatch.setattr(machine, "this_machine", lambda *_: here)
    monkeypatch.setattr(runtime, "choose_compile", lambda *_: (True, ""))
    monkeypatch.setattr(probe, "probe", lambda corpus, seconds, on: probed.append(on))
    said(capsys, "--data", corpus.path, "--probe", "9s", *words.split())
    [used] = probed
    assert used.name == "here"
    assert sorted(used.shares) == [2, 4]
    assert all(0.2 < share < 0.6 for share in used.shares.values())
    assert any(measured) == ("--device" not in words)


@pytest.mark.parametrize(
    ("text", "size"),
    [("500B", 500), ("2k", 2048), ("1.5 GiB", 3 * 2**29), ("4Gi", 2**32), ("1TB", 2**40), ("7", 7)],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert plan._bytes(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5h", 5400), (".5 d", 43_200), ("1h30m", 5400), ("2 min 5s", 125)],
)
def test_times_are_read_with_their_units(text: str, seconds: float) -> None:
    assert plan._seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "count"), [("10M", 10**7), ("2.5k", 2500), ("1 b", 10**9), (7, 7)]
)
def test_counts_are_read_with_their_units(text: str | int, count: int) -> None:
    assert plan.PlanOptions(params=text).params == count  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--time 30mb", "--time: should be a number with a unit, such as 90s, 30m, 1h30m, 2h"),
        ("--time 1dib", "--time: should be a number with a unit"),
        ("--time 1h30", "--time: should be a number with a unit"),
        ("--params 10X", "--params: should be a valid integer"),
        ("--memory 500iB", "--memory: should be a number with a unit, such as 800M or 4G"),
        ("--device h100 --count 12", "--count 12: more than 8 are in machines of 8"),
        ("--time 30x", "--time: should be a number with a unit, such as 90s, 30m, 1h30m, 2h"),
        ("--memory lots", "--memory: should be a number with a unit, such as 800M or 4G"),
        ("--time 30m --tokens 5", "time and tokens are both given: give one budget"),
        ("--count 8", "count 8 needs device"),
        ("--probe 60s", "probe needs data"),
        ("--out plan.txt", "out 'plan.txt' should end with .yaml"),
        ("--device abacus", "--device 'abacus': choose from h200"),
        ("--data nowhere", "nowhere: no prepared corpus here"),
        (
            "--device h100 --corpus-tokens 100",
            "a corpus of 100 training tokens is too small: a step takes 2,048",
        ),
        (
            "--device h100 --memory 1M",
            "start of the command, takes 78 s and 3 MB of memory",
        ),
        ("--device h100 --memory 1T", "--memory: H100 has 80 GB"),
        ("--device h100 --out nowhere/plan.yaml", "--out nowhere/plan.yaml: no such folder"),
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
