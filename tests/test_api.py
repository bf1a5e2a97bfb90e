"""The library: pretrain, finetune, load, generate, chat, evaluate."""

import json
from pathlib import Path

import pytest
import torch
from runs import events, random_run

import gptsmith
from gptsmith import cli
from gptsmith.model.config import ModelConfig

TRAIN = {"steps": 6, "batch_size": 4, "precision": "fp32", "compile": "off", "device": "cpu"}
QUIET = {"monitor": {"trackers": "none"}, "eval": {"interval": 0, "sample_tokens": 0}}


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> gptsmith.LoadedRun:
    model = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 64}
    out = tmp_path_factory.mktemp("runs") / "base"
    return gptsmith.pretrain(data=corpus, out=out, model=model, train=TRAIN, **QUIET)


def test_pretrain_equals_the_command_with_the_same_options(
    corpus: Path, base: gptsmith.LoadedRun, tmp_path: Path
) -> None:
    argv = ["pretrain", "--data", str(corpus), "--out", str(tmp_path / "run")]
    argv += ["--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "16"]
    argv += ["--model.context-length", "64", "--train.steps", "6", "--train.batch-size", "4"]
    argv += ["--train.precision", "fp32", "--train.compile", "off", "--train.device", "cpu"]
    argv += ["--monitor.trackers", "none", "--eval.interval", "0", "--eval.sample-tokens", "0"]
    assert cli.main(argv) == 0
    other = gptsmith.load(tmp_path / "run", device="cpu")
    for a, b in zip(base.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_generate_gives_a_text_for_a_text_and_a_list_for_a_list(base: gptsmith.LoadedRun) -> None:
    one = base.generate("The", max_new_tokens=8, seed=3)
    assert isinstance(one, str)
    assert one
    assert base.generate(["The", "A"], max_new_tokens=8, seed=3)[0] == one
    assert base.generate(("The",), max_new_tokens=8, seed=3, stop=[one[0]]) == [""]


def test_evaluate_is_the_last_validation(base: gptsmith.LoadedRun) -> None:
    found = base.evaluate()
    assert list(found) == ["perplexity"]
    assert found["perplexity"].metrics["val_loss"] > 0


def test_a_classifier_is_evaluated_on_labelled_texts(tmp_path: Path) -> None:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 16, "vocab_size": 257}
    random_run(tmp_path / "run", ModelConfig(**sizes, labels=("ham", "spam")))
    (tmp_path / "texts.csv").write_text("label,text\nham,Hello.\nspam,Buy now!\n")
    found = gptsmith.load(tmp_path / "run").evaluate(data=str(tmp_path / "texts.csv"))
    assert found["classify"].n == 2


def test_a_preset_is_named_as_in_a_recipe(corpus: Path, tmp_path: Path) -> None:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 32}
    run = gptsmith.pretrain(
        data=corpus, out=tmp_path / "run", model={"preset": "gpt2", **sizes}, train=TRAIN, **QUIET
    )
    assert run.model.config.position == "learned"
    assert run.model.config.n_embd == 16


def test_finetune_makes_a_chat_model_that_replies(base: gptsmith.LoadedRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a chat model: gptsmith.finetune"):
        base.chat("Hello")
    chat = gptsmith.finetune(
        "chat", base=base.run.path, data="skills", questions=40, out=tmp_path / "chat",
        train=TRAIN, **QUIET,
    )  # fmt: skip
    pieces: list[str] = []
    reply = chat.chat("Repeat after me: hello", max_new_tokens=12, on_text=pieces.append)
    assert "".join(pieces) == reply
    assert (
        chat.chat([{"role": "user", "content": "Repeat after me: hello"}], max_new_tokens=12)
        == reply
    )


def test_finetune_on_preferences(base: gptsmith.LoadedRun, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(20)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    preferred = gptsmith.finetune(
        "preference", base=base.run.path, data=tmp_path / "pairs.json", out=tmp_path / "preferred",
        pairs_per_step=4, optim={"learning_rate": 0.01}, train=TRAIN,
        **QUIET | {"eval": {"interval": 3, "sample_tokens": 0}},
    )  # fmt: skip
    first, *_, last = events(preferred.run.path, "val")
    assert last["val_loss"] < first["val_loss"]
    assert isinstance(preferred.chat("1?", max_new_tokens=4), str)


def test_wrong_fields_are_rejected_as_on_the_command_line(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean --train.steps"):
        gptsmith.pretrain(data=corpus, out=tmp_path / "run", train={"step": 3})
    with pytest.raises(ValueError, match="give out="):
        gptsmith.pretrain(data=corpus)
    assert not (tmp_path / "run").exists()
