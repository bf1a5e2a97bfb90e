"""A run as a GGUF: one file with weights, tokenizer and chat template, for llama.cpp and Ollama.

Names, layouts and keys are those of llama.cpp's own converter, convert_hf_to_gguf.py.
H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from gptsmith import files
from gptsmith.chat_template import ChatTemplate
from gptsmith.interop import gguf_tokenizer, modelfile
from gptsmith.interop.gguf_tokenizer import Table
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.model.rope import rotary_frequencies
from gptsmith.model.stock import stock_class
from gptsmith.run import Run, Which

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

Kind = Literal["f32", "f16", "bf16", "q8_0"]

# class of transformers -> architecture of llama.cpp
_ARCHITECTURES = {
    "GPT2LMHeadModel": "gpt2",
    "LlamaForCausalLM": "llama",
    "ArceeForCausalLM": "arcee",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# They rotate neighbouring values of a head, where we and the qwens rotate the pairs (i, i + D/2).
_NEIGHBOURS = ("llama", "arcee")

# our modules -> their tensors in a GGUF, in the order of our rows
_NAMES = {
    "embedding.token": ("token_embd",),
    "embedding.position": ("position_embd",),
    "attention_norm": ("attn_norm",),
    "attention.qkv": ("attn_q", "attn_k", "attn_v"),
    "attention.q_norm": ("attn_q_norm",),
    "attention.k_norm": ("attn_k_norm",),
    "attention.proj": ("attn_output",),
    "mlp_norm": ("ffn_norm",),
    "mlp.gate_up": ("ffn_gate", "ffn_up"),
    "mlp.up": ("ffn_up",),
    "mlp.down": ("ffn_down",),
    "final_norm": ("output_norm",),
    "head": ("output",),
}
_BLOCK = 32  # weights of a row that share a scale in q8_0


def export(run: Run, out: Path, *, kind: Kind = "f16", checkpoint: Which = "last") -> list[str]:
    """Write OUT/NAME-KIND.gguf and OUT/Modelfile (for `ollama create`), NAME that of the run.

    All or nothing; weights are converted one tensor at a time. kind q8_0: 8 bits a weight and a
    scale for each 32. Vectors and position embeddings are f32 in every kind.
    Returns what the user should hear. ValueError for what llama.cpp cannot compute: classifiers,
    architectures without a stock class, tokenizers with an unknown split, f16 that overflows.
    FileExistsError if `out` is occupied.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise ValueError('gguf is not installed: pip install "gptsmith[gguf]"') from None
    files.refuse_occupied(out)
    config, tokenizer = run.model_config, run.tokenizer
    architecture, table = _architecture(config), gguf_tokenizer.table(tokenizer)
    V = len(table.tokens)
    if V > config.vocab_size:
        raise ValueError(f"{run.path}: {V} tokens, but the model has {config.vocab_size} rows")
    chat = run.chat_template
    go: str | None = "{{ .Prompt }}"  # the text as it is
    if chat is not None:
        go = modelfile.go_template(chat, table.tokens[table.bos] if table.add_bos else None)
    parts = list(_parts(run.load_model(checkpoint), architecture, V))
    notes = [*([run.notice] if run.notice else []), *table.notes]
    if wide := [p for p in parts if kind != "f16" and p.kind(kind) == "f16"]:
        notes.append(f"{len(wide)} tensors are f16: their rows are no multiple of {_BLOCK}")
    if go is None:
        notes.append("no TEMPLATE for Ollama: its language has no equal of this chat template")
    name = run.path.resolve().name
    with files.atomic_folder(out) as folder:
        writer = GGUFWriter(folder / f"{name}-{kind}.gguf", architecture)
        try:
            _describe(writer, name, config, kind, V)
            _describe_tokenizer(writer, table, chat)
            _write(writer, parts, kind)
        finally:
            writer.close()
        stops = [table.tokens[i] for i in (chat.stop_ids if chat else (table.eos,))]
        text = modelfile.text(f"{name}-{kind}", config.context_length, stops, go)
        files.write_text(folder / "Modelfile", text)
    return notes


def _architecture(config: ModelConfig) -> str:
    if config.labels:
        raise ValueError(
            "this is a classifier, and llama.cpp has no classifying head for its architecture: "
            "export it with --format hf"
        )
    architecture = _ARCHITECTURES[stock_class(config)]
    if config.mlp == "gelu_erf":
        raise ValueError(
            "mlp 'gelu_erf': llama.cpp computes GPT-2 with the tanh form of GELU; write gelu into "
            "model.json to take that (logits differ by up to 0.01), or export with --format hf"
        )
    scaling = config.rope_scaling
    if scaling and scaling.rope_type == "llama3" and architecture.startswith("qwen"):
        raise ValueError(
            f"rope_scaling llama3: llama.cpp's {architecture} has none, its llama has; "
            "export with --format hf"
        )
    return architecture


@dataclass(frozen=True)
class _Part:
    """One tensor of the file: a view of ours, and the heads that its rows hold if each is to be
    reordered for a rotation of neighbours, else 0."""

    name: str
    tensor: Tensor
    heads: int = 0

    def kind(self, wanted: Kind) -> Kind:
        """How it is stored. As in llama.cpp's converter, what is small is not made smaller."""
        if self.tensor.dim() == 1 or self.name.startswith("position_embd"):
            return "f32"
        return "f16" if wanted == "q8_0" and self.tensor.shape[1] % _BLOCK else wanted

    def values(self) -> np.ndarray:
        x: np.ndarray = self.tensor.detach().float().numpy()
        if not self.heads:
            return x
        halves = x.reshape(self.heads, 2, -1, *x.shape[1:])  # (H, 2, D/2, ...)
        return halves.swapaxes(1, 2).reshape(x.shape)


def _parts(model: GPTModel, architecture: str, V: int) -> Iterator[_Part]:
    """What the file holds. A tied head is not stored: llama.cpp then takes the embedding."""
    config = model.config
    H, K, D, F = config.n_head, config.K, config.D, config.F
    rows = {"attention.qkv": (H * D, K * D, K * D), "mlp.gate_up": (F, F)}
    turned = {"attn_q": H, "attn_k": K} if architecture in _NEIGHBOURS else {}
    for ours, tensor in model.state_dict().items():
        module, ending = ours.rsplit(".", 1)  # weight or bias
        block = ""
        if module.startswith("blocks."):
            _, layer, module = module.split(".", 2)
            block = f"blk.{layer}."
        if module in ("embedding.token", "head"):
            tensor = tensor[:V]  # without the rows that pad the vocabulary
        names = _NAMES[module]
        if module == "attention.qkv" and architecture == "gpt2":
            names = ("attn_qkv",)  # one there as well
        pieces = tensor.split(rows[module]) if len(names) > 1 else (tensor,)
        for name, piece in zip(names, pieces, strict=True):
            yield _Part(f"{block}{name}.{ending}", piece, turned.get(name, 0))
    if config.rope_scaling and config.rope_scaling.rope_type == "llama3":
        plain = rotary_frequencies(config.change(rope_scaling=None))
        yield _Part("rope_freqs.weight", plain / rotary_frequencies(config))  # divisors, (D/2,)


def _describe(writer: GGUFWriter, name: str, config: ModelConfig, kind: Kind, V: int) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

    file_types = {
        "f32": LlamaFileType.ALL_F32,
        "f16": LlamaFileType.MOSTLY_F16,
        "bf16": LlamaFileType.MOSTLY_BF16,
        "q8_0": LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_types[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(V)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.F)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.K)
    if config.norm == "layernorm":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.position == "rope":
        writer.add_key_length(config.D)
        writer.add_value_length(config.D)
        writer.add_rope_dimension_count(config.D)
        writer.add_rope_freq_base(config.rope_theta)
        if config.rope_scaling and config.rope_scaling.rope_type == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config.rope_scaling.factor)


def _describe_tokenizer(writer: GGUFWriter, table: Table, chat: ChatTemplate | None) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(table.pre)
    writer.add_token_list(table.tokens)
    writer.add_token_types(table.types)
    writer.add_token_merges(table.merges)
    writer.add_bos_token_id(table.bos)
    writer.add_eos_token_id(table.eos)
    writer.add_add_bos_token(table.add_bos)
    if table.pad is not None:
        writer.add_pad_token_id(table.pad)
    if chat is not None:
        writer.add_eot_token_id(chat.stop_ids[0])  # the end of an answer
        writer.add_chat_template(chat.source)


def _write(writer: GGUFWriter, parts: list[_Part], kind: Kind) -> None:
    """The file: first what is in it, then the tensors in the same order, one by one."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    stored = [GGMLQuantizationType[part.kind(kind).upper()] for part in parts]
    for part, how in zip(parts, stored, strict=True):
        weights, size = GGML_QUANT_SIZES[how]
        bytes_ = part.tensor.numel() // weights * size
        writer.add_tensor_info(part.name, part.tensor.shape, np.dtype(np.float32), bytes_, how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part, how in zip(parts, stored, strict=True):
        try:
            writer.write_tensor_data(_encoded(part, how))
        except OSError as error:  # numpy's says neither what nor why
            raise OSError(error.errno or errno.ENOSPC, f"not all was written ({error})") from None


def _encoded(part: _Part, how: GGMLQuantizationType) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    values = part.values()
    if how is GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        raise ValueError(
            f"{part.name} has {np.abs(values).max():.3g}, more than f16 can hold: take kind bf16"
        )
    return values if how is GGMLQuantizationType.F32 else quants.quantize(values, how)
