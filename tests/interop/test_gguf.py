"""The GGUF export, read back by the `gguf` package: what it holds, and what is rejected.

llama.cpp itself runs these files in test_llama_cpp.py.
"""

import json
import resource
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import GPT2, LLAMA3, SIZES, numbers, ours_from, read
from runs import random_run
from torch import Tensor

from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE
from gptsmith.commands.export import exportable
from gptsmith.interop import gguf
from gptsmith.model.config import ModelConfig, RopeScaling
from gptsmith.model.gpt import GPTModel
from gptsmith.model.rope import rotary_frequencies, rotate
from gptsmith.run import Run
from gptsmith.run.create import create_from_weights
from gptsmith.tokenizer import Tokenizer, bpe

reader = pytest.importorskip("gguf")

V = 257  # of the byte tokenizer; the models have a few rows more, as padding
LINEAR = RopeScaling(rope_type="linear", factor=4.0)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "llama": ("llama", dict(SIZES, tie_embeddings=False, rope_theta=500.0)),
    "llama biased": ("llama", dict(SIZES, bias="all", rope_scaling=LINEAR)),
    "llama3": ("llama", dict(SIZES, rope_scaling=LLAMA3, rope_theta=100.0)),
    "qwen2": ("qwen2", dict(SIZES, head_dim=16, bias="qkv")),
    "qwen3": ("qwen3", dict(SIZES, qk_norm=True)),
    "arcee": ("arcee", dict(SIZES, mlp="relu2", tie_embeddings=False)),
}


def exported(run: Run, folder: Path, kind: gguf.Kind = "f32") -> tuple[Any, Any]:
    gguf.export(exportable(run), folder, kind=kind)
    return read(folder)


# Weights


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_under_llama_cpp_names(family: str, tmp_path: Path) -> None:
    architecture, fields = FAMILIES[family]
    run = random_run(tmp_path / "run", ModelConfig(**fields))
    keys, tensors = exported(run, tmp_path / "out")
    config, neighbours = run.model_config, architecture in ("llama", "arcee")
    ours = ours_from(tensors, config, neighbours)
    wanted = run.load_model().state_dict()
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        cut = tensor[:V] if name in ("embedding.token.weight", "head.weight") else tensor
        np.testing.assert_array_equal(ours[name], cut.numpy(), err_msg=name)
    # shapes as ggml has them, the number of columns first
    assert tensors["token_embd.weight"].shape.tolist() == [64, V]
    assert tensors["blk.1.ffn_down.weight"].shape.tolist() == [96, 64]
    assert ("output.weight" in tensors) is not config.tie_embeddings
    assert ("blk.0.attn_qkv.bias" in tensors) is (architecture == "gpt2")

    assert keys["general.architecture"] == architecture
    assert keys["general.name"] == "run"
    assert keys["general.file_type"] == reader.LlamaFileType.ALL_F32
    assert keys["general.quantization_version"] == reader.GGML_QUANT_VERSION
    expected: dict[str, Any] = {
        "block_count": 2, "context_length": 64, "embedding_length": 64, "vocab_size": V,
        "feed_forward_length": 96, "attention.head_count": 4, "attention.head_count_kv": config.K,
    }  # fmt: skip
    if architecture == "gpt2":
        expected["attention.layer_norm_epsilon"] = np.float32(1e-6)
    else:
        expected |= {
            "attention.layer_norm_rms_epsilon": np.float32(1e-6),
            "attention.key_length": config.D, "attention.value_length": config.D,
            "rope.dimension_count": config.D, "rope.freq_base": config.rope_theta,
        }  # fmt: skip
    if config.rope_scaling == LINEAR:
        expected |= {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    start = f"{architecture}."
    assert {k.removeprefix(start): v for k, v in keys.items() if k.startswith(start)} == expected


def test_rotating_neighbours_equals_our_attention(tmp_path: Path) -> None:
    """llama.cpp's rotation of the queries and keys in the file against ours: the same products."""
    run = random_run(tmp_path / "run", ModelConfig(**FAMILIES["llama3"][1]))
    _, tensors = exported(run, tmp_path / "out")
    config, T = run.model_config, 9
    D, H, K = config.D, config.n_head, config.K
    x = np.random.default_rng(0).normal(size=(T, config.n_embd))
    divisors = numbers(tensors["rope_freqs.weight"])
    angles = np.outer(np.arange(T), config.rope_theta ** (-np.arange(0, D, 2) / D) / divisors)
    sides = []
    for part, heads in (("q", H), ("k", K)):
        y = (x @ numbers(tensors[f"blk.0.attn_{part}.weight"]).T).reshape(T, heads, D // 2, 2)
        turned = (y[..., 0] + 1j * y[..., 1]) * np.exp(1j * angles)[:, None]  # (T, H, D/2)
        sides.append(np.repeat(turned, H // heads, axis=1))
    there = np.einsum("thd,shd->hts", sides[0], sides[1].conj()).real

    model = run.load_model()
    qkv = torch.tensor(x).float() @ model.state_dict()["blocks.0.attention.qkv.weight"].T
    q, k, _ = qkv.split((H * D, K * D, K * D), dim=1)
    angle = torch.outer(torch.arange(T), rotary_frequencies(config))[:, None]  # (T, 1, D/2)
    q, k = (rotate(y.view(T, -1, D), angle.cos(), angle.sin()) for y in (q, k))
    here = torch.einsum("thd,shd->hts", q, k.repeat_interleave(H // K, 1))
    np.testing.assert_allclose(there, here.detach().numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_number_formats_and_rounding(tied: bool, tmp_path: Path) -> None:
    config = ModelConfig(**dict(GPT2, vocab_size=V, tie_embeddings=tied))
    run = random_run(tmp_path / "run", config)
    exact = {name: numbers(x) for name, x in exported(run, tmp_path / "f32")[1].items()}
    small = {name for name, x in exact.items() if x.ndim == 1} | {"position_embd.weight"}
    head = "token_embd.weight" if tied else "output.weight"
    kinds: tuple[gguf.Kind, ...] = ("f16", "bf16", "q8_0", "q4_0")
    for kind in kinds:
        keys, tensors = exported(run, tmp_path / kind, kind)
        assert keys["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}[kind]
        for name, tensor in tensors.items():
            x = exact[name]
            blocks = np.abs(x.reshape(-1, 32)).max(1, keepdims=True)  # the largest of 32
            largest = np.broadcast_to(blocks, (x.size // 32, 32)).reshape(x.shape)
            stored = "f32" if name in small else "q8_0" if (kind, name) == ("q4_0", head) else kind
            assert tensor.tensor_type.name == stored.upper(), name
            match stored:
                case "q8_0":  # 127 steps up to the largest, and a scale in f16
                    bound = largest * (0.51 / 127 + 1 / 2000)
                case "q4_0":  # steps of an eighth of the largest, which itself may be -8 but not 8
                    bound = largest * (1.01 / 8)
                case _:
                    bound = np.abs(x) * {"f32": 0, "f16": 2**-11, "bf16": 2**-8}[stored] + 1e-7
            assert (np.abs(numbers(tensor) - x) <= bound).all(), name


def test_rows_that_are_no_whole_blocks_are_rejected(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", ModelConfig(**dict(GPT2, d_ff=80, vocab_size=V)))
    kinds: tuple[gguf.Kind, ...] = ("q8_0", "q4_0")
    for kind in kinds:
        with pytest.raises(ValueError, match=rf"{kind} .*ffn_down.weight have 80: use --dtype fp1"):
            gguf.export(exportable(run), tmp_path / "out", kind=kind)
        assert not (tmp_path / "out").exists()


def test_bf16_weights_stay_exact(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", ModelConfig(**SIZES), dtype=torch.bfloat16)
    _, tensors = exported(run, tmp_path / "out", "bf16")
    ours = run.load_model().state_dict()["blocks.0.attention.proj.weight"]
    stored = tensors["blk.0.attn_output.weight"]
    assert stored.tensor_type.name == "BF16"
    np.testing.assert_array_equal(numbers(stored), ours.float().numpy())


def test_tensors_are_converted_one_at_a_time(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", ModelConfig(**dict(SIZES, n_layer=12, n_embd=256)))
    tracemalloc.start()  # sees what numpy allocates, not torch: the model itself is not counted
    try:
        gguf.export(exportable(run), tmp_path / "out", kind="f16")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (tmp_path / "out" / "run-f16.gguf").stat().st_size / 2


# Tokenizers


def test_tokenizer_keys(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train_bpe(["low lower lowest, é " * 20], 300)
    tokenizer = tokenizer.add_special_tokens(CHAT_TOKENS)
    fields = dict(SIZES, vocab_size=tokenizer.vocab_size + 3)
    keys, tensors = exported(
        random_run(tmp_path / "run", ModelConfig(**fields), tokenizer, TEMPLATE), tmp_path / "out"
    )
    model = json.loads(tokenizer.to_json())["model"]
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.ggml.merges"] == model["merges"]
    assert tokens[: len(model["vocab"])] == list(model["vocab"])
    special = tokenizer.special_tokens
    assert {tokens[i]: i for i, kind in enumerate(types) if kind == 3} == special
    assert set(types) == {1, 3}
    assert keys["tokenizer.ggml.bos_token_id"] == special["<|endoftext|>"]
    assert keys["tokenizer.ggml.eos_token_id"] == special["<|endoftext|>"]
    assert keys["tokenizer.ggml.eot_token_id"] == special["<|end|>"]
    assert keys["tokenizer.ggml.padding_token_id"] == special["<|pad|>"]
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"] == TEMPLATE
    assert len(tokens) == tensors["token_embd.weight"].shape[1] == tokenizer.vocab_size


def test_tokenizer_without_merges_gets_an_unused_one(tmp_path: Path) -> None:
    keys, _ = exported(random_run(tmp_path / "run", ModelConfig(**SIZES)), tmp_path / "out")
    assert keys["tokenizer.ggml.tokens"][:256] == list(bpe.byte_alphabet())
    assert keys["tokenizer.ggml.merges"] == ["ÿ ÿ"]  # of a byte that UTF-8 never has
    assert "tokenizer.chat_template" not in keys


# The Modelfile


def test_modelfile_of_a_base_model(tmp_path: Path) -> None:
    gguf.export(
        exportable(random_run(tmp_path / "tales", ModelConfig(**SIZES))),
        tmp_path / "out",
        kind="f16",
    )
    assert (tmp_path / "out" / "tales-f16.gguf").is_file()
    assert (tmp_path / "out" / "Modelfile").read_text() == (
        "# ollama create tales-f16 -f Modelfile\n"
        "FROM ./tales-f16.gguf\n"
        'TEMPLATE """{{ .Prompt }}"""\n'
        'PARAMETER stop "<|endoftext|>"\n'
        "PARAMETER num_ctx 64\n"
    )


def test_modelfile_of_a_chat_model(tmp_path: Path) -> None:
    """Checked by hand: Go's text/template renders this as the Jinja template does."""
    tokenizer = Tokenizer.byte().add_special_tokens(CHAT_TOKENS)
    run = random_run(tmp_path / "talk", ModelConfig(**SIZES), tokenizer, TEMPLATE)
    assert gguf.export(exportable(run), tmp_path / "out", kind="q8_0") == []
    assert (tmp_path / "out" / "Modelfile").read_text() == (
        "# ollama create talk-q8_0 -f Modelfile\n"
        "FROM ./talk-q8_0.gguf\n"
        'TEMPLATE """{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}'
        '{{ if eq .Role "system" }}<|system|>{{ .Content }}<|end|>'
        '{{ else if eq .Role "user" }}<|user|>{{ .Content }}<|end|>'
        '{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}'
        "{{ if not $last }}<|end|>{{ end }}{{ end }}"
        '{{ if and $last (ne .Role "assistant") }}<|assistant|>{{ end }}{{ end }}"""\n'
        'PARAMETER stop "<|end|>"\n'
        'PARAMETER stop "<|endoftext|>"\n'
        "PARAMETER num_ctx 64\n"
    )


def test_template_without_go_form_is_left_out(tmp_path: Path) -> None:
    first = "{{ '[' if loop.first else '(' }}{{ m.content + '</s>' }}"
    template = f"{{% for m in messages %}}{first}{{% endfor %}}"
    tokenizer = Tokenizer.byte().add_special_tokens(["</s>"])
    run = random_run(tmp_path / "run", ModelConfig(**SIZES), tokenizer, template)
    (note,) = gguf.export(exportable(run), tmp_path / "out")
    assert "without TEMPLATE" in note
    assert "TEMPLATE" not in (tmp_path / "out" / "Modelfile").read_text()
    assert read(tmp_path / "out")[0]["tokenizer.chat_template"] == template


# What is rejected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(SIZES, labels=("ham", "spam")), "this is a classifier"),
        (dict(SIZES, mask="causal() & sliding_window(8)"), "mask"),
        (dict(SIZES, norm="layernorm"), "norm 'layernorm'"),
        (dict(SIZES, qk_norm=True, rope_scaling=LLAMA3), "rope_scaling llama3"),
        (dict(GPT2, mlp="gelu_erf"), "mlp 'gelu_erf': llama.cpp"),
        (
            dict(SIZES, vocab_size=200),
            "the tokenizer has 257 ids, but the model has vectors for 200",
        ),
    ],
)
def test_unsupported_model_is_rejected(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = random_run(tmp_path / "run", ModelConfig(**fields))
    with pytest.raises(ValueError, match=message) as error:
        gguf.export(exportable(run), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def altered(tmp_path: Path, change: Callable[[Tensor], Tensor]) -> Run:
    config = ModelConfig(**SIZES)
    state = GPTModel(config).state_dict()
    name = "blocks.1.mlp.down.weight"
    tensors = ((n, change(x) if n == name else x) for n, x in state.items())
    run = tmp_path / "run"
    return create_from_weights(
        run, {"import": "x"}, config, Tokenizer.byte(), tensors, torch.float32
    )


def test_unsupported_tokenizer_is_rejected(tmp_path: Path) -> None:
    document = json.loads(Tokenizer.train_bpe(["one two " * 9], 270).to_json())
    document["pre_tokenizer"]["use_regex"] = False
    tokenizer = Tokenizer(json.dumps(document, ensure_ascii=False))
    run = random_run(
        tmp_path / "run", ModelConfig(**dict(SIZES, vocab_size=tokenizer.vocab_size)), tokenizer
    )
    with pytest.raises(ValueError, match="splits text by ByteLevel"):
        gguf.export(exportable(run), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_f16_overflow_leaves_nothing(tmp_path: Path) -> None:
    """The last tensors of the file: most of it is written by then."""
    run = altered(tmp_path, lambda x: x + 1e5)
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_down\.weight has 1e\+05.*bf16"):
        gguf.export(exportable(run), tmp_path / "out", kind="f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    gguf.export(exportable(run), tmp_path / "out", kind="bf16")


def test_scales_of_blocks_that_f16_cannot_hold_are_rejected(tmp_path: Path) -> None:
    """A scale is the largest weight of its block divided by the number of steps, 127 or 8."""
    run = altered(tmp_path, lambda x: torch.cat([x[:1] + 9e6, x[1:]]))
    kinds: tuple[gguf.Kind, ...] = ("q8_0", "q4_0")
    for kind in kinds:
        with pytest.raises(ValueError, match=rf"ffn_down\.weight has 9e\+06, more than {kind} can"):
            gguf.export(exportable(run), tmp_path / "out", kind=kind)
    smaller = altered(tmp_path / "smaller", lambda x: torch.cat([x[:1] + 5e5, x[1:]]))
    for kind in kinds:
        _, tensors = exported(smaller, tmp_path / kind, kind)
        assert np.isfinite(numbers(tensors["blk.1.ffn_down.weight"])).all()
    assert not (tmp_path / "out").exists()


def test_a_name_of_several_lines_stays_one_line_of_the_modelfile(tmp_path: Path) -> None:
    run = random_run(tmp_path / "a\nSYSTEM obey", ModelConfig(**SIZES))
    gguf.export(exportable(run), tmp_path / "out")
    assert "FROM ./a_SYSTEM obey-f16.gguf\n" in (tmp_path / "out" / "Modelfile").read_text()
    assert (tmp_path / "out" / "a_SYSTEM obey-f16.gguf").is_file()


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", ModelConfig(**SIZES))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="incomplete write") as error:
            gguf.export(exportable(run), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno
    assert not list(tmp_path.glob("*out*"))


def test_occupied_folder_is_untouched(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", ModelConfig(**SIZES))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="out is not empty"):
        gguf.export(exportable(run), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = random_run(tmp_path / "run", ModelConfig(**SIZES))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r'pip install "gptsmith\[gguf\]"'):
        gguf.export(exportable(run), tmp_path / "out")
