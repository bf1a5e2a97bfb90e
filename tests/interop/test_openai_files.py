"""OpenAI's files, from a local server in place of theirs."""

import hashlib
import socket
import time
from pathlib import Path

import pytest
from local_web import Site

from gptsmith import download, files
from gptsmith.download import RemoteFile
from gptsmith.interop import openai_files
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import parameters

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes


@pytest.fixture
def openai(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A server with a small "124M"; its folder in the cache."""
    texts = {"hparams.json": b"{}", "model.ckpt.index": b"index", "weights": CONTENT}
    site.files |= {f"/models/124M/{name}": content for name, content in texts.items()}
    wanted = [
        RemoteFile(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in texts.items()
    ]
    monkeypatch.setattr(openai_files, "_OPENAI", f"{site.url}/models")
    monkeypatch.setattr(openai_files, "GPT2", {"124M": wanted})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gptsmith" / "gpt2" / "124M"


def test_download_of_a_model(site: Site, openai: Path) -> None:
    assert openai_files.gpt2("124M") == openai
    assert (openai / "weights").read_bytes() == CONTENT
    site.asked.clear()
    assert openai_files.gpt2("124M") == openai
    assert not site.asked


def test_existing_files_are_verified_and_used(site: Site, openai: Path) -> None:
    openai.mkdir(parents=True)
    (openai / "weights").write_bytes(CONTENT)
    openai_files.gpt2("124M")
    assert [path for path, _ in site.asked] == [
        "/models/124M/hparams.json",
        "/models/124M/model.ckpt.index",
    ]
    (openai / "weights").write_bytes(CONTENT[1:])
    with pytest.raises(ValueError, match="has 511,999 bytes instead of 512,000: delete it"):
        openai_files.gpt2("124M")
    (openai / "weights").write_bytes(CONTENT[::-1])
    with pytest.raises(ValueError, match=r"sha256.* delete it and run this again"):
        openai_files.gpt2("124M")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_missing_network_names_files_and_folder(
    openai: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(download, "_PAUSES", (60.0,))  # must not be waited for
    monkeypatch.setattr(openai_files, "_OPENAI", f"http://127.0.0.1:{free_port()}/models")
    openai.mkdir(parents=True)
    (openai / "hparams.json").write_bytes(b"{}")
    began = time.monotonic()
    with pytest.raises(FileNotFoundError) as error:
        openai_files.gpt2("124M")
    assert time.monotonic() - began < 50
    assert f"put model.ckpt.index, weights of {openai_files._OPENAI}/124M into {openai}" in str(
        error.value
    )
    assert "refused" in str(error.value)
    assert "\n" not in str(error.value)


def test_download_folder_is_locked(openai: Path) -> None:
    openai.mkdir(parents=True)
    with files.lock(openai, ""), pytest.raises(ValueError, match="is in use by another process"):
        openai_files.gpt2("124M")


def test_published_sizes_and_digests(real_data: Path) -> None:
    """The BPE tables match; the data files have four bytes per parameter."""
    for size, preset in (("124M", "gpt2"), ("355M", "gpt2-medium")):
        known = {wanted.name: wanted for wanted in openai_files.GPT2[size]}
        for name in ("encoder.json", "vocab.bpe"):
            download.verify(real_data / "gpt2_bpe" / name, known[name], "")
        expected = 4 * parameters(ModelConfig.preset(preset))
        assert known["model.ckpt.data-00000-of-00001"].size == expected
