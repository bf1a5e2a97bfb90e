"""create_from_weights: weights streamed into a run folder, which is complete or absent."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.state_dict import shapes
from gptsmith.run import Run
from gptsmith.run.create import create_from_weights
from gptsmith.tokenizer import Tokenizer

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=32, vocab_size=257)
TEMPLATE = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
CONFIG = {"import": "somebody/model"}


def tensors(dtype: torch.dtype = torch.float32, config: ModelConfig = SMALL) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: tensor.to(dtype) for name, tensor in GPTModel(config).state_dict().items()}


def from_weights(
    path: Path, parts: Iterator[tuple[str, Tensor]], dtype: torch.dtype = torch.float32
) -> Run:
    return create_from_weights(
        path, CONFIG, SMALL, Tokenizer.byte(), parts, dtype, template=TEMPLATE
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_stored_bit_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    given = tensors(dtype)
    run = from_weights(tmp_path / "run", reversed(given.items()), dtype)
    stored, model = load_file(run.weights), run.load_model()
    assert run.notice == ""
    assert stored.keys() == given.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, given[name]), name
        assert torch.equal(stored[name], given[name]), name
    assert (run.config, run.template, run.model_config) == (CONFIG, TEMPLATE, SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("final_norm.weight"), "final_norm.weight is missing"),
        (lambda t: t.update(more=torch.ones(1)), "more is unexpected"),
        (
            lambda t: t.update({"final_norm.weight": torch.ones(3)}),
            r"final_norm.weight has shape \(3,\), expected \(16,\)",
        ),
        (
            lambda t: t["embedding.token.weight"][3].fill_(torch.nan),
            "embedding.token.weight contains NaN",
        ),
    ],
)  # fmt: skip
def test_invalid_weights_leave_no_folder(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    parts = tensors()
    change(parts)
    with pytest.raises(ValueError, match=f"^somebody/model.*{message}"):
        from_weights(tmp_path / "run", iter(parts.items()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fields",
    [
        dict(norm="layernorm", mlp="gelu", position="learned", bias="all"),
        dict(tie_embeddings=False, n_kv_head=1, qk_norm=True),
        dict(labels=("ham", "spam")),
    ],
)
def test_shapes_are_those_of_the_model(fields: dict[str, object]) -> None:
    config = SMALL.change(**fields)
    kind = GPTClassifier if config.labels else GPTModel
    there = {name: tuple(tensor.shape) for name, tensor in kind(config).state_dict().items()}
    assert shapes(config) == there
