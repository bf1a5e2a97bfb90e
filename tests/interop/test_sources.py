"""Which reader opens which source, the errors for all others, and a run imported from each."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import imported_run

from gptsmith.interop import hf, hub, nanogpt, openai_files, openai_tf
from gptsmith.interop.sources import open_source

TF = Path(__file__).parent / "fixtures" / "tf_gpt2"


def test_openai_files_become_a_run(tmp_path: Path) -> None:
    """From a checkpoint by TensorFlow to a run that computes the same."""
    imported = open_source(str(TF))
    run = imported_run(tmp_path / "run", imported)
    expected = json.loads((TF / "logits.json").read_text())
    with torch.no_grad():
        logits = run.load_model()(torch.tensor([expected["ids"]]))[0]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), atol=1e-4, rtol=0)
    assert run.config["format"] == "openai-tensorflow"
    with pytest.raises(ValueError, match="is a run, not a model to import"):
        open_source(str(tmp_path / "run"))


def test_damaged_source_leaves_no_run(tmp_path: Path) -> None:
    broken = tmp_path / "tf"
    shutil.copytree(TF, broken)
    data = broken / "model.ckpt.data-00001-of-00003"
    data.write_bytes(bytes(data.stat().st_size))
    imported = open_source(str(broken))
    with pytest.raises(ValueError, match="wrong checksum"):
        imported_run(tmp_path / "run", imported)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every reader answers with the same model and notes what it was asked for."""
    imported, asked = openai_tf.open_folder(TF), []

    def record(name: str, answer: Any) -> Any:
        return lambda where, ends=(): asked.append((name, where)) or answer

    monkeypatch.setattr(openai_tf, "open_folder", record("openai", imported))
    monkeypatch.setattr(hf, "open_folder", record("huggingface", imported))
    monkeypatch.setattr(nanogpt, "open_file", record("nanogpt", imported))
    monkeypatch.setattr(openai_files, "gpt2", record("fetch", Path("cache")))
    noted = replace(imported, notes=["a note"])
    monkeypatch.setattr(hub, "fetch", record("hub", (Path("snapshot"), "abc", noted.notes)))
    return asked


def test_source_selects_its_reader(
    tmp_path: Path, readers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, file in (("tf", "hparams.json"), ("hf", "config.json"), ("out", "ckpt.pt")):
        Path(folder).mkdir()
        Path(folder, file).touch()
    open_source("tf")
    open_source("hf")
    open_source("out/ckpt.pt")
    assert open_source("124M").origin["import"] == "124M"
    from_hub = open_source("smith/small")
    assert (from_hub.origin["import"], from_hub.origin["revision"]) == ("smith/small", "abc")
    assert from_hub.notes[0] == "a note"
    Path("smith/small").mkdir(parents=True)
    Path("smith/small/config.json").touch()
    open_source("smith/small")  # an existing path comes first
    assert readers == [
        ("openai", Path("tf")),
        ("huggingface", Path("hf")),
        ("nanogpt", Path("out/ckpt.pt")),
        ("fetch", "124M"),
        ("openai", Path("cache")),
        ("hub", "smith/small"),
        ("huggingface", Path("snapshot")),
        ("huggingface", Path("smith/small")),
    ]


@pytest.mark.parametrize(
    ("files", "given", "words"),
    [
        ([], "nowhere", "there is no such file or folder; expected a folder with config.json"),
        ([], "gpt2", "openai-community/gpt2 on the Hub"),
        ([], "../up/there/x", "there is no such file or folder"),
        (["here/note.txt"], "here", "holds no model"),
        (["here/manifest.json"], "here", "is a prepared corpus"),
        (["here/adapter_config.json"], "here", "adapter_config.json, line 1, .*not JSON"),
        (["here/ckpt.pt"], "here", "for a nanoGPT checkpoint, give here/ckpt.pt"),
        (["here/model.gguf"], "here", "model.gguf is an export for llama.cpp"),
        (["here/model.gguf"], "here/model.gguf", "is an export for llama.cpp"),
        (["here/MODEL.GGUF"], "here", "MODEL.GGUF is an export for llama.cpp"),
        (["here/MODEL.GGUF"], "here/MODEL.GGUF", "is an export for llama.cpp"),
        (["here/pytorch_model.bin"], "here", "can run code"),
        (["here/model.safetensors"], "here", "put its config.json"),
        (["here/m.index", "here/m.data-00000-of-00001"], "here", "hparams.json .* same folder"),
        (["here/config.json", "here/model.safetensors"], "here/model.safetensors", "its folder"),
        (["here/hparams.json", "here/model.ckpt.index"], "here/model.ckpt.index", "its folder"),
        (["here/corpus.txt"], "here/corpus.txt", "is not a model"),
    ],
)
def test_other_sources_are_rejected_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], given: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in files:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        open_source(given)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(given)


def test_a_gguf_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(ValueError, match="blob is an export for llama"):
        open_source(str(tmp_path / "blob"))


@pytest.mark.parametrize("name", ["ckpt.pt", "config.json", "hparams.json"])
def test_pipe_does_not_block(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match="model: expected"):
            open_source(str(source))
