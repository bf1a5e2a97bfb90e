"""checkpoint.py: complete and verified, or not a candidate; damage is named."""

import errno
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from gptsmith import files
from gptsmith.train import checkpoint


def groups(step: int) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"weight": torch.full((8, 4), float(step)), "bias": torch.arange(4)},
        "optimizer": {"weight.exp_avg": torch.full((8, 4), step / 7)},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 0, 10 and 20."""
    for step in (0, 10, 20):
        checkpoint.save(tmp_path / "checkpoints", step, groups(step), {"step": step})
    return tmp_path / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(1000, generator=generator)
    odd = torch.randint(0, 1 << 16, (300,), generator=generator).to(torch.uint16)
    tensors = {
        "transposed": torch.randn(5, 7, generator=generator).t(),
        "strided": flat[::3],
        "first half": flat[:500].view(20, 25),  # two parts of one storage
        "second half": flat[500:].view(20, 25),
        "every bf16 pattern, NaN included": odd.view(torch.bfloat16),
        "fp16": flat[:10].half(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "flags": flat[:9] > 0,
        "random state": torch.get_rng_state(),
        "parameter": torch.nn.Parameter(torch.randn(3, generator=generator)),
    }
    state = {"step": 5, "best": float("inf"), "data": {"seed": 1, "epoch": 0}, "text": "für"}
    path = checkpoint.save(tmp_path, 5, {"model": tensors}, state)
    found, damage = checkpoint.find(tmp_path)
    assert (found.path, found.step, damage) == (path, 5, [])
    assert found.state == state
    loaded = found.load("model")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert loaded[name].shape == tensor.shape, name
        flat_bytes = [t.detach().contiguous().view(-1) for t in (loaded[name], tensor)]
        if tensor.dtype != torch.bool:
            flat_bytes = [t.view(torch.uint8) for t in flat_bytes]
        assert torch.equal(*flat_bytes), name
    readable = {file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert len(readable) == 1, "safetensors' own 0600 must not survive"


def test_replacing_a_step(folder: Path) -> None:
    checkpoint.save(folder, 20, groups(99), {"step": 20, "second": True})
    found, damage = checkpoint.find(folder)
    assert damage == []
    assert found.state["second"]
    assert found.load("model")["weight"][0, 0] == 99
    assert names(folder) == ["step-000000", "step-000010", "step-000020"]


def test_find_a_given_step(folder: Path) -> None:
    found, _ = checkpoint.find(folder, 10)
    assert found.step == 10
    with pytest.raises(ValueError, match=r"no checkpoint of step 15 .* available: 0, 10, 20$"):
        checkpoint.find(folder, 15)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def renumber(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 30}))


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("model.safetensors", truncate, "bytes instead of"),
    ("model.safetensors", flip, "does not have the recorded sha256"),
    ("optimizer.safetensors", Path.unlink, "is missing"),
    ("state.json", flip, "does not have the recorded sha256"),
    ("state.json", Path.unlink, "is missing"),
    ("manifest.json", truncate, "is unreadable"),
    ("manifest.json", Path.unlink, "is missing"),
    ("manifest.json", lambda path: path.write_text("[]"), "is unreadable"),
    (
        "manifest.json",
        lambda path: path.write_text(
            '{"step": 20, "files": {"a": {"size": Infinity, "sha256": ""}}}'
        ),
        "is unreadable",
    ),
    ("manifest.json", lambda path: path.write_text('{"step": 20, "files": {}}'), "does not list"),
    ("manifest.json", lambda path: path.write_bytes(b"\xff\0"), "is unreadable"),
    ("manifest.json", renumber, "says step 30"),
    ("manifest.json", lambda path: path.write_text("[" * 100_000), "is unreadable"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_damage_is_reported_and_the_next_older_checkpoint_used(
    folder: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    if damage is truncate and name == "manifest.json":
        truncate(folder / "step-000020" / name)  # the last byte is only a line end
    damage(folder / "step-000020" / name)
    found, messages = checkpoint.find(folder)
    assert found.step == 10
    (line,) = messages
    assert line.startswith("checkpoint of step 20 is damaged: ")
    assert name in line
    assert message in line
    assert "\n" not in line
    with pytest.raises(ValueError, match=r"step 20 is damaged.*\(other checkpoints: 0, 10\)$"):
        checkpoint.find(folder, 20)


def test_any_changed_byte_of_a_manifest_is_detected(folder: Path) -> None:
    """Any single flipped byte in any file is damage, or leaves the meaning as it was."""
    path = folder / "step-000020" / "manifest.json"
    good = path.read_bytes()
    meaning = json.loads(good)
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        if checkpoint.verify(path.parent, 20) is None:
            changed = json.loads(path.read_bytes())
            assert changed["step"] == 20
            assert changed["files"] == meaning["files"]


def test_no_checkpoint_or_none_intact(folder: Path, tmp_path: Path) -> None:
    for name in names(folder):
        flip(folder / name / "model.safetensors")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged: .*20.*; .*10.*; "):
        checkpoint.find(folder)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*nowhere"):
        checkpoint.find(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.find(tmp_path / "empty")


def test_prune_keeps_the_newest_and_listed_checkpoints(folder: Path) -> None:
    for step in (30, 40):
        checkpoint.save(folder, step, groups(step), {})
    checkpoint.prune(folder, 2, {10, 25})
    assert names(folder) == ["step-000010", "step-000030", "step-000040"]
    assert checkpoint.find(folder)[0].step == 40


def test_clean_after_killed_saves_and_after_a_resume(folder: Path) -> None:
    shutil.copytree(folder / "step-000020", folder / "step-000020.tmp-00000000")
    half = folder / "step-000030.tmp-00000000"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (folder / "step-000010").rename(folder / "step-000010.tmp-0123abcd")  # killed while replacing
    (folder / "notes").mkdir()
    assert checkpoint.find(folder, 10)[0].step == 10
    checkpoint.clean(folder)
    assert names(folder) == ["notes", "step-000000", "step-000010", "step-000020"]
    checkpoint.clean(folder, after=10)
    assert names(folder) == ["notes", "step-000000", "step-000010"]
    checkpoint.clean(folder / "absent")


def test_full_disk_keeps_the_existing_checkpoints(folder: Path) -> None:
    """A limit on the size of files stands in for the full disk."""
    before = names(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"step-000030'$"):
            checkpoint.save(folder, 30, {"model": {"weight": torch.zeros(100_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(folder) == before


def test_one_tensor_under_two_names_is_rejected(tmp_path: Path) -> None:
    weight = torch.ones(3)
    with pytest.raises(AssertionError, match="two names for one tensor"):
        checkpoint.save(tmp_path, 0, {"model": {"a": weight, "b": weight}}, {})
    assert not list(tmp_path.iterdir())


def test_equal_tensors_give_equal_files(tmp_path: Path) -> None:
    tensors = {name: torch.full((3, 2), i) for i, name in enumerate("bca")}
    metadata = {"which": "last", "step": "20", "another": "1", "more": "2"}
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom gptsmith.train import checkpoint\n"
        "tensors = {name: torch.full((3, 2), i) for i, name in enumerate('bca')}\n"
        f"checkpoint.save_tensors(Path(sys.argv[1]), tensors, {metadata})"
    )
    checkpoint.save_tensors(tmp_path / "one", tensors, metadata)
    checkpoint.save_tensors(tmp_path / "two", dict(reversed(tensors.items())), metadata)
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "three")], check=True)
    assert len({(tmp_path / name).read_bytes() for name in ("one", "two", "three")}) == 1
    with safe_open(tmp_path / "one", "pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)


def test_checkpoints_of_earlier_versions_are_verified(folder: Path) -> None:
    """Their manifests give the sha256 of whole files, of any size."""
    path = folder / "step-000030"
    big = {"model": {"weight": torch.arange(5 << 20, dtype=torch.float32)}}
    checkpoint.save(folder, 30, big, {})
    manifest = files.read_json(path / "manifest.json")
    assert manifest["files"]["model.safetensors"]["sha256"].startswith("sha256/16MiB:")
    for name, entry in manifest["files"].items():
        entry["sha256"] = files.sha256(path / name)
    files.write_json(path / "manifest.json", manifest)
    assert checkpoint.verify(path, 30) is None
    flip(path / "model.safetensors")
    assert "does not have the recorded sha256" in (checkpoint.verify(path, 30) or "")


def test_an_unreadable_checkpoint_is_not_called_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming from an older one would remove it."""

    def reject(path: Path, recorded: str) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "has_digest", reject)
    with pytest.raises(PermissionError, match=r"model\.safetensors"):
        checkpoint.find(folder)


def test_checkpoints_pruned_while_they_are_read_are_looked_for_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify, saved = checkpoint.verify, iter((30, 40, 50))

    def meanwhile(path: Path, step: int) -> str | None:
        if (new := next(saved, None)) is not None:  # the training process goes on
            checkpoint.save(folder, new, groups(new), {"step": new})
            checkpoint.prune(folder, 1, set())
        return verify(path, step)

    monkeypatch.setattr(checkpoint, "verify", meanwhile)
    found, damage = checkpoint.find(folder)
    assert (found.step, damage) == (50, [])
    saved = iter((60,))
    with pytest.raises(ValueError, match=r"no checkpoint of step 50 .*available: 60"):
        checkpoint.find(folder, 50)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from gptsmith.train import checkpoint

torch.set_num_threads(1)  # no threads before the fork
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
rng = random.Random(0)

def tensors(step):
    return {"model": {"w": torch.full((40_000,), float(step))},
            "optimizer": {"m": torch.full((80_000,), float(-step))}}

def work(pipe):
    step = 0
    try:
        checkpoint.clean(folder)
        step = checkpoint.find(folder)[0].step
    except FileNotFoundError:
        pass
    while True:
        if rng.random() < 0.7:  # else the same step again: replacing is atomic, too
            step += 1
        checkpoint.save(folder, step, tensors(step), {"step": step})
        os.write(pipe, step.to_bytes(4, "little"))
        checkpoint.prune(folder, rng.choice([1, 2]), set())

acknowledged = 0
for round in range(rounds):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        rng.seed(round)
        work(writer)
    os.close(writer)
    data = b""
    while not data:  # at least one save per round
        data = os.read(reader, 4)
    time.sleep(rng.random() * 0.04)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 1 << 16):
        data += more
    os.close(reader)
    acknowledged = max(acknowledged, int.from_bytes(data[-4:], "little"))
    found, damage = checkpoint.find(folder)
    assert damage == [], damage
    assert found.step in (acknowledged, acknowledged + 1), (found, acknowledged)
    assert found.state == {"step": found.step}
    assert (found.load("model")["w"] == found.step).all()
    assert (found.load("optimizer")["m"] == -found.step).all()
    acknowledged = found.step
checkpoint.clean(folder)
left = sorted(path.name for path in folder.iterdir())
assert 1 <= len(left) <= 3 and not any("tmp" in name for name in left), left
print("rounds", rounds, "steps", acknowledged)
"""


def test_killed_at_random_moments(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "checkpoints"), "80"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("rounds 80 ")
