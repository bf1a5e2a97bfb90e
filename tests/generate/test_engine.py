from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptsmith.generate.engine import Generation, _Text, generate, generate_text
from gptsmith.generate.sampling import SamplingConfig, sample
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.masks import Mask
from gptsmith.tokenizer import Tokenizer

CONTEXT, V = 16, 23
GPT2 = ModelConfig(
    n_layer=2, n_head=4, n_embd=16, context_length=CONTEXT, vocab_size=V,
    norm="layernorm", mlp="gelu", position="learned", bias="all",
)  # fmt: skip
LLAMA = GPT2.change(norm="rmsnorm", mlp="swiglu", position="rope", bias="none", n_kv_head=2)
MODELS = {
    "learned positions": GPT2,
    "rope, 2 kv heads": LLAMA,
    "rope, 1 kv head, window": LLAMA.change(
        n_kv_head=1, qk_norm=True, tie_embeddings=False, mask="causal() & sliding_window(5)"
    ),
    "prefix": GPT2.change(mask="prefix(4)"),
    "prefix and window": LLAMA.change(mask="sliding_window(6) & prefix(3)"),
    "bidirectional": LLAMA.change(mask="bidirectional()"),
    "context of 1": GPT2.change(context_length=1),
}


def make(config: ModelConfig) -> GPTModel:
    """In float64, so that rounding never decides and equal means equal."""
    torch.manual_seed(0)
    model = GPTModel(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@torch.no_grad()
def alone(model: GPTModel, prompt: list[int], config: SamplingConfig, seed: int) -> list[int]:
    """The definition: one row, the full forward for every token."""
    generator = torch.Generator().manual_seed(seed)
    limit = model.config.context_length
    context, new = list(prompt), []
    seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool)
    seen[0, context] = True
    for _ in range(config.max_new_tokens):
        if len(context) > limit:
            context = context[-max(1, limit // 2) :]
        logits = model(torch.tensor([context]))[:, -1]
        token = int(sample(logits, config, [generator], seen))
        seen[0, token] = True
        context.append(token)
        new.append(token)
    return new


def ids_of(results: list[Generation]) -> list[list[int]]:
    return [result.ids for result in results]


prompts = st.lists(
    st.lists(st.integers(0, V - 1), min_size=1, max_size=CONTEXT + 4), min_size=1, max_size=4
)
samplings = st.builds(
    SamplingConfig,
    max_new_tokens=st.integers(1, 2 * CONTEXT),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.none() | st.integers(1, V),
    top_p=st.none() | st.floats(0.1, 1),
    min_p=st.none() | st.floats(0, 0.3),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 100),
)


@pytest.mark.parametrize("model", [make(c) for c in MODELS.values()], ids=MODELS)
@settings(max_examples=12)
@given(prompts=prompts, config=samplings, stop=st.integers(0, V - 1))
def test_a_row_of_a_batch_is_the_row_alone(
    model: GPTModel, prompts: list[list[int]], config: SamplingConfig, stop: int
) -> None:
    results = generate(model, prompts, config)
    expected = [alone(model, p, config, config.seed + i) for i, p in enumerate(prompts)]
    assert ids_of(results) == expected
    assert all(result.finish == "length" for result in results)

    stopped = generate(model, prompts, config, stop_ids=[stop])
    for result, full in zip(stopped, expected, strict=True):
        assert result.ids == (full[: full.index(stop)] if stop in full else full)
        assert result.finish == ("stop" if stop in full else "length")

    seeds = [config.seed + i for i in range(len(prompts))]
    turned = generate(model, prompts[::-1], config, seeds=seeds[::-1])
    assert ids_of(turned) == expected[::-1]


@torch.no_grad()
def test_single_precision_rows_agree_within_rounding() -> None:
    model = make(LLAMA).float()
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    config = SamplingConfig(max_new_tokens=40)
    for i, result in enumerate(generate(model, prompts, config)):
        assert result.ids == alone(model, prompts[i], config, i)
        assert result.ids == generate(model, prompts[i : i + 1], config, seeds=[i])[0].ids


def test_a_bfloat16_model_generates() -> None:
    model = make(LLAMA).bfloat16()
    results = generate(model, [[1, 2, 3], [4]], SamplingConfig(max_new_tokens=30))
    assert [len(r.ids) for r in results] == [30, 30]


def test_the_work_is_one_position_per_token_and_finished_rows_leave() -> None:
    model = make(GPT2)
    shapes: list[tuple[int, ...]] = []
    model.embedding.token.register_forward_hook(lambda m, args, out: shapes.append(args[0].shape))
    config = SamplingConfig(max_new_tokens=10, temperature=1.5)
    [long, short] = generate(model, [[1, 2, 3], [4]], config)
    assert shapes == [(2, 3)] + [(2, 1)] * 9
    shapes.clear()
    stop = next(t for t in long.ids if t not in short.ids)
    at = long.ids.index(stop)
    generate(model, [[1, 2, 3], [4]], config, stop_ids=[stop])
    assert shapes == [(2, 3)] + [(2, 1)] * at + [(1, 1)] * (9 - at)


def test_past_the_context_the_row_alone_is_read_again() -> None:
    model = make(GPT2)
    shapes: list[tuple[int, ...]] = []
    model.embedding.token.register_forward_hook(lambda m, args, out: shapes.append(args[0].shape))
    prompts = [[1] * 15, [2] * 3]
    results = generate(model, prompts, SamplingConfig(max_new_tokens=6))
    assert shapes == [(2, 15), (2, 1), (2, 1), (1, 8), (2, 1), (2, 1), (2, 1)]
    assert [r.forgotten for r in results] == [9, 0]
    assert [r.notice for r in results] == [None, None]
    [cut] = generate(model, [[3] * 40], SamplingConfig(max_new_tokens=1))
    assert cut.forgotten == 32


def test_masks_that_look_ahead_say_why_they_are_slow() -> None:
    config = SamplingConfig(max_new_tokens=6)
    short, long = generate(make(MODELS["prefix"]), [[1], [1, 2, 3, 4, 5]], config)
    assert short.notice is not None
    assert "prefix(4)" in short.notice
    assert long.notice is None
    by_row = make(GPT2)
    by_row.mask = Mask(lambda b, h, q, k: (q >= k) & (b >= 0), "rows")
    with pytest.raises(ValueError, match="mask rows depends on the row"):
        generate(by_row, [[1]], config)


def test_the_models_mode_and_the_global_random_state_stay() -> None:
    model = make(GPT2.change(dropout=0.5)).train()
    state = torch.get_rng_state()
    config = SamplingConfig(max_new_tokens=20)
    first = generate(model, [[1, 2]], config)
    assert model.training
    assert model.blocks[0].training
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(model, [[1, 2]], config) == first
    assert torch.get_rng_state().equal(state)
    assert generate(model, [], config) == []


def test_wrong_input_is_refused_by_name() -> None:
    model, config = make(GPT2), SamplingConfig(max_new_tokens=2)
    with pytest.raises(ValueError, match=r"prompt 1 is empty: start a text with <\|endoftext\|>"):
        generate(model, [[1], []], config)
    for bad in (-1, V):
        with pytest.raises(ValueError, match=rf"prompt 0 holds the id {bad}, outside .* 0\.\.22"):
            generate(model, [[1, bad]], config)
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        generate(model, [[1], [2]], config, seeds=[1])
    with pytest.raises(ValueError, match="need a tokenizer"):
        generate(model, [[1]], config, stop=["x"])
    with pytest.raises(ValueError, match="empty string"):
        generate(model, [[1]], config, tokenizer=Tokenizer.byte(), stop=["x", ""])


# --- text ----------------------------------------------------------------------------------------


@contextmanager
def saying(model: GPTModel, ids: list[int]) -> Iterator[None]:
    """The model says these ids, whatever it has read."""
    queue = list(ids)

    def head(module: object, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out * 0 + model.head_weight[queue.pop(0)] * 1e3

    handle = model.final_norm.register_forward_hook(head)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def byte_model() -> GPTModel:
    model = make(GPT2.change(vocab_size=300, context_length=64, n_embd=64))
    with torch.no_grad():  # ids that can be told apart
        model.embedding.token.weight.div_(model.embedding.token.weight.norm(dim=1, keepdim=True))
    return model


TEXT = "Grüße, 世界! She said: STOP it."
GREEDY = SamplingConfig(max_new_tokens=len(TEXT.encode()), temperature=0)


def test_stop_strings_are_found_across_tokens_and_never_shown(byte_model: GPTModel) -> None:
    tokenizer = Tokenizer.byte()
    for stop, expected in [
        ((), TEXT),
        (("STOP",), "Grüße, 世界! She said: "),
        (("界",), "Grüße, 世"),
        (("said: STOP it. Now", "STXX"), TEXT),
        (("t.", "She"), "Grüße, 世界! "),
        (("G",), ""),
    ]:
        pieces: list[str] = []
        with saying(byte_model, tokenizer.encode(TEXT)):
            [result] = generate(
                byte_model,
                [[1]],
                GREEDY,
                tokenizer=tokenizer,
                stop=stop,
                on_token=lambda row, piece, pieces=pieces: pieces.append(piece),
            )
        assert result.text == expected == "".join(pieces)
        assert result.finish == ("length" if expected == TEXT else "stop")
        assert "\ufffd" not in result.text
        assert tokenizer.decode(result.ids).startswith(expected)


def test_a_character_cut_by_the_length_shows_as_replacement(byte_model: GPTModel) -> None:
    tokenizer = Tokenizer.byte()
    with saying(byte_model, "ab世".encode()):
        config = SamplingConfig(max_new_tokens=4, temperature=0)
        [result] = generate(byte_model, [[1]], config, tokenizer=tokenizer)
    assert result.text == "ab\ufffd"


@settings(max_examples=300)
@given(
    st.lists(st.text("ab ", max_size=4), max_size=12),
    st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3),
)
def test_pieces_do_not_matter_to_stop_strings(pieces: list[str], stop: list[str]) -> None:
    whole = "".join(pieces)
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole]
    expected = whole[: min(ends)[1]] if ends else whole
    text = _Text(stop)
    shown = ""
    for i, piece in enumerate(pieces):
        shown += text.push(piece)
        so_far = "".join(pieces[: i + 1])
        assert expected.startswith(shown)
        assert len(so_far) - len(shown) < max(map(len, stop), default=1) or text.stopped
    shown += text.push("", last=True)
    assert shown == expected
    assert text.stopped == bool(ends)


def test_ids_beyond_the_tokenizer_are_never_drawn(byte_model: GPTModel) -> None:
    tokenizer = Tokenizer.byte()  # 257 ids, the model has 300
    config = SamplingConfig(max_new_tokens=200, temperature=100.0)
    [padded] = generate(byte_model, [[1]], config, tokenizer=tokenizer)
    assert max(padded.ids) < tokenizer.vocab_size
    [whole] = generate(byte_model, [[1]], config)
    assert max(whole.ids) >= tokenizer.vocab_size
    with pytest.raises(ValueError, match=r"id 257, outside the vocabulary 0\.\.256"):
        generate(byte_model, [[257]], config, tokenizer=tokenizer)


def test_generate_text(byte_model: GPTModel) -> None:
    tokenizer = Tokenizer.byte()
    config = SamplingConfig(max_new_tokens=50, seed=3)
    pieces: dict[int, str] = {0: "", 1: "", 2: ""}

    def show(row: int, piece: str) -> None:
        pieces[row] += piece

    texts = generate_text(byte_model, tokenizer, ["", "Once", "世"], config, on_token=show)
    assert texts == list(pieces.values())
    again = generate_text(byte_model, tokenizer, ["<|endoftext|>"], config)
    assert again != texts[:1]  # what is typed is plain text ...
    [start] = generate(byte_model, [[tokenizer.eos_id]], config, tokenizer=tokenizer)
    assert start.text.startswith(texts[0])  # ... and no prompt at all is the special token
    with saying(byte_model, [*b"end", tokenizer.eos_id]):
        assert generate_text(byte_model, tokenizer, ["x"], GREEDY) == ["end"]
