from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptsmith.model import masks
from gptsmith.model.attention import attention
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.kv_cache import KVCache, PagedKVCache
from gptsmith.model.masks import Mask

pytestmark = pytest.mark.usefixtures("one_thread")
GPT2 = ModelConfig(
    n_layer=2, n_head=4, n_embd=16, context_length=24, vocab_size=31,
    norm="layernorm", mlp="gelu", position="learned", bias="all",
)  # fmt: skip
MODELS = {
    "gpt2": GPT2,
    "llama, 2 kv heads": GPT2.change(
        norm="rmsnorm", mlp="swiglu", position="rope", bias="none", n_kv_head=2
    ),
    "qwen3, 1 kv head": GPT2.change(
        norm="rmsnorm", mlp="relu2", position="rope", bias="qkv", n_kv_head=1, head_dim=6,
        qk_norm=True, tie_embeddings=False,
    ),
}  # fmt: skip
MASKS = [
    "causal()",
    "causal() & sliding_window(1)",
    "causal() & sliding_window(5)",
    "causal() & (sliding_window(3) | prefix(2))",
    "causal() & ~prefix(1)",
    "prefix(4)",
]


def per_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & ((h == 1) | ((q - k) % 3 == 0))


def make(config: ModelConfig) -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def cache_for(model: GPTModel, batch: int, mask: Mask | None = None) -> KVCache:
    return KVCache.for_model(model.config, mask or model.mask, batch)


def ids_of(model: GPTModel, *shape: int) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_decoding_token_by_token_equals_the_full_forward(config: ModelConfig, mask: str) -> None:
    model = make(config.change(mask=mask))
    ids = ids_of(model, 3, 24)
    full = model(ids)
    cache = cache_for(model, 3)
    assert cache.capacity == (model.mask.window or 24)
    logits = [model(ids[:, :4], cache=cache)]
    logits += [model(ids[:, t : t + 1], cache=cache) for t in range(4, 24)]
    close(torch.cat(logits, dim=1), full)
    assert cache.lengths == [24] * 3


@settings(max_examples=60)
@given(st.data())
@torch.no_grad()
def test_chunks_of_ragged_rows_equal_the_full_forward(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(list(MODELS.values())))
    model = make(config.change(mask=data.draw(st.sampled_from(MASKS))))
    ids = ids_of(model, 3, 24)
    full = model(ids)
    cache = cache_for(model, 3)
    done = [0, 0, 0]
    while min(done) < 24 and len(done):
        sizes = [
            data.draw(st.integers(4 if n == 0 else 0, 24 - n), label=f"row {row}")
            for row, n in enumerate(done)
        ]
        if not any(sizes):
            break
        T = max(sizes)
        positions = torch.full((3, T), -1)
        chunk = torch.zeros((3, T), dtype=torch.long)
        for row, (start, size) in enumerate(zip(done, sizes, strict=True)):
            positions[row, :size] = torch.arange(start, start + size)
            chunk[row, :size] = ids[row, start : start + size]
        logits = model(chunk, positions=positions, cache=cache)
        for row, (start, size) in enumerate(zip(done, sizes, strict=True)):
            close(logits[row, :size], full[row, start : start + size])
            done[row] = start + size
        assert cache.lengths == done


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_causal_function_mask_equals_the_full_forward(config: ModelConfig) -> None:
    model = make(config)
    rule = Mask(per_head)
    ids = ids_of(model, 2, 24)
    full = model(ids, mask=rule)
    cache = cache_for(model, 2, rule)
    parts = [model(part, mask=rule, cache=cache) for part in ids.split([5, 1, 1, 9, 8], dim=1)]
    close(torch.cat(parts, dim=1), full)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention_equals_the_fused_kernel(K: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 1, 8, generator=generator).to(dtype)
    k, v = torch.randn(2, 3, K, 11, 8, generator=generator).to(dtype)
    expanded = [x.repeat_interleave(4 // K, dim=1).float() for x in (k, v)]
    by_head = torch.rand(3, 4, 1, 11, generator=generator) < 0.5
    by_head[1, 2] = False  # sees nothing
    for mask in (None, by_head, by_head[:, :1], by_head[:1]):
        expected = F.scaled_dot_product_attention(q.float(), *expanded, attn_mask=mask).nan_to_num()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        actual = attention(q, k, v, mask)
        torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)
    assert (attention(q, k, v, by_head)[1, 2] == 0).all()


@torch.no_grad()
def test_masks_that_look_ahead_need_one_pass() -> None:
    model = make(GPT2)
    ids = ids_of(model, 2, 24)
    for expression, ahead in [("prefix(6)", 6), ("bidirectional()", 24), ("~causal()", 24)]:
        mask = masks.parse(expression)
        words = rf"mask {expression.replace('(', '.').replace(')', '.')}.*first {ahead}.*and 5 were"
        with pytest.raises(ValueError, match=words):
            model(ids[:, :5], mask=mask, cache=cache_for(model, 2, mask))
    mask = masks.prefix(6)
    cache = cache_for(model, 2, mask)
    ragged = torch.arange(6).repeat(2, 1)
    ragged[1, 5:] = -1
    with pytest.raises(ValueError, match="and 5 were"):
        model(ids[:, :6], mask=mask, positions=ragged, cache=cache)
    close(model(ids[:, :6], mask=mask, cache=cache), model(ids, mask=mask)[:, :6])
    with pytest.raises(ValueError, match="filled under the mask"):
        model(ids[:, 6:7], cache=cache)


@torch.no_grad()
def test_misuse_is_rejected() -> None:
    model = make(GPT2)
    ids = ids_of(model, 2, 24)
    cache = cache_for(model, 2)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="context_length 24"):
        model(ids[:, :1], cache=cache)
    for positions in ([[0], [4]], [[3], [3]], [[5], [5]]):
        cache = cache_for(model, 2)
        model(ids[:, :4], cache=cache)
        at = torch.tensor(positions)
        with pytest.raises(ValueError, match=r"cache of \[4, 4\] tokens cannot continue"):
            model(ids[:, :1], positions=at, cache=cache)
    small = KVCache.for_model(model.config, model.mask, 2, max_length=8)
    assert small.capacity == 8
    model(ids[:, :8], cache=small)
    with pytest.raises(ValueError, match="cache of 8 tokens is too small for 9"):
        model(ids[:, 8:9], cache=small)
    by_row = Mask(lambda b, h, q, k: (q >= k) & (b >= 0), "by row")
    with pytest.raises(ValueError, match="by row: it depends on the row"):
        model(ids, mask=by_row, cache=cache_for(model, 2))
    half = KVCache.for_model(model.config, model.mask, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16 got keys of torch.float32"):
        model(ids, cache=half)


class Part(NamedTuple):
    start: int
    stop: int
    pages: list[int]
    first: int = 0


@settings(max_examples=60)
@given(st.data())
@torch.no_grad()
def test_pages_equal_the_full_forward(data: st.DataObject) -> None:
    """Chunks of ragged rows, in pages in any order; pages before a window are given back."""
    config = data.draw(st.sampled_from(list(MODELS.values())))
    model = make(config.change(mask=data.draw(st.sampled_from(MASKS[:-1]))))
    ids = ids_of(model, 3, 24)
    full = model(ids)
    page = data.draw(st.integers(1, 7))
    cache = PagedKVCache(config, page)
    each = -(-24 // page)
    numbers = data.draw(st.permutations(range(3 * each)))
    cache.grow(3 * each)
    done = [0, 0, 0]
    for _ in range(data.draw(st.integers(1, 6))):
        parts, rows = [], []
        for row, start in enumerate(done):
            if size := data.draw(st.integers(0, 24 - start), label=f"row {row}"):
                oldest = 0 if model.mask.window is None else max(0, start - model.mask.window + 1)
                first = oldest // page
                pages = numbers[row * each + first : (row + 1) * each]
                parts.append(Part(start, start + size, pages, first))
                rows.append(row)
        if not parts:
            continue
        T = max(part.stop - part.start for part in parts)
        chunk = torch.zeros((len(parts), T), dtype=torch.long)
        for i, (row, part) in enumerate(zip(rows, parts, strict=True)):
            chunk[i, : part.stop - part.start] = ids[row, part.start : part.stop]
        cache.use(parts)
        logits = model(chunk, cache=cache)
        for i, (row, part) in enumerate(zip(rows, parts, strict=True)):
            close(logits[i, : part.stop - part.start], full[row, part.start : part.stop])
            done[row] = part.stop
        cache.grow(cache.k.shape[2] + data.draw(st.integers(0, 2)))


@torch.no_grad()
def test_a_copied_page_serves_another_continuation() -> None:
    model = make(MODELS["llama, 2 kv heads"])
    ids = ids_of(model, 2, 24)
    ids[1, :6] = ids[0, :6]
    cache = PagedKVCache(model.config, 4)
    cache.grow(5)
    cache.use([Part(0, 8, [3, 1])])
    model(ids[:1, :8], cache=cache)
    cache.copy(1, 4)
    cache.use([Part(6, 7, [3, 4]), Part(8, 9, [3, 1, 0])])
    both = model(torch.stack([ids[1, 6:7], ids[0, 8:9]]), cache=cache)
    close(both[0, 0], model(ids)[1, 6])
    close(both[1, 0], model(ids)[0, 8])
