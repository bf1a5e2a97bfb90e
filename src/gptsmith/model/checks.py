"""Checks of the arguments of network modules; errors state the value and what to give instead.

Shapes and dtypes are always checked, values on the CPU only: reading them from another device would
synchronize with it in every step. Compiled code does not check values.

B batch, T time, C channels, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gptsmith.model.attention import CausalMask
from gptsmith.model.config import ModelConfig
from gptsmith.model.masks import Mask


def check_config(config: ModelConfig) -> None:
    """ValueError unless it is a ModelConfig."""
    if not isinstance(config, ModelConfig):
        remedy = (
            f"ModelConfig.preset({config!r})" if isinstance(config, str) else "ModelConfig(...)"
        )
        raise ValueError(f"config is {_short(config)}: give {remedy}")


def check_ids(ids: Tensor, V: int | None = None) -> None:
    """ValueError unless ids are integers (B, T), and below V if it is given."""
    if not isinstance(ids, Tensor):
        raise ValueError(f"ids are {_short(ids)}: give a tensor (B, T), torch.tensor([[...]])")
    what = f"ids are {ids.dtype} of shape {tuple(ids.shape)}"
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{what}: give token ids (B, T) as int64")
    if ids.dim() != 2:
        remedy = "ids[None] is a batch of one text" if ids.dim() == 1 else "a row for each text"
        raise ValueError(f"{what}: give (B, T), {remedy}")
    if V is not None and (bad := _outside(ids, V)):
        raise ValueError(
            f"id {bad[0]} is outside the vocabulary 0..{V - 1}: encode the text with the model's "
            "own tokenizer, or make the model with its vocab_size"
        )


def check_length(T: int, limit: int) -> None:
    """ValueError for more tokens than the context has positions."""
    if T > limit:
        raise ValueError(
            f"sequence of {T} tokens is longer than context_length {limit}: "
            "cut the input or take a model with a longer context"
        )


def check_vectors(x: Tensor, C: int) -> None:
    """ValueError unless x is (B, T, C) of a floating-point type."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x is {_short(x)}: give a tensor (B, T, {C})")
    if x.dim() != 3 or x.shape[2] != C or not x.is_floating_point():
        remedy = "" if x.is_floating_point() else ", which TokenEmbedding(config) makes of ids"
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}: give vectors (B, T, {C}){remedy}"
        )


def check_positions(positions: Tensor, B: int, T: int, limit: int) -> None:
    """ValueError unless positions are integers below limit, (T,) or (B, T)."""
    if tuple(positions.shape) not in ((T,), (1, T), (B, T)) or positions.is_floating_point():
        raise ValueError(
            f"positions are {positions.dtype} of shape {tuple(positions.shape)} for {B} rows of "
            f"{T} tokens: give integers {(T,)} or {(B, T)}"
        )
    if bad := _outside(positions, limit):
        raise ValueError(
            f"position {bad[0]} is outside context_length {limit}: give 0 to {limit - 1} "
            "(-1 marks padding for a cache only)"
        )


def check_documents(documents: Tensor, B: int, T: int) -> None:
    """ValueError unless documents are integers (B, T)."""
    shape, dtype = tuple(documents.shape), documents.dtype
    if shape != (B, T) or dtype.is_floating_point or dtype == torch.bool:
        raise ValueError(
            f"documents are {dtype} of shape {shape} for {B} rows of {T} tokens: give integers "
            f"{(B, T)}, equal for tokens of one document"
        )


def check_same_as(same_as: Tensor, B: int, T: int, mask: object, *others: object) -> None:
    """ValueError unless same_as has numbers of positions, or -1, as int64 (B, T), and there is no
    dense mask and no other argument beside it."""
    if isinstance(mask, Tensor) or any(x is not None for x in others):
        raise ValueError(
            "same_as goes with a Mask alone, without positions, documents, a cache or a dense mask"
        )
    shape, dtype = tuple(same_as.shape), same_as.dtype
    if shape != (B, T) or dtype != torch.int64:
        raise ValueError(
            f"same_as is {dtype} of shape {shape} for {B} rows of {T} tokens: give int64 {(B, T)}, "
            "for each position the number b * T + t of the one whose vector it has, or -1"
        )
    if bad := _outside(same_as + 1, B * T + 1):
        raise ValueError(f"same_as has {bad[0] - 1}: give 0 to {B * T - 1}, or -1 for padding")


def check_mask(mask: object) -> None:
    """ValueError unless it is a mask, a tensor, or None for the one of the config."""
    if mask is None or isinstance(mask, (Mask, Tensor, CausalMask, BlockMask)):
        return
    remedy = "a Mask or a tensor (T, T) of booleans"
    if isinstance(mask, str):
        remedy = f"masks.parse({mask!r})"
    elif callable(mask):
        remedy = "masks.Mask(it)"
    raise ValueError(f"mask is {_short(mask)}: give {remedy}")


def _outside(numbers: Tensor, limit: int) -> tuple[int, ...]:
    """An example of a number outside 0..limit - 1, or (); numbers on other devices are not read."""
    if torch.compiler.is_compiling() or numbers.device.type != "cpu" or not numbers.numel():
        return ()
    if torch._C._functorch.is_functorch_wrapped_tensor(numbers):  # vmap cannot read values
        return ()
    low, high = map(int, numbers.aminmax())
    return (low,) if low < 0 else (high,) if high >= limit else ()


def _short(value: object) -> str:
    shown = " ".join(repr(value).split())
    kind = type(value).__name__
    return f"{kind} {shown if len(shown) <= 40 else shown[:39] + '…'}"
