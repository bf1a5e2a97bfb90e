"""PackedModel: the model's numbers, bit-identical in any batch and however a text was split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Request
from gptsmith.kernels import build, native
from gptsmith.kernels.packed_model import PAGE, PackedModel, Pages, library_for
from gptsmith.model import lora
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import LoraConfig, ModelConfig
from gptsmith.model.gpt import GPTModel

V = 131
FORMATS = native.FORMATS
# every value of every axis, odd sizes, and masks with and without a fused form
MODELS: dict[str, dict] = {
    "gpt2": dict(norm="layernorm", mlp="gelu", position="learned", bias="all", head_dim=25),
    "llama": dict(n_kv_head=2, mlp="swiglu", head_dim=26, d_ff=150),
    "qwen3": dict(n_kv_head=1, qk_norm=True, tie_embeddings=False, head_dim=64),
    "window": dict(
        norm="layernorm", mlp="gelu_erf", bias="qkv", mask="causal() & sliding_window(70)"
    ),
    "prefix": dict(mlp="relu2", position="learned", head_dim=16, mask="prefix(5)"),
    "hidden-prefix": dict(bias="all", mask="causal() & ~prefix(3)", head_dim=90),
}


def make_model(name: str, **fields: object) -> GPTModel:
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=4, n_embd=100, vocab_size=V, context_length=256, head_dim=26)
    model = GPTModel(ModelConfig(**{**sizes, **MODELS[name], **fields})).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases away from 1 and 0
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def tokens(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def tables(rows: int, pages: int) -> Tensor:
    """Pages of rows, in no order."""
    order = torch.randperm(rows * pages, generator=torch.Generator().manual_seed(2))
    return order.int().view(rows, pages)


def read(packed: PackedModel, text: list[int], pages: Pages | None = None) -> Tensor:
    """Vectors of a text alone, in one pass."""
    n = -(-len(text) // PAGE)
    pages = pages or packed.pages(n)
    return packed.hidden(text, [0] * len(text), range(len(text)), tables(1, n), pages)


@pytest.fixture(scope="module")
def packed_models() -> dict[tuple[str, str], PackedModel]:
    chosen = [("gpt2", f) for f in FORMATS] + [(name, "bfloat16") for name in MODELS]
    return {(name, format): PackedModel(make_model(name), format) for name, format in chosen}


# Bounds of the largest error of a logit, in standard deviations of the logits of these random
# models: bf16 keeps 8 bits, int8 7 of weights and inputs, int4 3 of weights.
@pytest.mark.parametrize(
    ("format", "bound"), [("float32", 1e-5), ("bfloat16", 0.06), ("int8", 0.25), ("int4", 2.0)]
)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model(name: str, format: str, bound: float) -> None:
    model = make_model(name)
    assert library_for(model, format) is not None
    packed = PackedModel(model, format)
    text = tokens(200)
    with torch.no_grad():
        expected = model(torch.tensor([text]))[0]
    logits = packed.logits(read(packed, text))
    assert logits.shape == expected.shape
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < bound * expected.std()
    if format == "float32":
        assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "window", "prefix"])
def test_whole_texts_of_several_documents(name: str) -> None:
    model = make_model(name)
    packed = PackedModel(model, "float32")
    ids = torch.tensor([tokens(100), tokens(100, 2)])
    documents = torch.tensor([[0] * 40 + [1] * 60, [0] * 100])
    with torch.no_grad():
        for given in (None, documents):
            expected = model.hidden(ids, documents=given)
            assert (packed.whole(ids, given) - expected).abs().max() < 1e-4
    assert torch.equal(packed.whole(ids)[1], read(packed, tokens(100, 2)))


@pytest.mark.parametrize("variant", build.variants(), ids=lambda variant: variant.name)
def test_every_variant_computes_the_same_model(
    variant: build.Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        native, "kernels", lambda format, required=False: native.load(variant, format)
    )
    text = tokens(90)
    for name, format, bound in (("llama", "float32", 1e-5), ("gpt2", "bfloat16", 0.06),
                                ("llama", "int8", 0.25), ("gpt2", "int4", 2.0)):  # fmt: skip
        model = make_model(name)
        packed = PackedModel(model, format)
        with torch.no_grad():
            expected = model(torch.tensor([text]))[0]
        x = read(packed, text)
        assert (packed.logits(x) - expected).abs().max() < bound * expected.std()
        pages, table = packed.pages(2), tables(1, 2)
        one_by_one = [packed.hidden([t], [0], [i], table, pages) for i, t in enumerate(text)]
        assert torch.equal(torch.cat(one_by_one), x)


@given(data=st.data())
@settings(max_examples=25)
def test_bits_are_independent_of_the_batch_and_of_chunks(
    packed_models: dict[tuple[str, str], PackedModel], data: st.DataObject
) -> None:
    packed = packed_models[data.draw(st.sampled_from(sorted(packed_models)), label="model")]
    texts = [
        tokens(length, seed)
        for seed, length in enumerate(data.draw(st.lists(st.integers(6, 100), max_size=7)))
    ]
    n = 2
    pages, table = packed.pages(n * len(texts)), tables(len(texts), n)
    done, parts = [0] * len(texts), [[] for _ in texts]  # type: ignore[var-annotated]
    while any(d < len(text) for d, text in zip(done, texts, strict=True)):
        ids, rows, positions = [], [], []
        for row, text in enumerate(texts):
            left = len(text) - done[row]
            most = left if data.draw(st.booleans()) else min(left, 5)
            # the first tokens see each other under the mask prefix(5)
            count = data.draw(st.integers(min(5, most) if done[row] == 0 else 0, most))
            ids += text[done[row] : done[row] + count]
            rows += [row] * count
            positions += range(done[row], done[row] + count)
            done[row] += count
        if ids:
            x = packed.hidden(ids, rows, positions, table, pages)
            for row in set(rows):
                parts[row].append(x[torch.tensor(rows) == row])
    for text, part in zip(texts, parts, strict=True):
        assert torch.equal(torch.cat(part), read(packed, text))


@pytest.mark.parametrize("format", FORMATS)
def test_three_hundred_rows_have_the_bits_of_one(
    format: str, packed_models: dict[tuple[str, str], PackedModel]
) -> None:
    packed = packed_models["gpt2", format]
    ids = tokens(300)
    x = packed.hidden(ids, range(300), [0] * 300, tables(300, 1), packed.pages(300))
    logits = packed.logits(x)
    for row in (0, 7, 150, 299):
        alone = read(packed, [ids[row]])
        assert torch.equal(alone[0], x[row])
        assert torch.equal(packed.logits(alone)[0], logits[row])
    for count in (1, 2, 3, 5, 8, 32):
        assert torch.equal(packed.logits(x[:count]), logits[:count])


@pytest.mark.parametrize("format", FORMATS)
def test_bits_are_independent_of_threads(
    format: str, packed_models: dict[tuple[str, str], PackedModel]
) -> None:
    packed = packed_models["gpt2", format]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x = read(packed, tokens(70))
        results.append((x, packed.logits(x), read(packed, tokens(1))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_texts_share_the_pages_of_a_prefix(
    packed_models: dict[tuple[str, str], PackedModel],
) -> None:
    packed = packed_models["llama", "bfloat16"]
    prefix, one, two = tokens(PAGE), tokens(9, 3), tokens(20, 4)
    pages = packed.pages(3)
    shared = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
    packed.hidden(prefix, [0] * PAGE, range(PAGE), shared, pages)
    rows = [0] * len(one) + [1] * len(two)
    at = [*range(PAGE, PAGE + len(one)), *range(PAGE, PAGE + len(two))]
    x = packed.hidden(one + two, rows, at, shared, pages)
    assert torch.equal(x[: len(one)], read(packed, prefix + one)[PAGE:])
    assert torch.equal(x[len(one) :], read(packed, prefix + two)[PAGE:])


def test_what_is_read_stays_when_the_memory_grows(
    packed_models: dict[tuple[str, str], PackedModel],
) -> None:
    packed = packed_models["gpt2", "int8"]
    text = tokens(70)
    pages, table = packed.pages(0), torch.tensor([[0, 1]], dtype=torch.int32)
    pages.grow(1)
    packed.hidden(text[:60], [0] * 60, range(60), table, pages)
    first = pages.addresses[0]
    pages.grow(2)
    assert len(pages) == 2
    assert pages.addresses[0] == first  # it was not copied
    x = packed.hidden(text[60:], [0] * 10, range(60, 70), table, pages)
    assert torch.equal(x, read(packed, text)[60:])


def test_a_copied_page_holds_the_same(packed_models: dict[tuple[str, str], PackedModel]) -> None:
    packed = packed_models["gpt2", "int8"]
    text = tokens(31)
    pages = packed.pages(2)
    first, second = (torch.tensor([[i]], dtype=torch.int32) for i in (0, 1))
    packed.hidden(text[:-1], [0] * 30, range(30), first, pages)
    pages.copy(0, 1)
    x = packed.hidden(text[-1:], [0], [30], second, pages)
    assert torch.equal(x, read(packed, text)[-1:])


def test_pages_before_a_window_are_not_read(
    packed_models: dict[tuple[str, str], PackedModel],
) -> None:
    packed = packed_models["window", "bfloat16"]
    text = tokens(180)
    pages, table = packed.pages(3), tables(1, 3)
    packed.hidden(text[:-1], [0] * 179, range(179), table, pages)
    pages[table[0, 0]].fill_(torch.nan)  # position 179 sees 110 to 179
    table[0, 0] = -1
    assert torch.equal(packed.hidden(text[-1:], [0], [179], table, pages), read(packed, text)[-1:])


def test_what_an_earlier_text_left_in_a_page_is_not_seen(
    packed_models: dict[tuple[str, str], PackedModel],
) -> None:
    for name in ("gpt2", "prefix"):
        packed = packed_models[name, "bfloat16"]
        pages = packed.pages(2)
        read(packed, tokens(120, 5), pages)
        x = read(packed, tokens(70), pages)
        assert torch.equal(x, read(packed, tokens(70)))


def test_a_query_that_sees_no_key_mixes_nothing() -> None:
    model = make_model("hidden-prefix")  # positions 0 to 2 see nothing
    x = read(PackedModel(model, "float32"), tokens(3))
    with torch.no_grad():
        assert (x - model.hidden(torch.tensor([tokens(3)]))[0]).abs().max() < 1e-5


def test_refresh_takes_the_new_weights() -> None:
    model = make_model("gpt2")
    packed = PackedModel(model)
    before = read(packed, tokens(5))
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.add_(0.1)
    assert torch.equal(read(packed, tokens(5)), before)
    packed.refresh()
    with torch.no_grad():
        expected = model.hidden(torch.tensor([tokens(5)]))[0]
    assert (read(packed, tokens(5)) - expected).abs().max() < 1e-4


def test_a_classifier_has_vectors_and_no_logits() -> None:
    config = ModelConfig.preset("nano", labels=("a", "b"), vocab_size=V)
    model = GPTClassifier(config)
    assert library_for(model) is not None
    packed = PackedModel(model)
    x = read(packed, tokens(5))
    assert x.shape == (5, 64)
    with pytest.raises(ValueError, match="classifier"):
        packed.logits(x)


# Without kernels


def check_that_torch_serves(model: GPTModel) -> None:
    """Two texts in passes that mix them, against the model."""
    assert library_for(model) is None
    engine = Engine(model, chunk=64)
    assert not engine.exact
    texts = [tokens(80), tokens(100, 3)]
    greedy = SamplingConfig(max_new_tokens=1, temperature=0)
    found = [engine.add(Request(text, greedy, prompt_logprobs=V)) for text in texts]
    assert len([*engine.as_completed(found)]) == 2
    for text, generation in zip(texts, found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([text]))[0].log_softmax(-1)
        for row, one in zip(expected, generation.prompt_logprobs[1:], strict=False):
            assert one is not None
            ids, logprobs = zip(*one.top, strict=True)
            assert len(ids) == V
            assert (row[list(ids)] - torch.tensor(logprobs)).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_torch_serves_where_there_are_no_kernels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "kernels", lambda format: None)
    check_that_torch_serves(make_model(name))


def test_a_module_that_the_kernels_do_not_know_runs_its_own_code() -> None:
    model = make_model("gpt2")
    lora.attach(model, LoraConfig(rank=2))
    check_that_torch_serves(model)
    with pytest.raises(ValueError, match="int8 weights need the compiled kernels"):
        library_for(model, "int8")


def test_unknown_weights_are_rejected_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'int5'.*auto, float32, bfloat16, int8, int4"):
        PackedModel(make_model("gpt2"), "int5")


def test_a_model_in_bfloat16_keeps_its_weights() -> None:
    model = make_model("gpt2").bfloat16()
    packed = PackedModel(model)
    assert packed.cache_dtype == torch.bfloat16
    assert torch.equal(
        read(packed, tokens(9)), read(PackedModel(model.float(), "bfloat16"), tokens(9))
    )
