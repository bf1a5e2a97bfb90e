"""The folder that every stage reads and writes: creating, opening, resuming, its weights."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stopped_run import CONFIG, SMALL, TOKENIZER, create, flip, model_of, same, save

from gptsmith.model.gpt import GPTModel
from gptsmith.run import Run, layout
from gptsmith.train import checkpoint

# making and opening


def test_create_and_open(tmp_path: Path) -> None:
    with create(tmp_path / "runs" / "deep") as made:
        assert made.model_config == SMALL
    run = Run.open(str(tmp_path / "runs" / "deep"))
    assert run.config == CONFIG
    assert list(run.config) == list(CONFIG), "in the order of the configuration"
    assert run.model_config == SMALL
    assert run.tokenizer.encode("é") == TOKENIZER.encode("é")
    assert "naïve" in (run.path / "config.yaml").read_text()


def test_error_for_a_path_that_is_not_a_run(tmp_path: Path, stopped: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "manifest.json").write_text("{}")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no run folder .*absent: gptsmith pretrain makes"):
        Run.open(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"corpus is a prepared corpus, not a run: .* --data"):
        Run.open(corpus)
    with pytest.raises(
        ValueError, match=r"config\.yaml is a file of the run .*run, not a run: give"
    ):
        Run.open(stopped / "config.yaml")
    with pytest.raises(
        ValueError, match=r"step-000010 is a checkpoint, not a run: give its run folder .*run "
    ):
        Run.open(stopped / "checkpoints" / "step-000010")
    with pytest.raises(ValueError, match=r"theirs is a Hugging Face model, not a run"):
        Run.open(theirs)
    with pytest.raises(ValueError, match=r"is a folder of runs, not a run: give one of them: run$"):
        Run.open(tmp_path)
    (stopped / "model.json").unlink()
    with pytest.raises(ValueError, match=r"is not a run folder: it has no model\.json$"):
        Run.open(stopped)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.json", '{"n_layer": 0}', r"model\.json: n_layer: Input should be greater"),
        ("model.json", '{"n_layr": 1}', r"model\.json: n_layr: Extra inputs"),
        ("model.json", '{"n_layer": ', r"model\.json, line 1, column 13: not JSON"),
        ("config.yaml", "a: [1", r"config\.yaml is unreadable: .* line 1"),
        ("config.yaml", "- 1", r"config\.yaml: expected a mapping"),
    ],
)
def test_damaged_configuration(stopped: Path, name: str, content: str, message: str) -> None:
    (stopped / "digests.json").unlink()  # edited by hand
    (stopped / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        Run.open(stopped)
    assert "\n" not in str(caught.value)


def test_occupied_folders_are_rejected_and_unchanged(tmp_path: Path, stopped: Path) -> None:
    with pytest.raises(
        FileExistsError,
        match=r"run contains an unfinished run, at step 20: .* --resume continues it; or",
    ):
        create(stopped)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.yaml").write_text("my: own")
    with pytest.raises(FileExistsError, match=r"mine is not empty and contains no run"):
        create(mine)
    assert (mine / "config.yaml").read_text() == "my: own"
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"file is a file: choose another --out"):
        create(tmp_path / "file")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=r"link is a link that leads nowhere: choose another"):
        create(tmp_path / "link")
    (tmp_path / "empty").mkdir()
    create(tmp_path / "empty").close()


def test_stopped_before_the_first_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    create(path).close()
    with pytest.raises(ValueError, match=r"has no weights yet, .* start it again"):
        Run.open(path).load_model()
    with pytest.raises(ValueError, match="stopped before its first checkpoint; omit --resume"):
        create(path, resume=True)
    (path / "config.yaml").unlink()  # killed even before that
    (path / ".model.tmp-0123abcd.json").touch()
    with create(path, SMALL.change(n_layer=3)) as run:  # nothing is lost: begin again
        assert Run.open(path).model_config.n_layer == 3
        assert not list(path.glob(".model*"))
        save(run, 0)
    with pytest.raises(FileExistsError, match="contains an unfinished run, at step 0"):
        create(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{{", r"byte 0: not UTF-8"),
        (b"{% for", r"is unusable: chat template, line 1"),
        (b"", r"is unusable: the chat template writes the content of message 1 of 4"),
    ],
)
def test_damaged_template(stopped: Path, content: bytes, message: str) -> None:
    (stopped / "chat_template.jinja").write_bytes(content)
    (stopped / "digests.json").unlink()
    with pytest.raises(ValueError, match=rf"run/chat_template\.jinja.* {message}"):
        _ = Run.open(stopped).template


def test_missing_file_of_a_partly_trained_run(stopped: Path) -> None:
    (stopped / "base.safetensors").touch()
    with pytest.raises(ValueError, match=r"run is incomplete: tuning\.json is missing"):
        Run.open(stopped).load_model()


@pytest.mark.parametrize(
    ("config", "stage"),
    [
        ({"stage": "chat"}, "chat"),
        ({"import": "gpt2"}, "import"),
        # runs made before `stage` was recorded
        ({"data": "x", "document_mask": False, "pad_vocab_multiple": 1, "model": {}}, "pretrain"),
        ({"from": "run", "data": "x", "document_mask": False}, "text"),
        ({"from": "run", "data": ["x"], "questions": 3}, "chat"),
        ({"from": "run", "data": "x", "mask_prompt": True}, "instruct"),
        ({"from": "run", "data": "x", "texts_per_step": 32}, "classify"),
    ],
)
def test_stage_of_a_run(config: dict[str, Any], stage: str) -> None:
    assert layout.stage_of(config) == stage


# the lock

HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from stopped_run import create
from pathlib import Path
run = create(Path(sys.argv[1]), resume=True)
print("locked", flush=True)
time.sleep(60)
"""


def test_only_one_process_trains_in_a_folder(stopped: Path) -> None:
    support = str(Path(__file__).parents[1] / "support")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(stopped), support], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=rf"run is in use by process {process.pid}: "):
            create(stopped, resume=True)
        assert same(Run.open(stopped).load_model(), 20), "reading is free"
        process.send_signal(signal.SIGKILL)
    with create(stopped, resume=True) as run:
        with run.lock():  # held already: no deadlock with oneself
            pass
        assert (stopped / ".lock").read_text() == f"{os.getpid()}\n"
    create(stopped, resume=True).close()


# weights


def test_unfinished_run_loads_its_newest_good_checkpoint(stopped: Path) -> None:
    run = Run.open(stopped)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = run.load_model()
    assert torch.equal(torch.get_rng_state(), before), "opening draws no random numbers"
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert same(model, 20)
    assert run.notice == f"{stopped} is unfinished: this is its step 20"
    assert same(run.load_model("best"), 10)
    assert run.notice == ""
    assert same(run.load_model(0), 0)
    with pytest.raises(ValueError, match=r"no checkpoint of step 5 .* available: 0, 10, 20"):
        run.load_model(5)
    flip(stopped / "checkpoints" / "step-000020" / "model.safetensors")
    assert same(run.load_model(), 10)
    assert run.notice.startswith("checkpoint of step 20 is damaged: ")
    assert run.notice.endswith("this is its step 10")
    for step in ("step-000010", "step-000000"):
        flip(stopped / "checkpoints" / step / "model.safetensors")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        run.load_model()


def test_finished_run_loads_its_final_weights(stopped: Path) -> None:
    run = Run.open(stopped)
    run.finish()
    assert same(run.load_model(), 20)
    assert run.notice == ""
    assert same(run.load_model("best"), 10)
    assert (run.weights.stat().st_mode & 0o777) == (stopped / "model.json").stat().st_mode & 0o777
    shutil.rmtree(run.checkpoints)
    assert same(run.load_model(), 20), "the checkpoints may be deleted"
    with pytest.raises(ValueError, match=r"has no checkpoints, only its final model\.safetensors"):
        run.load_model("best")


def test_run_finished_with_its_best_weights(stopped: Path) -> None:
    run = Run.open(stopped)
    run.finish("best")
    shutil.rmtree(run.checkpoints)
    assert same(run.load_model(), 10)
    assert same(run.load_model("best"), 10)


def test_finished_run_that_is_trained_further(stopped: Path) -> None:
    Run.open(stopped).finish()
    with create(stopped, resume=True) as run:
        save(run, 30, best_step=30)
    run = Run.open(stopped)
    assert same(run.load_model(), 30)
    assert "unfinished: this is its step 30" in run.notice
    assert same(run.load_model("best"), 30)


def test_best_without_an_evaluation(tmp_path: Path) -> None:
    with create(tmp_path / "run") as run:
        save(run, 0)
    with pytest.raises(ValueError, match="has no best checkpoint: nothing was evaluated yet"):
        run.load_model("best")


def rewrite(run: Run, **changed: torch.Tensor | None) -> None:
    tensors = {**load_file(run.weights), **changed}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, run.weights)


def test_weights_must_fit_the_model(stopped: Path) -> None:
    run = Run.open(stopped)
    run.finish()
    (stopped / "digests.json").unlink()  # written by another program
    good = run.weights.read_bytes()
    name = "embedding.token.weight"
    for changed, message in (
        ({name: None}, rf"model\.safetensors does not fit the architecture: {name} is missing$"),
        ({"extra": torch.ones(1)}, "extra is unexpected"),
        ({name: torch.ones(5, 16)}, rf"{name} has shape \(5, 16\), expected \(257, 16\)"),
        ({name: torch.full((257, 16), torch.nan)}, "contains NaN or infinity, so training"),
    ):
        run.weights.write_bytes(good)
        rewrite(run, **changed)
        with pytest.raises(ValueError, match=message):
            run.load_model()
    run.weights.write_bytes(good[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .*--checkpoint STEP"):
        run.load_model()
    assert same(run.load_model(10), 10)
    with pytest.raises(ValueError, match="no device 'gpu': choose auto"):
        run.load_model(10, device="gpu")


def test_weights_keep_their_dtype(stopped: Path) -> None:
    run = Run.open(stopped)
    tensors = {name: t.bfloat16() for name, t in model_of(1).state_dict().items()}
    run.write_weights(layout.WEIGHTS, tensors)
    model = run.load_model()  # no step in the header: it is what counts
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert run.notice == ""


# a mask that is Python code

MASK = "def near(b, h, q, k):\n    return (q >= k) & (q - k < 4)\n"


def test_mask_file(tmp_path: Path) -> None:
    source = tmp_path / "my_mask.py"
    source.write_text(MASK)
    config = SMALL.change(mask=f"{source}:near")
    path = tmp_path / "run"
    with create(path, config) as run:
        assert run.model_config.mask == "mask.py:near"
        model = GPTModel(run.model_config, mask_folder=run.path, trust_code=True)
        checkpoint.save(run.checkpoints, 0, {"model": model.state_dict()}, {})
    run = Run.open(path)
    with pytest.raises(ValueError, match=r"mask\.py: review it, .*--trust-code"):
        run.load_model()
    ids = torch.arange(20)[None]
    assert torch.equal(run.load_model(trust_code=True)(ids), model.eval()(ids))
    create(path, config, resume=True).close()
    source.write_text(MASK.replace("4", "8"))
    with pytest.raises(ValueError, match=r"settings: mask\.py: [0-9a-f]{12} -> [0-9a-f]{12};"):
        create(path, config, resume=True)
    source.unlink()
    create(path, config, resume=True).close()  # the copy is enough
    assert (path / "mask.py").read_text() == MASK
    with pytest.raises(FileNotFoundError, match=r"mask '.*my_mask\.py': there is no such file"):
        create(tmp_path / "other", config)
    assert not (tmp_path / "other").exists()
