"""Quantized weights: the quality they keep, the memory they save, and where there are none."""

import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import random_run

import gptsmith
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Request
from gptsmith.kernels import native
from gptsmith.model import lora
from gptsmith.model.config import LoraConfig, ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.run import Run
from gptsmith.tokenizer import Tokenizer

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=64, context_length=128, vocab_size=257)

needs_kernels = pytest.mark.skipif(
    native.kernels("int8") is None, reason="no compiled kernels here"
)


def sentences(count: int, seed: int) -> list[int]:
    """Bytes of sentences whose words follow from the first one."""
    choose = random.Random(seed)
    animals = {"cat": "mat", "dog": "log", "fox": "box", "hen": "pen", "ant": "plant"}
    text = ""
    for _ in range(count):
        animal = choose.choice(list(animals))
        number = choose.randrange(2, 10)
        text += f"The {animal} sat on the {animals[animal]} for {number} times {number} days. "
    return list(text.encode())


@pytest.fixture(scope="module")
def trained() -> GPTModel:
    """Trained for 60 steps: its weights are no longer those of any distribution."""
    torch.manual_seed(0)
    model, tokens = GPTModel(CONFIG), torch.tensor(sentences(2000, seed=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    for _ in range(60):
        starts = torch.randint(len(tokens) - 65, (8,))
        batch = torch.stack([tokens[i : i + 65] for i in starts.tolist()])  # (8, 65)
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def perplexity(engine: Engine, tokens: list[int]) -> float:
    windows = [tokens[i : i + 128] for i in range(0, len(tokens), 128)]
    nothing = SamplingConfig(max_new_tokens=0)
    generations = [engine.add(Request(ids, nothing, prompt_logprobs=0)) for ids in windows]
    list(engine.as_completed(generations))
    scores = [s.logprob for g in generations for s in g.prompt_logprobs if s is not None]
    return math.exp(-sum(scores) / len(scores))


# int8 rounds to 1/127 of the largest of 64 weights, int4 to an eighth of the largest of 32. Models
# of useful width lose less: 64 channels average few errors.
@needs_kernels
@pytest.mark.parametrize(("weights", "bound"), [("bfloat16", 1e-3), ("int8", 1e-3), ("int4", 5e-2)])
def test_perplexity_of_a_trained_model_stays(trained: GPTModel, weights: str, bound: float) -> None:
    tokens = sentences(200, seed=2)
    before = perplexity(Engine(trained), tokens)
    assert before < 20  # of 257 at first
    after = perplexity(Engine(trained, weights=weights), tokens)
    assert abs(after / before - 1) < bound


@needs_kernels
@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
def test_the_models_own_weights_are_freed_where_nobody_needs_them(weights: str) -> None:
    torch.manual_seed(0)
    model = GPTModel(CONFIG).eval()
    sampling = SamplingConfig(max_new_tokens=20, temperature=1)
    expected = Engine(model, weights=weights).generate([[1, 2, 3]], sampling)[0].ids
    engine = Engine(model, weights=weights, keep_model=False)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert engine.generate([[1, 2, 3]], sampling)[0].ids == expected
    assert repr(engine) == "Engine(2 layers, context 128, on cpu, 0 unfinished requests)"
    for use in (engine.refresh, lambda: Engine(model)):
        with pytest.raises(ValueError, match="weights were freed"):
            use()


def test_torchs_ops_keep_the_models_weights() -> None:
    model = GPTModel(CONFIG).eval()
    engine = Engine(model, page=16, keep_model=False)
    assert not engine.exact
    assert engine.generate([[1, 2, 3]], SamplingConfig(max_new_tokens=2))[0].ids


def test_modules_that_the_kernels_do_not_know_are_not_quantized() -> None:
    model = GPTModel(CONFIG).eval()
    lora.attach(model, LoraConfig(rank=2))
    with pytest.raises(ValueError, match=r"int8 weights need .* merge adapters, or do not quant"):
        Engine(model, weights="int8")


def test_without_a_compiler_nothing_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    native.kernels.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"no C compiler .*: install a C compiler, or do not"):
            Engine(GPTModel(CONFIG).eval(), weights="int4")
    finally:
        native.kernels.cache_clear()
    assert capsys.readouterr().err == ""


@needs_kernels
def test_a_run_is_quantized_when_it_is_loaded(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", CONFIG)
    loaded = gptsmith.load(run.path, quantize="int8", device="cpu")
    engine = Engine(Run.open(run.path).load_model(), Tokenizer.byte(), weights="int8")
    sampling = SamplingConfig(max_new_tokens=20, seed=3)
    [expected] = engine.generate(["The"], sampling)
    assert loaded.generate("The", max_new_tokens=20, seed=3) == expected.text
    assert all(p.isfinite().all() for p in loaded.model.parameters())  # kept: it is public
    with pytest.raises(ValueError, match=r"no weights 'int3': choose one of"):
        gptsmith.load(run.path, quantize="int3", device="cpu")  # type: ignore[arg-type]
