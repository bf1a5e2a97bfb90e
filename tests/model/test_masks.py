import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from gptsmith.model.attention import attention
from gptsmith.model.masks import (
    Mask,
    bidirectional,
    causal,
    dense_mask,
    documents,
    parse,
    prefix,
    sliding_window,
)

T, H, B = 9, 3, 2


def dense(mask: Mask, T: int = T, B: int = B, H: int = H) -> Tensor:
    at = torch.arange(T)
    return mask.dense(B, H, at, at).expand(B, H, T, T)


def odd_heads_look_back_two(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & ((h % 2 == 0) | (q - k <= 2))


leaves = st.one_of(
    st.just(causal()),
    st.just(bidirectional()),
    st.integers(0, T).map(prefix),
    st.integers(1, T).map(sliding_window),
    st.just(Mask(odd_heads_look_back_two)),
    st.lists(st.integers(0, 2), min_size=B * T, max_size=B * T).map(
        lambda ids: documents(torch.tensor(ids).view(B, T))
    ),
)
algebra = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda ab: ab[0] & ab[1]),
        st.tuples(inner, inner).map(lambda ab: ab[0] | ab[1]),
        inner.map(lambda a: ~a),
    ),
    max_leaves=6,
)
written = st.recursive(
    st.one_of(
        st.just(causal()),
        st.just(bidirectional()),
        st.integers(0, T).map(prefix),
        st.integers(1, T).map(sliding_window),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda ab: ab[0] & ab[1]),
        st.tuples(inner, inner).map(lambda ab: ab[0] | ab[1]),
        inner.map(lambda a: ~a),
    ),
    max_leaves=8,
)


def test_primitive_masks_against_tables_by_hand() -> None:
    q, k = torch.arange(T)[:, None], torch.arange(T)[None]
    assert dense(causal())[0, 0].equal(torch.ones(T, T).tril().bool())
    assert dense(bidirectional()).all()
    assert dense(sliding_window(3))[0, 0].equal(q - k < 3)
    assert dense(prefix(4))[0, 0].equal((k < 4) | (q >= k))
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5] * T])
    assert dense(documents(ids))[:, 0].equal(ids[:, :, None] == ids[:, None, :])
    for bad in (ids[0], ids.float(), ids == 1):
        with pytest.raises(ValueError, match=r"documents\(ids\): got .* give integers"):
            documents(bad)


@given(algebra, algebra, algebra)
def test_the_algebra_is_boolean(a: Mask, b: Mask, c: Mask) -> None:
    assert dense(a & b).equal(dense(a) & dense(b))
    assert dense(a | b).equal(dense(a) | dense(b))
    assert dense(~a).equal(~dense(a))
    assert dense(~(a & b)).equal(dense(~a | ~b))
    assert dense(~(a | b)).equal(dense(~a & ~b))
    assert dense((a & b) & c).equal(dense(a & (b & c)))
    assert dense((a | b) | c).equal(dense(a | (b | c)))
    assert dense(a & (b | c)).equal(dense((a & b) | (a & c)))


@given(algebra)
def test_window_and_plain_causal_hold_for_the_dense_mask(mask: Mask) -> None:
    if mask.window is not None:
        q, k = torch.arange(T)[:, None], torch.arange(T)[None]
        assert not (dense(mask) & (q - k >= mask.window)).any()
    if mask.is_plain_causal:
        assert dense(mask).equal(dense(causal()))


@given(algebra)
def test_lookahead_is_the_shortest_exact_prefill(mask: Mask) -> None:
    ahead = dense(mask) & torch.ones(T, T).triu(1).bool()
    columns = ahead.flatten(0, 2).any(0).nonzero().flatten().tolist()
    assert mask.lookahead(T, H, B) == (columns[-1] + 1 if columns else 0)


def test_lookahead_is_measured_in_every_head_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    def sly(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) | ((h == 2) & (q == 500) & (k == 777))

    monkeypatch.setattr("gptsmith.model.masks._LOOKAHEAD_BLOCK", 100_000)
    assert Mask(sly).lookahead(1024, 3) == 778
    assert Mask(sly).lookahead(1024, 2) == 0
    assert Mask(sly).lookahead(700, 3) == 0
    assert prefix(5).lookahead(1024, 1) == 5
    assert prefix(1).lookahead(8, 1) == 0
    assert (causal() & sliding_window(4)).lookahead(1 << 40, 8) == 0  # proven, not measured
    for mask in (
        bidirectional(),
        causal() | bidirectional(),
        bidirectional() | causal(),
        ~causal(),
    ):
        assert mask.lookahead(8, 1) == 8
    assert (causal() & bidirectional()).lookahead(8, 1) == 0


def test_the_window_of_an_intersection_is_the_smaller_of_a_union_the_larger() -> None:
    narrow, wide = causal() & sliding_window(3), sliding_window(5)
    assert [(narrow & wide).window, (wide & narrow).window, (narrow | wide).window] == [3, 3, 5]
    assert [(narrow | causal()).window, (~narrow).window] == [None, None]
    assert [causal().is_plain_causal, narrow.is_plain_causal] == [True, False]


@given(written)
def test_the_expression_of_a_mask_reads_back_as_the_same_mask(mask: Mask) -> None:
    again = parse(mask.expression)
    assert dense(again).equal(dense(mask))
    assert (again.window, again.is_plain_causal) == (mask.window, mask.is_plain_causal)
    assert again.expression == mask.expression


def test_parse_keeps_the_precedence_of_python() -> None:
    text = "causal() & sliding_window(2) | ~(prefix(3) & bidirectional())"
    expected = (causal() & sliding_window(2)) | ~(prefix(3) & bidirectional())
    assert dense(parse(text)).equal(dense(expected))
    assert parse(text).expression == text
    assert parse("  (causal())\n").expression == "causal()"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("causl()", "causl()"),
        ("causal", "causal"),
        ("causal() and prefix(2)", "causal() and prefix(2)"),
        ("not causal()", "not causal()"),
        ("causal() & __import__('os').system('true')", "__import__('os').system('true')"),
        ("prefix(n=3)", "prefix(n=3)"),
        ("prefix(2+1)", "prefix(2+1)"),
        ("prefix(-1)", "prefix(-1)"),
        ("prefix()", "prefix()"),
        ("causal(3)", "causal(3)"),
        ("documents(3)", "documents(3)"),
        ("(lambda: 0)()", "(lambda: 0)()"),
        ("causal() ^ prefix(2)", "causal() ^ prefix(2)"),
        ("sliding_window(0)", "sliding_window(0)"),
        ("sliding_window(2.5)", "sliding_window(2.5)"),
        ("sliding_window(True)", "sliding_window(True)"),
        ("prefix('a')", "prefix('a')"),
        (f"prefix({10**30})", "prefix("),
        ("", ""),
        ("causal() &", "causal() &"),
        ("(" * 300, "(("),
        ("~" * 399 + "1", "1"),
        ("causal() & " * 100 + "causal()", "characters"),
        ("causal()\0", "causal()"),
        ("rule.py:", "rule.py:"),
    ],
)
def test_parse_rejects_by_name_and_in_one_line(text: str, part: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    message = str(caught.value)
    assert part in message
    assert "mask" in message
    assert "\n" not in message
    valid = ("sliding_window(n)", "whole number", "at most 400")
    assert any(word in message for word in valid)


@settings(max_examples=200)
@given(st.text("causl()&|~ 12.pref_ixn\n#'", max_size=40))
def test_parse_returns_a_mask_or_raises_value_error(text: str) -> None:
    try:
        mask = parse(text)
    except ValueError:
        return
    assert isinstance(mask, Mask)


def test_parse_runs_a_file_only_when_trusted(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "from gptsmith.model.masks import causal, sliding_window\n"
        "Path(__file__).with_name('ran').touch()\n"
        "def every_third(b, h, q, k):\n    return (q >= k) & ((q - k) % 3 == 0)\n"
        "local = causal() & sliding_window(4)\n"
        "def three(q, k, h):\n    return q >= k\n"
    )
    with pytest.raises(ValueError, match=r"mine\.py:every_third.*trust_code"):
        parse("mine.py:every_third", tmp_path)
    assert not (tmp_path / "ran").exists()
    mask = parse("mine.py:every_third", tmp_path, trust_code=True)
    assert (tmp_path / "ran").exists()
    assert mask.expression == "mine.py:every_third"
    assert dense(mask)[0, 0, 6].nonzero().flatten().tolist() == [0, 3, 6]
    window = parse("mine.py:local", tmp_path, trust_code=True)
    assert (window.expression, window.window) == ("mine.py:local", 4)
    for name in ("three", "absent", "Path.x"):
        with pytest.raises(ValueError, match=re.escape(name)):
            parse(f"mine.py:{name}", tmp_path, trust_code=True)
    with pytest.raises(FileNotFoundError, match=r"other\.py does not exist"):
        parse("other.py:f", tmp_path, trust_code=True)
    (tmp_path / "broken.py").write_text("1/0\n")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        parse("broken.py:f", tmp_path, trust_code=True)


def test_rules_of_lower_rank_plain_bools_and_tables_work_everywhere() -> None:
    table = torch.rand(H, T, generator=torch.Generator().manual_seed(0)) < 0.5
    rules = {
        "always": lambda b, h, q, k: True,
        "never": lambda b, h, q, k: False,
        "scalar": lambda b, h, q, k: torch.tensor(True),
        "keys only": lambda b, h, q, k: k % 2 == 0,
        "heads only": lambda b, h, q, k: h > 0,
        "a row": lambda b, h, q, k: (k % 2 == 0).flatten() if k.dim() else k % 2 == 0,
        "a table": lambda b, h, q, k: table[h, k] & (q >= k),
        "rows": lambda b, h, q, k: (b == 1) | (q >= k),
    }
    at = torch.arange(T)
    b, h = torch.arange(B), torch.arange(H)
    for name, rule in rules.items():
        mask = Mask(rule, name)
        expected = torch.tensor(
            [[[[bool(rule(i, j, q, k)) for k in at] for q in at] for j in h] for i in b]
        )
        assert dense(mask).equal(expected), name
        assert dense(~mask & causal()).equal(~expected & dense(causal())), name
        blocks = mask.block_mask(B, H, T, "cpu")
        assert blocks.shape == (
            B if name == "rows" else 1,
            H if "h" in name[:1] or "table" in name else 1,
            T,
            T,
        )


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda b, h, q, k: q >= k if h == 0 else q > k, "without|instead of if"),
        (lambda b, h, q, k: (q - k).float(), "returns torch.float32; return bool"),
        (lambda b, h, q, k: q - k, "returns torch.int64; return bool"),
        (lambda b, h, q, k: None, "returns NoneType; return bool"),
        (lambda q, k: q >= k, "takes 2 positional arguments"),
        (lambda b, h, q, k: torch.ones(5, 5).bool(), r"returns shape \(5, 5\)"),
        (lambda b, h, q, k: torch.ones(0)[q] > 0, "out of bounds"),
    ],
)
def test_rule_that_is_not_elementwise_is_rejected(rule: object, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Mask(rule, "mine")  # type: ignore[arg-type]
    assert str(caught.value).startswith("mask mine: ")
    assert "\n" not in str(caught.value)


def test_a_table_that_is_too_small_is_named_when_it_is_used() -> None:
    mask = Mask(lambda b, h, q, k: torch.ones(4).bool()[q] & (q >= k), "small")
    assert dense(mask, T=4).any()
    with pytest.raises(ValueError, match=r"mask small: .*large enough"):
        dense(mask, T=5)


def test_positions_per_row_and_empty_positions() -> None:
    q = torch.tensor([[3], [-1], [7]])
    k = torch.tensor([[0, 1, 2, 3], [0, 1, -1, -1], [8, 7, 6, -1]])
    seen = (causal() & sliding_window(2)).dense(3, 4, q, k)
    assert seen.shape == (3, 1, 1, 4)
    assert seen[:, 0, 0].tolist() == [
        [False, False, True, True],
        [False] * 4,
        [False, True, True, False],
    ]
    assert not (~causal()).dense(3, 4, q, k)[1].any()


def test_dense_mask_takes_bools_and_zero_one_of_any_dtype() -> None:
    truth = torch.rand(B, H, T, T, generator=torch.Generator().manual_seed(1)) < 0.5
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16):
        assert dense_mask(truth.to(dtype), B, H, T).equal(truth)
        assert dense_mask(truth[:, 0].to(dtype), B, H, T).equal(truth[:, :1])
        assert dense_mask(truth[0, 0].to(dtype), B, H, T).equal(truth[:1, :1])
    assert dense_mask(truth[:1, :1], B, H, T).shape == (1, 1, T, T)
    scores = torch.zeros(T, T).masked_fill(~truth[0, 0], -torch.inf)
    for bad in (scores, truth[0, 0] * 2, truth[0, 0] * 0.5, torch.full((T, T), torch.nan)):
        with pytest.raises(ValueError, match="other than 0 and 1"):
            dense_mask(bad, B, H, T)
    for shape in [(T,), (T, T + 1), (T + 1, T + 1), (B + 1, T, T), (B, H + 1, T, T), (1, 1, 1, 1),
                  (1, B, H, T, T), (1, T), ()]:  # fmt: skip
        with pytest.raises(ValueError, match=r"give \(9, 9\)"):
            dense_mask(torch.ones(shape), B, H, T)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize(
    "mask",
    [
        causal(),
        causal() & sliding_window(5),
        prefix(7),
        bidirectional(),
        causal() & ~prefix(3),  # the first three rows see nothing
        causal() & Mask(odd_heads_look_back_two),
        causal() & documents(torch.arange(40).view(2, 20) // 7),
        Mask(lambda b, h, q, k: False, "nothing"),
    ],
    ids=lambda mask: mask.expression,
)
def test_flex_attention_agrees_with_scaled_dot_product_attention(mask: Mask, K: int) -> None:
    B, H, T, D = 2, 4, 20, 8
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, T, D, generator=generator)
    k, v = torch.randn(2, B, K, T, D, generator=generator)
    at = torch.arange(T)
    seen = mask.dense(B, H, at, at)
    flex = flex_attention(q, k, v, block_mask=mask.block_mask(B, H, T, "cpu"), enable_gqa=K != H)
    sdpa = attention(q, k, v, seen)
    torch.testing.assert_close(flex, sdpa, atol=1e-5, rtol=1e-5)
    blind = ~seen.expand(B, H, T, T).any(-1)
    assert (sdpa[blind] == 0).all()
    assert (flex[blind] == 0).all()


def test_a_block_mask_made_in_inference_mode_serves_training_too() -> None:
    with torch.inference_mode():
        blocks = prefix(3).block_mask(2, 2, 20, "cpu")
    assert not blocks.kv_indices.is_inference()


def test_pictures(tmp_path: Path) -> None:
    mask = causal() & sliding_window(2)
    assert mask.show(3) == f"{mask.expression}\n ■ · ·\n ■ ■ ·\n · ■ ■"
    heads = (causal() & Mask(odd_heads_look_back_two)).show(4, H=2)
    assert heads.count("head ") == 2
    assert heads.count("\n") == 9
    mask.png(tmp_path / "mask.png", T=16)
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    Mask(odd_heads_look_back_two).png(tmp_path / "heads.png", H=3)
    assert repr(mask) == "Mask(causal() & sliding_window(2))"
