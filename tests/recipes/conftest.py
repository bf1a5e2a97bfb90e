"""The run that every recipe of fine-tuning starts from."""

from pathlib import Path

import pytest
from runs import untrained

from gptsmith.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte model of 2 layers, width 32 and a context of 64 tokens, with random weights."""
    return untrained(tmp_path_factory.mktemp("base") / "run", Tokenizer.byte())
