"""`gptsmith generate` with constraints, by a model that knows nothing."""

import json
import re
import sys
from pathlib import Path

import pytest
from runs import random_run

from gptsmith import cli
from gptsmith.model.config import ModelConfig

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=64, vocab_size=257)
    return Path(random_run(tmp_path_factory.mktemp("constrained") / "run", config).path)


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"enum": [{"a": 1}, ["ü"]]}), encoding="utf-8")
    return path


def said(run: Path, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    argv = ["generate", str(run), "--prompt", "Q:", *map(str, words)]
    assert cli.main(argv) == 0
    return capsys.readouterr().out.removesuffix("\n").removeprefix("Q:")


def test_generate_follows_a_constraint(
    run: Path, schema: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads(said(run, capsys, "--json-schema", schema)) in ({"a": 1}, ["ü"])
    assert re.fullmatch("[a-c]{3}-x", said(run, capsys, "--regex", "[a-c]{3}-x"))
    assert said(run, capsys, "--choice", "yes", "--choice", "no") in ("yes", "no")


def test_a_wrong_constraint_is_one_line(
    run: Path, tmp_path: Path, schema: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "wrong.json").write_text('{"items": {"type": "objekt"}}')
    (tmp_path / "text.json").write_text("hello")

    def error(*words: object) -> str:
        assert cli.main(["generate", str(run), *map(str, words)]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "at /items: Invalid type" in error("--json-schema", tmp_path / "wrong.json")
    assert "not a JSON schema" in error("--json-schema", tmp_path / "text.json")
    assert "nothing.json" in error("--json-schema", tmp_path / "nothing.json")
    assert "unclosed" in error("--regex", "[a")
    assert "give one of" in error("--regex", "a", "--choice", "b")
    assert "too many" in error("--regex", "(a?){1000}a{1000}")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert "pip install 'gptsmith[serve]'" in error("--choice", "a")
