"""Scaled dot-product attention: three backends, and a blocked CPU version for bfloat16 training.

B batch, H query heads, K key/value heads, T queries, S keys, D head size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gptsmith import compilers
from gptsmith.model import fused
from gptsmith.model.masks import Mask


class CausalMask(NamedTuple):
    """Booleans (B|1, H|1, T, T) of a mask under which no query attends to a later key."""

    allowed: Tensor


Bias = Tensor | CausalMask | BlockMask | None
"""A mask in the form that `attention` takes."""


def dense_bias(
    mask: Mask, B: int, H: int, T: int, device: torch.device
) -> Tensor | CausalMask | None:
    """A mask over T tokens in the form that `attention` takes."""
    if mask.is_plain_causal:
        return None
    at = torch.arange(T, device=device)
    dense = mask.dense(B, H, at, at)  # (B|1, H|1, T, T)
    return CausalMask(dense) if mask.is_causal else dense


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Bias,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of q (B, H, T, D) over k and v (B, K, S, D), K dividing H. Returns (B, H, T, D).

    mask: None for causal (T == S; a single query attends to all keys), booleans broadcastable to
    (B, H, T, S) with True = may attend (CausalMask: known to be causal), or a FlexAttention
    BlockMask. A query that may attend to no key yields zeros.
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        fuse = q.device.type == "cuda" and not torch.compiler.is_compiling()
        flex: Any = _fused_flex() if fuse else flex_attention  # which, eager, computes all scores
        out = flex(q, k, v, block_mask=mask, enable_gqa=grouped)
        assert isinstance(out, Tensor)
        return out
    slow = q.device.type == "cpu" and (grouped or q.dtype == torch.bfloat16)
    blocks = not dropout and _blocked_is_faster(q, isinstance(mask, CausalMask))
    allowed = mask.allowed if isinstance(mask, CausalMask) else mask  # for the other kernels
    if slow and q.shape[2] == 1 and not dropout:
        return decode_attention(q, k, v, allowed)
    # The fused kernels of the CPU, of fp32 and of masks need equal heads.
    if grouped and (q.device.type != "cuda" or allowed is not None or q.dtype == torch.float32):
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        grouped = False
    if blocks and (mask is None or isinstance(mask, CausalMask)):
        if allowed is None and fused.applies(q):
            y: Tensor = fused.CausalAttention.apply(q, k, v)
            return y
        return blocked_causal(q, k, v, allowed)
    if allowed is None:
        is_causal = False if q.shape[2] == 1 else True  # noqa: SIM211 - a bool, not a SymBool
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, dropout_p=dropout, enable_gqa=grouped
        )
    # Softmax over no key is 0/0: let such rows attend to all keys and zero their output, so that
    # neither the output nor its gradient is ever NaN.
    sees = allowed.any(dim=-1, keepdim=True)  # (B, H, T, 1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed | ~sees, dropout_p=dropout, enable_gqa=grouped
    )
    return out * sees.to(out.dtype)


def is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def has_flex(device: torch.device) -> bool:
    """Whether FlexAttention has kernels outside a compiled graph: Triton compiles them."""
    if not is_cuda(device) or compilers.missing("cuda"):
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)


def any_length(device: torch.device) -> AbstractContextManager[None]:
    """In inference on CUDA, without cuDNN's kernels, which are planned anew for each number of
    keys: in decoding with bf16 that takes 45 ms a token, ten times the rest (H200, docs/log.md)."""
    if not is_cuda(device) or torch.is_grad_enabled():
        return nullcontext()
    return sdpa_kernel([
        SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    ])  # fmt: skip


@cache
def _fused_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def _blocked_is_faster(q: Tensor, masked: bool) -> bool:
    """Measured on two Zen 4 cores, forward + backward, against the fused CPU kernel: bf16 T=64
    2.5x eager, T=256 1.4x eager and 2.2x compiled, T=1024 0.7x eager and 1.5x compiled; fp32
    1.0x. The fused kernel converts bf16 to fp32 inside; matrix products do not. With a dense mask
    it skips no keys and is slower still: T=512 compiled takes 74 ms instead of 40."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not torch.is_grad_enabled():
        return False
    return q.shape[2] <= (1024 if masked or torch.compiler.is_compiling() else 256)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query (B, H, 1, D), as in decoding, by matrix products over shared keys.

    k and v (B, K, S, D). On two Zen 4 cores, 8 rows and 512 keys: 1.7 times as fast as the fused
    kernel in bf16, 4.5 times with three query heads per key head (2.3 times in fp32).
    """
    B, H, _, D = q.shape
    K = k.shape[1]
    scores = (q.reshape(B, K, H // K, D) @ k.transpose(-1, -2)) * D**-0.5  # (B, K, H/K, S)
    scores = scores.float() if q.dtype == torch.bfloat16 else scores
    if mask is None:
        return (scores.softmax(dim=-1).to(q.dtype) @ v).view(B, H, 1, D)
    if mask.shape[1] > 1:
        mask = mask.reshape(-1, K, H // K, mask.shape[-1])
    lowest = torch.finfo(scores.dtype).min  # finite: without keys, no NaN
    weights = scores.masked_fill(~mask, lowest).softmax(dim=-1) * mask
    return (weights.to(q.dtype) @ v).view(B, H, 1, D)


def blocked_causal(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Causal attention by plain products, one block of queries at a time, without later keys.

    q, k, v (B, H, T, D); allowed (B|1, H|1, T, T): a causal mask, instead of causal().
    Saves the probabilities for the backward pass: about 4*B*H*T*T bytes.
    """
    T, D = q.shape[2:]
    step = max(64, -(-T // 8))
    tri = torch.ones(step, step, dtype=torch.bool, device=q.device).tril()
    lowest = torch.finfo(torch.float32).min  # finite: without keys, no NaN
    out = []
    for start in range(0, T, step):
        end = min(start + step, T)
        scores = (q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2)).float() * D**-0.5
        if allowed is None:
            here = F.pad(tri[: end - start, : end - start], (start, 0), value=True)
        else:
            here = allowed[:, :, start:end, :end]
        weights = scores.masked_fill(~here, lowest).softmax(dim=-1)  # (B, H, block, end)
        if allowed is not None:
            weights = weights * here.any(dim=-1, keepdim=True)
        out.append(weights.to(q.dtype) @ v[:, :, :end])
    return torch.cat(out, dim=2)
