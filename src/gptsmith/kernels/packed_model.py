"""A GPTModel for inference: packed weights, keys and values in pages, one C call per forward pass.

N tokens of a pass, C channels, H query heads, D head size, V vocabulary, S keys.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptsmith.kernels import build, native
from gptsmith.kernels.native import PAGE
from gptsmith.kernels.packed_matrix import Memory, PackedMatrix, padded
from gptsmith.kernels.pages import Pages
from gptsmith.model import masks
from gptsmith.model.gpt import FusedLinear, GPTModel, RMSNorm, SwiGLU, TransformerBlock
from gptsmith.model.masks import Mask
from gptsmith.model.rope import rotary_table

Integers = Tensor | Sequence[int]


class PackedModel:
    """Hidden states and logits of a GPTModel for a batch of tokens of any number of sequences.

        packed = PackedModel(model)
        pages = packed.pages(4)
        table = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)  # the pages of sequence 0
        x = packed.hidden(ids, [0] * len(ids), range(len(ids)), table, pages)  # (N, C)
        logits = packed.logits(x[-1:])  # (1, V)

    weights: float32, bfloat16, int8 or int4; auto: bfloat16 for a model in it, else float32. Keys
    and values are float32 beside float32 weights, else bfloat16. The model's own weights are
    copied; keep_model=False frees them then, after which neither the model nor `refresh` works.

    A token's vector has the same bits in any batch, however its sequence is divided into passes,
    and for any number of threads. Only for models for which `library_for` returns kernels.
    """

    def __init__(self, model: GPTModel, weights: str = "auto", *, keep_model: bool = True) -> None:
        self._model = model
        self._weights, self._keep_model = weights, keep_model
        self.refresh()

    def refresh(self) -> None:
        """Pack the weights again after a change. The contents of pages are then out of date."""
        model, weights = self._model, self._weights
        library = library_for(model, weights)
        assert library is not None, "ask library_for first"
        self._packed = _Packed(library, model, _format(model, weights))
        if not self._keep_model:
            model.to("meta")

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, including an untied embedding."""
        return sum(kept.nbytes for kept in self._packed.kept)

    def pages(self, count: int) -> Pages:
        """Memory for keys and values of `count` times 64 positions."""
        return Pages(self._packed.config, count, self.cache_dtype)

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._packed.cache_dtype

    @torch.inference_mode()
    def hidden(
        self,
        ids: Integers,
        rows: Integers,
        positions: Integers,
        tables: Tensor | Sequence[Sequence[int]],
        pages: Pages,
    ) -> Tensor:
        """Vectors (N, C), fp32, after the final norm, of N tokens; keys and values go to the pages.

        Token i has ids[i] and is at positions[i] of sequence rows[i], whose pages are
        tables[rows[i]], one per 64 positions. Tokens of a row are adjacent and at consecutive
        positions, after those of earlier passes; a pass writes no other positions of the pages.
        Pages entirely before a mask's window are not read.
        """
        return self._packed.hidden(ids, rows, positions, tables, pages)

    @torch.inference_mode()
    def whole(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Vectors (B, T, C), fp32, of complete sequences (B, T); keys and values are discarded.
        documents (B, T): tokens attend to their own document only."""
        B, T = ids.shape
        per_row = -(-T // PAGE)
        tables = torch.arange(B * per_row, dtype=torch.int32).view(B, per_row)
        at, pages, seen = torch.arange(T), self.pages(B * per_row), None
        if documents is not None:
            mask = self._packed.mask & masks.documents(documents)
            allowed = mask.dense(B, self._packed.config.n_head, at, at)  # (B, H|1, T, T)
            keys = torch.full((B * T,), T, dtype=torch.int32)
            seen = allowed.transpose(0, 1).flatten(1, 2).contiguous(), keys
        rows, positions = torch.arange(B).repeat_interleave(T), at.repeat(B)
        x = self._packed.hidden(ids.flatten(), rows, positions, tables, pages, seen)  # (B * T, C)
        return x.view(B, T, -1)

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Logits (N, V), fp32, of vectors (N, C) that `hidden` returned."""
        return self._packed.logits(x)

    def sample(
        self,
        logits: Tensor,
        rows: Sequence[int],
        uniform: Sequence[float],
        temperature: Sequence[float],
        top_p: Sequence[float],
        min_p: Sequence[float],
        top_k: Sequence[int],
    ) -> list[int]:
        """The next token by each of these rows of logits (N, V), fp32, and for each row a random
        number in [0, 1), temperature, top_p (1: all tokens), min_p, top_k (0: all tokens); -1 where
        the largest logit is not a finite number. What they mean: generate/sampling.py."""
        settings = dict(
            uniform=uniform, temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k
        )
        return self._packed.sample(logits, rows, settings)


def library_for(model: GPTModel, weights: str = "auto") -> ctypes.CDLL | None:
    """The kernels, if they support the model with these weights; else None.

    None without a compiler (a notice says so once), on another device, and for a module that the
    kernels do not know, such as LoRA's; ValueError if quantized weights are asked for then. Also
    ValueError for an unknown format of weights, and for a model whose own weights were freed.
    """
    if weights not in ("auto", *native.FORMATS):
        choices = ", ".join(("auto", *native.FORMATS))
        raise ValueError(f"no weights {weights!r}: choose one of {choices}")
    device = model.embedding.token.weight.device
    if device.type == "meta":
        raise ValueError("this model's weights were freed (keep_model=False): load it again")
    if not weights.startswith("int"):
        return native.kernels(_format(model, weights)) if _known(model) else None
    if device.type != "cpu":
        problem = f"which run on a CPU, not on {device}: choose the device cpu"
    elif not _known(model):
        problem = "which do not know all modules of this model: merge adapters"
    else:
        try:
            return native.kernels(weights, required=True)
        except build.BuildError as error:
            problem = f"but {error}: install a C compiler"
    raise ValueError(f"{weights} weights need the compiled kernels, {problem}, or do not quantize")


def _format(model: GPTModel, weights: str) -> str:
    """`weights`, where auto is the format of the model's own."""
    if weights != "auto":
        return weights
    own = model.embedding.token.weight.dtype
    return "bfloat16" if own == torch.bfloat16 else "float32"


def _known(model: GPTModel) -> bool:
    """Whether the kernels know every part of the model. Other models, such as one with a new norm,
    are computed by PyTorch."""
    config = model.config
    if model.embedding.token.weight.device.type != "cpu" or config.mlp not in native.MLPS:
        return False
    norms = {"layernorm": nn.LayerNorm, "rmsnorm": RMSNorm}
    kind = norms.get(config.norm)
    for block in model.blocks:
        assert isinstance(block, TransformerBlock)
        attention, mlp = block.attention, block.mlp
        up = mlp.gate_up if isinstance(mlp, SwiGLU) else mlp.up
        if {type(m) for m in (attention.qkv, attention.proj, up, mlp.down)} - {
            nn.Linear,
            FusedLinear,
        }:
            return False
        if type(block.attention_norm) is not kind or type(block.mlp_norm) is not kind:
            return False
    plain = type(model.embedding.token) is nn.Embedding and type(model.head) in (
        nn.Linear,
        type(None),
    )
    return plain and type(model.final_norm) is kind


class _Packed:
    """The packed weights, and the C structures with their addresses."""

    def __init__(self, library: ctypes.CDLL, model: GPTModel, weights: str) -> None:
        self._library, self._memory = library, Memory()
        self.config, self.mask = model.config, model.mask
        self.cache_dtype = torch.float32 if weights == "float32" else torch.bfloat16
        self.kept: list[Tensor | PackedMatrix] = []  # what the structures point to
        config = model.config
        C, blocks = config.n_embd, [self._block(b, weights) for b in model.blocks]
        tied = model.head is None and not config.labels
        # Only one row of it is read for a token, so a table of its own is not quantized.
        own = weights if tied or not weights.startswith("int") else "bfloat16"
        embedding = self._matrix(model.embedding.token.weight, None, own)
        self._head = embedding if tied else None
        if model.head is not None:
            self._head = self._matrix(model.head.weight, None, weights)
        self._window = self.mask.causal_window  # None: each pass evaluates the mask
        self._native = native.Model(
            *(config.n_layer, config.n_head, config.K, config.D, C, config.F),
            *(native.NORMS.index(config.norm), native.MLPS.index(config.mlp)),
            self._window or 0,
            eps=config.norm_eps,
            blocks=(native.Block * config.n_layer)(*blocks),
            final_norm=self._norm(model.final_norm),
            embedding=embedding.native,
        )
        if config.rotary:
            cos, sin = rotary_table(config, torch.arange(config.context_length))
            self._native.cos, self._native.sin = self._vector(cos), self._vector(sin)
        if model.embedding.position is not None:
            self._native.positions = self._vector(model.embedding.position.weight)
        first = blocks[0]
        matrices = (first.qkv, first.proj, first.up, first.down)
        self._row_bytes = max(library.row_bytes(m.inputs) for m in matrices)
        # floats that a token needs in each part of the scratch memory
        self._widths = (
            *(first.qkv.outputs, first.proj.inputs, first.up.outputs, first.qkv.inputs),
            self._row_bytes // 4,
        )

    # Packing

    def _matrix(self, weight: Tensor, bias: Tensor | None, format: str) -> PackedMatrix:
        matrix = PackedMatrix(self._library, self._memory, weight, bias, format)
        self.kept.append(matrix)
        return matrix

    def _vector(self, x: Tensor, width: int = 0) -> int:
        """The address of a copy in fp32, padded with zeros to `width`."""
        x = x.detach().float().contiguous().clone()
        x = F.pad(x, (0, width - x.shape[-1])) if width else x
        self.kept.append(x)
        return x.data_ptr()

    def _norm(self, norm: nn.Module) -> native.Norm:
        width = padded(self.config.n_embd)
        bias = getattr(norm, "bias", None)
        assert isinstance(norm.weight, Tensor)
        return native.Norm(
            self._vector(norm.weight, width), None if bias is None else self._vector(bias, width)
        )

    def _block(self, block: nn.Module, weights: str) -> native.Block:
        assert isinstance(block, TransformerBlock)
        attention, mlp = block.attention, block.mlp
        up = mlp.gate_up if isinstance(mlp, SwiGLU) else mlp.up
        packed = native.Block(self._norm(block.attention_norm), self._norm(block.mlp_norm))
        if attention.q_norm is not None and attention.k_norm is not None:
            packed.q_norm = self._vector(attention.q_norm.weight)
            packed.k_norm = self._vector(attention.k_norm.weight)
        linears = {"qkv": attention.qkv, "proj": attention.proj, "up": up, "down": mlp.down}
        for name, linear in linears.items():
            assert isinstance(linear, nn.Linear)
            setattr(packed, name, self._matrix(linear.weight, linear.bias, weights).native)
        return packed

    # A pass

    def hidden(
        self,
        ids: Integers,
        rows: Integers,
        positions: Integers,
        tables: Tensor | Sequence[Sequence[int]],
        pages: Pages,
        seen: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """seen: a result of `_allowed`, instead of that of the model's mask."""
        ids, rows, positions, tables = map(_int32, (ids, rows, positions, tables))
        N, C = len(ids), self.config.n_embd
        assert tables.dim() == 2
        assert pages.dtype == self.cache_dtype
        batch = native.Batch(
            N,
            *(x.data_ptr() for x in (ids, rows, positions, tables)),
            tables.shape[1],
            pages.addresses.data_ptr(),
        )
        if seen or self._window is None:
            allowed, keys = seen or _allowed(self.mask, self.config.n_head, rows, positions)
            batch.allowed, batch.keys = allowed.data_ptr(), keys.data_ptr()
            batch.allowed_token = allowed.shape[2]
            batch.allowed_head = 0 if len(allowed) == 1 else allowed.shape[1] * allowed.shape[2]
        x = torch.empty(N, padded(C))
        runtime = native.runtime()
        scratch = [torch.empty(max(N, runtime.threads), width) for width in self._widths]
        addresses = native.Scratch(*(part.data_ptr() for part in scratch), self._row_bytes)
        self._library.forward(runtime, self._native, batch, addresses, x.data_ptr())
        return x[:, :C]

    def logits(self, x: Tensor) -> Tensor:
        if self._head is None:
            raise ValueError("this model is a classifier and predicts no next token")
        return self._head.product(x)

    def sample(
        self, logits: Tensor, rows: Sequence[int], settings: Mapping[str, Sequence[float]]
    ) -> list[int]:
        N, V = logits.shape
        assert logits.dtype == torch.float32
        assert logits.stride(1) == 1
        assert all(0 <= row < N for row in rows)
        choices = np.empty(len(rows), native.CHOICE)
        choices["logits"] = logits.data_ptr() + 4 * logits.stride(0) * np.array(rows)
        for name, values in settings.items():
            choices[name] = values
        tokens = np.empty(len(rows), np.int64)
        addresses = choices.ctypes.data, len(rows), V, tokens.ctypes.data
        self._library.sample(native.runtime(), *addresses)
        return tokens.tolist()


def _int32(x: Tensor | Sequence[Any]) -> Tensor:
    if isinstance(x, Tensor):
        return x.to(torch.int32).contiguous()
    return torch.from_numpy(np.array(x, np.int32))  # three times as fast as torch for a list


def _allowed(mask: Mask, H: int, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys each token may attend to, bools (H|1, N, S), and how many its row has (N,)."""
    _, row, counts = rows.unique_consecutive(return_inverse=True, return_counts=True)
    lengths = positions[counts.cumsum(0) - 1] + 1
    keys = torch.arange(int(lengths.max()))
    allowed = mask.dense(1, H, positions.long(), keys)[0]  # (H|1, N, S)
    return allowed.contiguous(), lengths[row].contiguous()


__all__ = ["PAGE", "PackedModel", "Pages"]
