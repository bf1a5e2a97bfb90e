from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gptsmith.batch import Batch
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import PRESETS, ModelConfig
from gptsmith.model.flops import flops_per_token, kv_cache_bytes, parameters, training_memory
from gptsmith.model.gpt import GPTModel
from gptsmith.model.kv_cache import KVCache
from gptsmith.train.loss import CHUNK_BYTES, next_token_loss
from gptsmith.train.optim import Optimizer
from gptsmith.train.options import OptimConfig

# The published numbers of the stock models; of ours, what was counted when they were made.
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
    "tiny": 6_862_464,
    "nano": 3_274_752,
    "smollm2-135m": 134_515_008,
    "course": 64_279_552,
    "qwen3-0.6b": 596_049_920,
    "fast": 29_921_280,
}


def every(field: str) -> st.SearchStrategy[str]:
    """Each value that a field of ModelConfig allows."""
    return st.sampled_from(get_args(ModelConfig.model_fields[field].annotation))


axes = st.fixed_dictionaries(
    dict(
        n_layer=st.integers(1, 3),
        n_head=st.sampled_from([2, 4]),
        n_kv_head=st.sampled_from([1, 2]),
        n_embd=st.sampled_from([16, 24]),
        head_dim=st.sampled_from([4, 6]),
        d_ff=st.sampled_from([10, 64]),
        context_length=st.sampled_from([8, 12]),
        vocab_size=st.sampled_from([11, 50]),
        norm=every("norm"),
        mlp=every("mlp"),
        position=every("position"),
        bias=every("bias"),
        qk_norm=st.booleans(),
        tie_embeddings=st.booleans(),
        labels=st.sampled_from([(), (), ("no", "yes", "perhaps")]),
    )
).map(lambda fields: ModelConfig(**fields))


def count(c: ModelConfig) -> int:
    with torch.device("meta"):
        model = GPTClassifier(c) if c.labels else GPTModel(c)
        return sum(p.numel() for p in model.parameters())


def small(name: str, T: int) -> ModelConfig:
    """The preset at its own width ratios, cut down to what a test can run."""
    c = ModelConfig.preset(name)
    return ModelConfig(
        **{**c.model_dump(), "n_layer": 2, "vocab_size": 97, "context_length": T},
    )


def random_batch(c: ModelConfig, B: int, T: int) -> Batch:
    ids = torch.randint(c.vocab_size, (B, T + 1))
    return Batch(ids[:, :-1], ids[:, 1:])


def test_every_preset_has_its_exact_size() -> None:
    assert PARAMETERS.keys() == PRESETS.keys()
    for name, number in PARAMETERS.items():
        c = ModelConfig.preset(name)
        assert (count(c), parameters(c)) == (number, number), name


@given(axes)
@settings(max_examples=25)
def test_the_formulas_hold_for_any_combination_of_axes(c: ModelConfig) -> None:
    """Parameters and FLOPs are exact. Products are counted with attention's whole T x T (the
    plain kernel computes it so), forward and backward; norms and activations are not products."""
    assert parameters(c) == count(c)
    B, T = 2, 8
    model = GPTModel(c)
    batch = random_batch(c, B, T)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        # Of a classifier, all but its small head is counted.
        loss = model.hidden(batch.inputs).sum() if c.labels else next_token_loss(model, batch)
        loss.backward()
    assert flops_per_token(c, T) * B * T == counter.get_total_flops()
    assert flops_per_token(c) == flops_per_token(c, c.context_length)


def test_flops_of_gpt2_match_the_literature() -> None:
    c = ModelConfig.preset("gpt2")
    N, T = 124_439_808 - 1024 * 768, 1024  # position look-ups are no products
    assert flops_per_token(c) == pytest.approx(6 * N + 12 * 12 * 768 * T, rel=1e-3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["tiny", "fast", "smollm2-135m"])
def test_memory_of_weights_gradients_and_optimizer_is_exact(name: str, kind: str) -> None:
    c = small(name, 8)
    model = GPTModel(c)
    optimizer = Optimizer(model, OptimConfig(kind=kind), "cpu")
    next_token_loss(model, random_batch(c, 1, 8)).backward()
    optimizer.step()
    memory = training_memory(c, 1, 8, kind)
    weights = list(model.parameters())
    moments = [x for x in optimizer.state_tensors().values() if x.dim()]  # not the step counts
    assert memory.weights == sum(p.nbytes for p in weights)
    assert memory.gradients == sum(p.grad.nbytes for p in weights)
    assert memory.optimizer == sum(x.nbytes for x in moments)
    assert memory.kept == memory.weights + memory.gradients + memory.optimizer
    assert memory.total == memory.kept + max(memory.activations + memory.logits, memory.update)


def saved_bytes(c: ModelConfig, B: int, T: int) -> int:
    """What autograd really keeps between forward and backward: every storage once, no weights."""
    model = GPTModel(c)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # alive until counted, so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        next_token_loss(model, random_batch(c, B, T))
    return sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in own)


@pytest.mark.parametrize("name", ["gpt2", "tiny", "course", "smollm2-135m", "qwen3-0.6b", "fast"])
def test_memory_of_activations_is_close_for_every_family(name: str) -> None:
    c = small(name, 32)
    estimate = training_memory(c, 2, 32).activations
    assert estimate == pytest.approx(saved_bytes(c, 2, 32), rel=0.1)


@pytest.mark.parametrize("B", [2, 8])
def test_memory_in_bf16_is_near_that_of_an_eager_cpu(B: int) -> None:
    c = ModelConfig.preset("fast").change(
        n_layer=2, n_head=2, n_embd=128, vocab_size=257, context_length=256
    )
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_bytes(c, B, 256)
    assert training_memory(c, B, 256, autocast="cpu").activations == pytest.approx(kept, rel=0.1)


@given(axes.map(lambda c: c.change(d_ff=64, head_dim=6, labels=())))
@settings(max_examples=15)
def test_memory_of_activations_is_close_for_any_combination_of_axes(c: ModelConfig) -> None:
    estimate = training_memory(c, 4, 8).activations
    assert estimate == pytest.approx(saved_bytes(c, 4, 8), rel=0.25)


@pytest.mark.parametrize(
    ("name", "B", "kept", "recomputed"),
    [("gpt2", 8, 5115, 2803), ("gpt2", 32, 13_292, 4047), ("fast", 64, 3213, 1717),
     ("course", 16, 6398, 2359)],
)  # fmt: skip
def test_memory_in_bf16_is_near_that_of_a_gpu(
    name: str, B: int, kept: int, recomputed: int
) -> None:
    """Peaks in MiB of steps of one micro-batch, measured on an H200: Muon, eager, with and without
    checkpointing of blocks."""
    c = ModelConfig.preset(name, vocab_size=50304) if name == "gpt2" else ModelConfig.preset(name)
    for peak, checkpointing in ((kept, False), (recomputed, True)):
        memory = training_memory(
            c, B, c.context_length, "muon", autocast="cuda", checkpointing=checkpointing,
            chunk_bytes=CHUNK_BYTES["cuda"], accumulates=False,
        )  # fmt: skip
        assert 0.95 * peak < memory.total / 2**20 < 1.22 * peak


def test_memory_of_a_part_that_is_trained() -> None:
    c = small("tiny", 8)
    memory = training_memory(c, 1, 8, "muon", trained=100)
    assert (memory.gradients, memory.optimizer) == (400, 800)


def test_kv_cache_size_matches_the_formula() -> None:
    for name in ("gpt2", "smollm2-135m"):
        c = small(name, 16)
        cache = KVCache.for_model(c, GPTModel(c).mask, batch=3)
        assert kv_cache_bytes(c, 3, 16) == cache.k.nbytes + cache.v.nbytes


@pytest.mark.parametrize("axis", ["norm", "mlp", "position", "bias"])
@pytest.mark.parametrize("preset", ["tiny", "fast"])
def test_an_unknown_value_of_an_axis_is_never_counted(preset: str, axis: str) -> None:
    """Not as the value that is left when all others are excluded."""
    broken = small(preset, 16).model_copy(update={axis: "of the future"})
    with pytest.raises(AssertionError, match="of the future"):
        training_memory(broken, 1, 16)
