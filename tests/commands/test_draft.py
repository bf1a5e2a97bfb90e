"""`--draft RUN2`: the same text, verified by the model; runs that cannot draft are rejected."""

from pathlib import Path

import pytest
from runs import random_run

from gptsmith import cli
from gptsmith.model.config import ModelConfig
from gptsmith.tokenizer import Tokenizer

SIZE = dict(n_layer=1, n_head=2, n_embd=16, context_length=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    random_run(folder / "run", ModelConfig(**SIZE, vocab_size=257))
    random_run(folder / "small", ModelConfig(**SIZE, vocab_size=257), seed=1)
    random_run(folder / "chars", ModelConfig(**SIZE, vocab_size=4), Tokenizer.char(["abc"]))
    classes = ModelConfig(**SIZE, vocab_size=257, labels=("ham", "spam"))
    random_run(folder / "classifier", classes, Tokenizer.byte())
    return folder


def test_a_draft_model_changes_no_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for more in ([], ["--draft", str(folder / "small"), "--draft-tokens", "3"]):
        argv = ["generate", str(folder / "run"), "--prompt", "The", "--max-new-tokens", "30"]
        assert cli.main([*argv, "--num-samples", "3", *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.parametrize("verb", ["generate", "serve"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("chars", "its tokenizer (4 tokens) is not that of"),
        ("classifier", "is a classifier, which generates no text"),
        ("nothing", "there is no run folder"),
    ],
)
def test_a_run_that_cannot_draft_is_rejected(
    folder: Path, capsys: pytest.CaptureFixture[str], verb: str, name: str, says: str
) -> None:
    more = ["--port", "0"] if verb == "serve" else []
    argv = [verb, str(folder / "run"), "--draft", str(folder / name), *more]
    assert cli.main(argv) == 2
    assert says in capsys.readouterr().err
