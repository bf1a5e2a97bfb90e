"""Resuming a run: when it is allowed, with which recipe, and what is said otherwise."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from stopped_run import CONFIG, SMALL, TOKENIZER, create, flip, save

from gptsmith.model.config import ModelConfig
from gptsmith.recipes.options import ChatConfig, PretrainConfig
from gptsmith.run import Run
from gptsmith.run.create import open_for_training
from gptsmith.run.resume import final_step, recipe_changes, stored_recipe
from gptsmith.tokenizer import Tokenizer


def test_config_of_a_resumed_run_does_not_contain_resume(stopped: Path) -> None:
    open_for_training(
        stopped, {**CONFIG, "resume": True}, SMALL, TOKENIZER, True, corpus="c0ffee"
    ).close()
    assert Run.open(stopped).config["resume"] is False


def test_resume_without_a_run_or_checkpoint(tmp_path: Path, stopped: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing to resume: there is no run folder .*absent"):
        create(tmp_path / "absent", resume=True)
    assert not (tmp_path / "absent").exists()
    with pytest.raises(ValueError, match=r"nothing to resume: .* is a folder of runs"):
        create(tmp_path, resume=True)
    shutil.rmtree(stopped / "checkpoints")
    (stopped / "metrics.jsonl").write_text('{"event": "train", "step": 10}\n')
    with pytest.raises(ValueError, match=r"nothing to resume: .* has no checkpoints; .* --from"):
        create(stopped, resume=True)
    with pytest.raises(FileExistsError, match="contains a run"):
        create(stopped)


def test_resume_rejects_changes_with_a_diff(stopped: Path) -> None:
    before = (stopped / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"settings: model\.n_layer: 2 -> 6; use the old") as e:
        create(stopped, SMALL.change(n_layer=6), resume=True)
    assert "\n" not in str(e.value)
    changed = r"settings: fingerprint of the training data"
    with pytest.raises(ValueError, match=rf"{changed}: c0ffee -> beef"):
        create(stopped, resume=True, corpus="beef")
    with pytest.raises(ValueError, match="c0ffee -> c0ffee"):  # of validation data, say
        create(stopped, resume=True, corpus="c0ffee" + 58 * "1")
    with pytest.raises(ValueError, match=r"settings: tokenizer: [0-9a-f]{12} -> [0-9a-f]{12}"):
        create(stopped, resume=True, tokenizer=Tokenizer.char(["abc"]))
    (stopped / "digests.json").unlink()  # edited by hand
    (stopped / "corpus.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"{changed}: None -> c0ffee"):
        create(stopped, resume=True)
    (stopped / "corpus.json").unlink()
    for step in (0, 10, 20):
        flip(stopped / f"checkpoints/step-{step:06d}/model.safetensors")
    with pytest.raises(ValueError, match="every checkpoint"):
        open_for_training(
            stopped, {**CONFIG, "title": "new"}, SMALL, TOKENIZER, True, corpus="c0ffee"
        )
    assert (stopped / "config.yaml").read_bytes() == before
    for step in (0, 10, 20):
        flip(stopped / f"checkpoints/step-{step:06d}/model.safetensors")
    create(stopped, resume=True).close()
    (stopped / "digests.json").unlink()
    (stopped / "tokenizer.json").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokenizer\.json.* not JSON"):
        create(stopped, resume=True)


def test_recipe_changes(tmp_path: Path) -> None:
    model = ModelConfig.preset("tiny", vocab_size=300).model_dump(mode="json")
    train = {"steps": 500, "precision": "fp32", "num_threads": 2, "seed": 0, "compile": "off"}
    stored = {"data": "data/x", "model": model, "train": train, "optim": {"learning_rate": 0.0003}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))

    def changes(text: str, *flags: str) -> list[str]:
        (tmp_path / "recipe.yaml").write_text(text)
        files = tmp_path / "recipe.yaml", tmp_path / "config.yaml"
        return recipe_changes(*files, PretrainConfig, set(flags))

    longer = (
        "model: tiny\noptim: {learning_rate: 3e-4}\n"
        "train: {steps: 2000, precision: auto, num_threads: none}\n"
    )
    assert changes(longer, "train.steps") == []
    assert changes(longer) == ["train.steps: 500 -> 2000"]
    wider = "model: {preset: tiny, n_embd: 64}"
    assert changes(wider, "train") == [
        "model.n_embd: 128 -> 64", "model.head_dim: 32 -> 16", "model.d_ff: 512 -> 256",
    ]  # fmt: skip
    assert changes(wider, "model") == []
    # the same values, spelled otherwise; and what the run has by default
    for same in (
        "data: ./data/x/", "train: {compile: off}", "train: {compile: 'off'}",
        "train: {tokens: none, epochs: ~}", "train: {steps: 5e2}", "train: {seed: 0}",
        "optim: {learning_rate: .0003}", "optim: {learning_rate: 0.30e-3}", "document_mask: no",
        "model: {n_layer: 2, mask: 'causal()'}", "eval: {interval: 100}", "out: elsewhere",
        "model: {preset: tiny, tie_embeddings: yes}" if model["tie_embeddings"] else "model: tiny",
    ):  # fmt: skip
        assert changes(same) == [], same
    assert changes("data: data/y") == ["data: data/x -> data/y"]
    assert changes("train: {compile: on}") == ["train.compile: off -> on"]
    assert changes("document_mask: yes") == ["document_mask: False -> True"]
    assert changes("eval: {interval: 50}") == ["eval.interval: 100 -> 50"]


def test_the_file_of_a_mask_may_have_another_name_than_the_copy(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {mask: 'mask.py:near'}")
    (tmp_path / "recipe.yaml").write_text("model: {mask: 'my/own.py:near'}")
    files = tmp_path / "recipe.yaml", tmp_path / "config.yaml"
    assert recipe_changes(*files, PretrainConfig, set()) == []
    (tmp_path / "recipe.yaml").write_text("model: {mask: 'my/own.py:far'}")
    assert recipe_changes(*files, PretrainConfig, set()) == [
        "model.mask: mask.py:near -> mask.py:far"
    ]


def test_stored_recipe(tmp_path: Path) -> None:
    stopped, config = tmp_path / "run", {"stage": "pretrain", "train": {"steps": 20}}
    with open_for_training(stopped, config, SMALL, TOKENIZER) as run:
        save(run, 0)
    own = str(stopped / "config.yaml")

    def words(
        *given: str, flags: Sequence[str] = (), out: Path = stopped, kind: Any = PretrainConfig
    ) -> list[str]:
        return stored_recipe(out, given, {"resume", "out", *flags}, kind)

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"train": {"steps": 20}}))
    assert words(str(recipe), flags=["train.seed"]) == words() == [own]
    assert words("a.yaml", "b.yaml") == ["a.yaml", "b.yaml"], "for load_config to reject"
    assert words("oops") == ["oops"]
    with pytest.raises(ValueError, match=r"nothing to resume: there is no run folder"):
        words(out=tmp_path / "absent")
    recipe.write_text("train:\n  steps: 40\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml is not what .* train\.steps: 20 -> 40; "):
        words(str(recipe))
    assert words(str(recipe), flags=["train.steps"]) == [own]
    with pytest.raises(ValueError, match=r"was made by gptsmith pretrain: resume it with that"):
        words(kind=ChatConfig)


def test_a_forgotten_resume_says_what_the_run_is_and_how_to_go_on(stopped: Path) -> None:
    run = Run.open(stopped)
    with pytest.raises(
        FileExistsError, match=r"unfinished run, at step 20: gptsmith pretrain --out"
    ):
        create(stopped)
    run.finish()
    assert final_step(stopped) == 20
    with pytest.raises(
        FileExistsError,
        match=r"run that ended at step 20: gptsmith pretrain --out \S+ --resume --train\.steps N ",
    ):
        create(stopped)
    with create(stopped, resume=True) as run:  # trained further
        save(run, 1030)
    with pytest.raises(FileExistsError, match=r"unfinished run, at step 1,030: "):
        create(stopped)


def test_a_resumed_run_knows_what_changed(stopped: Path) -> None:
    config = {**CONFIG, "train": {"steps": 40, "seed": 1}, "new": 3, "resume": True}
    with open_for_training(stopped, config, SMALL, TOKENIZER, True, corpus="c0ffee") as run:
        assert run.changes == ["train.steps: 20 -> 40"]
