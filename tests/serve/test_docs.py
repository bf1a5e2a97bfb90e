"""The examples of docs/serving.md, run against a real server."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from api_server import chat_run, served, serving_models

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_examples_work(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    model = served(chat_run(tmp_path / "demo-chat"), "demo-chat")
    with serving_models({"demo-chat": model}) as api:
        examples = [["bash", "-e", "-c", block] for block in blocks("bash")]
        examples += [[sys.executable, "-c", block] for block in blocks("python")]
        assert len(examples) == 4
        for *command, block in examples:
            text = block.replace("http://127.0.0.1:8000", api.url)
            done = subprocess.run([*command, text], capture_output=True, text=True, check=True)
            assert done.stdout
            assert '"error"' not in done.stdout


def test_every_path_is_in_the_table_and_in_the_description() -> None:
    from gptsmith.serve import openapi

    for path in openapi.document()["paths"]:
        assert path.removesuffix("/{name}") in PAGE
