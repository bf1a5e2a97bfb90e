"""Export to GGUF: weights, tokenizer and chat template in one file, for llama.cpp and Ollama.

Names, layouts and keys are those of llama.cpp's own converter, convert_hf_to_gguf.py.
H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, assert_never

import numpy as np
from torch import Tensor

from gptsmith import files
from gptsmith.chat_template.template import ChatTemplate
from gptsmith.interop import gguf_tokenizer, modelfile
from gptsmith.interop.external_model import ExportableModel, check_vocabulary
from gptsmith.interop.gguf_tokenizer import GgufVocabulary
from gptsmith.interop.hf_mapping import family_of, tensor_layout
from gptsmith.model.config import ModelConfig
from gptsmith.model.rope import rotary_frequencies

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]

# Architectures for which llama.cpp rotates adjacent values of a head (interleaved RoPE); ours and
# Qwen's rotate the pairs (i, i + D/2).
_INTERLEAVED_ROPE = ("llama", "arcee")

_BLOCK = 32  # weights of a row that share a scale in q8_0 and q4_0


def export(model: ExportableModel, out: Path, kind: Kind = "f16") -> list[str]:
    """Write OUT/NAME-KIND.gguf and OUT/Modelfile (for `ollama create`); NAME is the model's.

    The folder is written completely or not at all; weights are converted one tensor at a time.
    kind: the format of the weights. q8_0 and q4_0 quantize them to 8 and 4 bits, with one f16
    scale per block of 32 (8.5 and 4.5 bits per weight in all); the head is q8_0 in both. Vectors
    and position embeddings are always stored as f32. Returns notes for the user. Raises ValueError
    for what llama.cpp does not support (classifiers, architectures without a transformers class,
    tokenizers with an unknown pre-tokenizer), for weights beyond the range of the format and for
    rows that cannot be divided into blocks, and FileExistsError if `out` exists and is not empty.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise ValueError('gguf is not installed: pip install "gptsmith[gguf]"') from None
    files.check_creatable(out)
    config, chat = model.config, model.chat_template
    architecture, table = _architecture(config), gguf_tokenizer.table(model.tokenizer)
    check_vocabulary(model.name, model.tokenizer, config)
    V = len(table.tokens)
    ollama_template: str | None = "{{ .Prompt }}"  # the text as it is
    if chat is not None:
        ollama_template = modelfile.go_template(
            chat, table.tokens[table.bos] if table.add_bos else None
        )
    parts = list(_gguf_tensors(config, model.tensors(), architecture, V))
    kinds = [part.kind(kind) for part in parts]
    notes = list(table.notes)
    if unnamed := _other_eos_ids(table, chat)[2:]:
        names = ", ".join(table.tokens[i] for i in unnamed)
        notes.append(
            f"of the tokens that end a text, a GGUF names three: {names} only the Modelfile"
        )
    if ollama_template is None:
        notes.append("Modelfile without TEMPLATE: Ollama cannot express the chat template")
    name = "".join(c if c.isprintable() else "_" for c in model.name)  # a Modelfile has lines
    stem = f"{name}-{kind}"
    with files.atomic_folder(out) as folder:
        writer = GGUFWriter(folder / f"{stem}.gguf", architecture)
        try:
            _write_metadata(writer, model.name, config, kind, V)
            _write_tokenizer(writer, table, chat)
            _write(writer, parts, kinds)
        finally:
            writer.close()
        stops = [
            table.tokens[i]
            for i in dict.fromkeys([*(chat.stop_ids if chat else ()), *table.eos_ids])
        ]
        files.write_text(
            folder / "Modelfile",
            modelfile.text(stem, config.context_length, stops, ollama_template),
        )
    return notes


def _architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the architecture, which equals the model_type of transformers."""
    from gguf import MODEL_ARCH_NAMES

    if config.labels:
        raise ValueError(
            "this is a classifier, and llama.cpp has no classification head for its architecture: "
            "export it with --format hf"
        )
    architecture = family_of(config).model_type
    if architecture not in MODEL_ARCH_NAMES.values():
        raise ValueError(f"{architecture} models cannot be exported to GGUF: use --format hf")
    if config.mlp == "gelu_erf":
        raise ValueError(
            "mlp 'gelu_erf': llama.cpp computes GPT-2 with the tanh form of GELU; to accept that "
            "(logits differ by up to 0.01), set mlp to gelu in model.json, or use --format hf"
        )
    scaling = config.rope_scaling
    if scaling and scaling.rope_type == "llama3" and architecture.startswith("qwen"):
        raise ValueError(
            f"rope_scaling llama3: llama.cpp supports it in llama, not in {architecture}; "
            "use --format hf"
        )
    return architecture


@dataclass(frozen=True)
class _GgufTensor:
    """One tensor of the file, a view of ours. heads: the number of heads in its rows if these are
    permuted for interleaved RoPE, else 0. is_head: whether it makes the logits."""

    name: str
    tensor: Tensor
    heads: int = 0
    is_head: bool = False

    def kind(self, wanted: Kind) -> Kind:
        """How it is stored. As with llama.cpp's own tools, small tensors keep their precision, and
        the head has more bits than the rest (there 6, which the package gguf cannot write).
        ValueError for rows that are no whole number of blocks."""
        if self.tensor.dim() == 1 or self.name.startswith("position_embd"):
            return "f32"
        if wanted.startswith("q") and self.tensor.shape[1] % _BLOCK:
            raise ValueError(
                f"{wanted} rounds weights in blocks of {_BLOCK}, but the rows of {self.name} have "
                f"{self.tensor.shape[1]}: use --dtype fp16 or bf16"
            )
        return "q8_0" if wanted == "q4_0" and self.is_head else wanted

    def values(self) -> np.ndarray:
        x: np.ndarray = self.tensor.detach().float().numpy()
        if not self.heads:
            return x
        halves = x.reshape(self.heads, 2, -1, *x.shape[1:])  # (H, 2, D/2, ...)
        return halves.swapaxes(1, 2).reshape(x.shape)


def _gguf_tensors(
    config: ModelConfig, tensors: Mapping[str, Tensor], architecture: str, V: int
) -> Iterator[_GgufTensor]:
    """The tensors of the file. A tied head is not stored: llama.cpp then uses the embedding."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    name_map = get_tensor_name_map(arch, config.n_layer)
    heads = {"attn_q": config.n_head, "attn_k": config.K}
    if architecture not in _INTERLEAVED_ROPE:
        heads = {}
    head = "output.weight" if "head.weight" in tensors else "token_embd.weight"
    for ours, tensor in tensors.items():
        if ours in ("embedding.token.weight", "head.weight"):
            tensor = tensor[:V]  # without the rows that pad the vocabulary
        layout = tensor_layout(config, family_of(config).names, ours, len(tensor))
        for theirs, piece in zip(layout.names, tensor.split(layout.rows), strict=True):
            name = name_map.get_name(theirs, (".weight", ".bias"))
            assert name, theirs
            yield _GgufTensor(name, piece, heads.get(name.split(".")[-2], 0), name == head)
    if config.rope_scaling and config.rope_scaling.rope_type == "llama3":
        plain = rotary_frequencies(config.change(rope_scaling=None))
        yield _GgufTensor(
            "rope_freqs.weight", plain / rotary_frequencies(config)
        )  # divisors, (D/2,)


def _write_metadata(writer: GGUFWriter, name: str, config: ModelConfig, kind: Kind, V: int) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

    amount = "ALL" if kind == "f32" else "MOSTLY"
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[f"{amount}_{kind.upper()}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(V)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.F)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.K)
    match config.norm:
        case "layernorm":
            writer.add_layer_norm_eps(config.norm_eps)
        case "rmsnorm":
            writer.add_layer_norm_rms_eps(config.norm_eps)
        case _:
            assert_never(config.norm)
    match config.position:
        case "learned":
            pass
        case "rope":
            writer.add_key_length(config.D)
            writer.add_value_length(config.D)
            writer.add_rope_dimension_count(config.D)
            writer.add_rope_freq_base(config.rope_theta)
        case _:
            assert_never(config.position)
    if (scaling := config.rope_scaling) is not None:
        match scaling.rope_type:
            case "linear":
                writer.add_rope_scaling_type(RopeScalingType.LINEAR)
                writer.add_rope_scaling_factor(scaling.factor)
            case "llama3":
                pass  # the tensor rope_freqs
            case _:
                assert_never(scaling.rope_type)


def _write_tokenizer(writer: GGUFWriter, table: GgufVocabulary, chat: ChatTemplate | None) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(table.pre)
    writer.add_token_list(table.tokens)
    writer.add_token_types(table.types)
    writer.add_token_merges(table.merges)
    writer.add_bos_token_id(table.bos)
    writer.add_eos_token_id(table.eos)
    writer.add_add_bos_token(table.add_bos)
    if table.add_eos:
        writer.add_add_eos_token(True)
    if table.pad is not None:
        writer.add_pad_token_id(table.pad)
    others = (writer.add_eot_token_id, writer.add_eom_token_id)
    for add, i in zip(others, _other_eos_ids(table, chat), strict=False):
        add(i)
    if chat is not None:
        writer.add_chat_template(chat.source)


def _other_eos_ids(table: GgufVocabulary, chat: ChatTemplate | None) -> list[int]:
    """End-of-text ids besides eos; the one that ends an answer comes first, and may be eos."""
    answer = chat.stop_ids[:1] if chat else ()
    return [*answer, *(i for i in table.eos_ids if i not in (*answer, table.eos))]


def _write(writer: GGUFWriter, parts: list[_GgufTensor], kinds: list[Kind]) -> None:
    """Write the header, then the tensors in the same order, one at a time."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    stored = [GGMLQuantizationType[kind.upper()] for kind in kinds]
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
        except OSError as error:  # numpy's names neither file nor cause
            raise OSError(error.errno or errno.ENOSPC, f"incomplete write ({error})") from None


def _encoded(part: _GgufTensor, how: GGMLQuantizationType) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    values = part.values()
    steps = {"F16": 1, "Q8_0": 127, "Q4_0": 8}.get(how.name)  # the scale of a block is an f16
    if steps and np.abs(values).max() > steps * float(np.finfo(np.float16).max):
        raise ValueError(
            f"{part.name} has {np.abs(values).max():.3g}, more than {how.name.lower()} can hold: "
            "use --dtype bf16"
        )
    return values if how is GGMLQuantizationType.F32 else quants.quantize(values, how)
