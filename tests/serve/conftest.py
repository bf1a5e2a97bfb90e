"""A server with a chat model, a text model and a classifier."""

from collections.abc import Iterator

import pytest
from api_server import Api, chat_run, served, serving_models
from runs import random_run

from gptsmith.model.config import ModelConfig
from gptsmith.tokenizer import Tokenizer

pytest.importorskip("starlette")


@pytest.fixture(scope="package")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("served")
    size = dict(n_layer=1, n_head=2, n_embd=16, context_length=64)
    text = random_run(folder / "text", ModelConfig(**size, vocab_size=257))
    classes = ModelConfig(**size, vocab_size=257, labels=("ham", "spam"))
    classifier = random_run(folder / "classifier", classes, Tokenizer.byte())
    models = {
        "chat": served(chat_run(folder / "chat")),
        "text": served(text, "text"),
        "classifier": served(classifier, "classifier"),
    }
    with serving_models(models) as api:
        api.folder = folder
        yield api
