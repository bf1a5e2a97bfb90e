"""digests.json: every file of a run that a result depends on is compared when it is opened."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stopped_run import flip

from gptsmith import files
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.lora import LoraConfig
from gptsmith.model.tuning import Tuning, trainable_state_dict
from gptsmith.recipes.options import PretrainConfig
from gptsmith.run import Run, digests
from gptsmith.run.create import open_for_training
from gptsmith.run.resume import stored_recipe
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import checkpoint

SMALL = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=32, vocab_size=257)
TOKENIZER = Tokenizer.byte()
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}"
MASK = "def near(b, h, q, k):\n    return (q >= k) & (q - k < 4)\n"


def create(path: Path, model: ModelConfig = SMALL, **options: Any) -> Run:
    config = {"stage": "pretrain", "train": {"steps": 5}, "out": str(path)}
    return open_for_training(path, config, model, TOKENIZER, corpus="c0ffee", **options)


def finished(path: Path, rank: int = 0, **options: Any) -> Path:
    """A finished run of every file: of LoRA, with a rank."""
    torch.manual_seed(0)
    model = GPTModel(options.get("model", SMALL), mask_folder=path.parent, trust_code=True)
    if rank:
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        tuning = Tuning(lora=LoraConfig(rank=rank))
        tuning.wrap(model)
        options |= dict(tuning=tuning, base=base)
    with create(path, **options) as run:
        state = {"best_step": 0, "best_loss": None}
        checkpoint.save(run.checkpoints, 5, {"model": trainable_state_dict(model)}, state)
        run.finish()
    return path


def use(path: Path) -> None:
    """Everything that a command may need."""
    run = Run.open(path)
    _ = run.tokenizer, run.template, run.tuning
    run.load_model(trust_code=True)
    if run.tuning.lora.rank:
        run.base_model(trust_code=True)


def test_every_file_that_a_result_depends_on_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "mask.py").write_text(MASK)
    masked = SMALL.change(mask=f"{tmp_path / 'mask.py'}:near")
    full = finished(tmp_path / "full", template=TEMPLATE, model=masked)
    lora = finished(tmp_path / "lora", rank=2)
    for path in (full, lora):
        use(path)
        assert Run.open(path).load_model(trust_code=True) is not None
        recorded = files.read_json(path / digests.NAME)["files"]
        there = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
        free = {name for name in there if name.startswith("checkpoints/")} | {digests.NAME, ".lock"}
        assert recorded.keys() == there - free
        for name in recorded:
            flip(path / name)
            resume = partial(create, path, masked if path == full else SMALL, resume=True)
            check = resume if name == "corpus.json" else partial(use, path)
            with pytest.raises(ValueError, match=rf"{name} is damaged: its sha256") as caught:
                check()
            assert "\n" not in str(caught.value)
            flip(path / name)
        use(path)


def test_a_recorded_file_that_is_gone_is_missed(tmp_path: Path) -> None:
    path = finished(tmp_path / "run", template=TEMPLATE)
    (path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"chat_template\.jinja is missing"):
        use(path)


@pytest.mark.parametrize(
    ("name", "content"), [("chat_template.jinja", TEMPLATE), ("special_tokens.json", "{}")]
)
def test_an_added_file_is_not_taken_for_one_of_the_run(
    name: str, content: str, tmp_path: Path
) -> None:
    path = finished(tmp_path / "run")
    (path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} was added later.*delete digests\.json"):
        use(path)
    (path / digests.NAME).unlink()
    use(path)


def test_an_edited_file_opens_once_the_digests_are_deleted(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    config = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(config.replace("steps: 5", "steps: 6"))
    with pytest.raises(ValueError, match=r"if you edited the file, delete digests\.json"):
        Run.open(path)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        stored_recipe(path, [], {"out", "resume"}, PretrainConfig)
    (path / digests.NAME).unlink()
    run = Run.open(path)
    run.load_model()
    assert run.notice == (
        f"{path} has no digests.json (it was made by an earlier version): read without verification"
    )


def test_a_run_without_digests_gets_them_when_it_is_resumed(tmp_path: Path) -> None:
    path = finished(tmp_path / "run", rank=2)
    (path / digests.NAME).unlink()
    run = create(path, resume=True, tuning=Run.open(path).tuning)
    assert "read without verification" in run.notice
    run.finish()
    run.close()
    run = Run.open(path)
    run.load_model()
    assert run.notice == ""
    flip(path / "base.safetensors")
    with pytest.raises(ValueError, match=r"base\.safetensors is damaged"):
        use(path)


@pytest.mark.parametrize("content", ["", "[]", '{"files": 3}', '{"files": {"model.json": "a"}}'])
def test_damaged_digests_are_named(tmp_path: Path, content: str) -> None:
    path = finished(tmp_path / "run")
    (path / digests.NAME).write_text(content)
    with pytest.raises(ValueError, match=r"digests\.json.*damaged; without it, the run is read"):
        Run.open(path)


def test_a_run_of_a_newer_format_is_rejected_before_anything_is_read(
    tmp_path: Path, user_error: Callable[..., str]
) -> None:
    path = finished(tmp_path / "run")
    document = files.read_json(path / digests.NAME)
    assert document["format"] == 1
    files.write_json(path / digests.NAME, document | {"format": 2})
    (path / "model.json").write_text('{"what": "a later version says here"}')
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    expected = (
        f"{path} is a run of format 2, this gptsmith reads format 1: install a newer gptsmith"
    )
    for words in (["generate", path], ["inspect", path], ["pretrain", "--out", path, "--resume"]):
        assert user_error(*words).endswith(f": {expected}")
    with pytest.raises(ValueError, match="is a run of format 2"):
        digests.write(path, {"report.md": b""})
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("found", [0, -1, None, "1", [1], True])
def test_a_format_that_is_no_version_is_damage(tmp_path: Path, found: object) -> None:
    path = finished(tmp_path / "run")
    document = files.read_json(path / digests.NAME)
    files.write_json(path / digests.NAME, document | {"format": found})
    with pytest.raises(ValueError, match=r"which is not a version number: damaged or edited$"):
        Run.open(path)


def test_checkpoints_remain_readable_when_the_final_weights_are_damaged(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    flip(path / "model.safetensors", 20)  # in the header, which says what the weights are
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .*--checkpoint STEP"):
        Run.open(path).load_model()
    with pytest.raises(ValueError, match="is damaged"):
        Run.open(path).load_model("best")
    Run.open(path).load_model(5)


def test_times_of_change_are_not_trusted(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    weights = path / "model.safetensors"
    use(path)
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    flip(weights)
    os.utime(weights, ns=times)
    with pytest.raises(ValueError, match="is damaged"):
        use(path)


def test_weights_over_a_chunk_are_verified(tmp_path: Path) -> None:
    wide = SMALL.change(n_embd=640)
    path = finished(tmp_path / "run", model=wide)
    (recorded,) = files.read_json(path / digests.NAME)["files"]["model.safetensors"]
    assert recorded == files.digest(path / "model.safetensors")
    use(path)


def test_a_file_that_is_replaced_while_it_is_read_is_compared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = finished(tmp_path / "run")
    digest, replaced = files.digest, []

    def meanwhile(file: Path) -> str:
        if not replaced and file.name == "model.json":
            replaced.append(file)
            for content in (b"{}", b"[]", file.read_bytes() + b"\n"):
                digests.write(path, {"model.json": content})
        return digest(file)

    monkeypatch.setattr(files, "digest", meanwhile)
    assert Run.open(path).model_config == SMALL
    assert replaced


def test_unreadable_weights_are_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = finished(tmp_path / "run")
    opened = Path.open

    def reject(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", reject)
    for _ in range(2):
        with pytest.raises(PermissionError, match=r"model\.safetensors"):
            Run.open(path).load_model()
        (path / digests.NAME).unlink(missing_ok=True)


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from test_digests import create, use

torch.set_num_threads(1)  # no threads before the fork
whole, replace = Path(sys.argv[1]), os.replace
left = 0

def killing(source, target):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

for stop in range(1, 30):
    copy = whole.with_name(f"copy{stop}")
    shutil.copytree(whole, copy)
    child = os.fork()
    if child == 0:
        left, os.replace = stop, killing
        with create(copy, resume=True) as run:  # config.yaml changes: it has another `out`
            run.finish()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    use(copy)
    if status == 0:
        print("renames", stop - 1)
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
"""


def test_killed_at_any_rename_a_run_opens(tmp_path: Path) -> None:
    """A digest is recorded before its file is replaced: no kill looks like damage."""
    path = finished(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), str(Path(__file__).parent)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) >= 6


def test_weights_written_by_other_programs_are_noticed(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    save_file(load_file(path / "model.safetensors"), path / "model.safetensors")
    with pytest.raises(ValueError, match=r"if you edited the file, delete digests\.json"):
        use(path)
    recorded = json.loads((path / digests.NAME).read_text())
    del recorded["files"]["model.safetensors"]
    (path / digests.NAME).write_text(json.dumps(recorded))
    use(path)
