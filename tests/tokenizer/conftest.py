from pathlib import Path

import pytest
from tokenizer_texts import STORY

from gptsmith.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def gpt2(real_data: Path) -> Tokenizer:
    return Tokenizer.gpt2(real_data / "gpt2_bpe")


@pytest.fixture(scope="session")
def trained() -> Tokenizer:
    return Tokenizer.train_bpe([STORY], 330)
