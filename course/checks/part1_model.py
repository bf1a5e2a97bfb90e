"""Checks of part 1: the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from course.checks import stock
from course.checks.compare import (
    causal,
    changes_from,
    holds,
    same,
    same_function,
    same_parameters,
)
from course.checks.exercise import Exercise
from course.reference import part1 as reference
from torch import Tensor

B, T, C, H, V = 2, 7, 16, 2, 50
D = C // H
EQUAL = "equality: outputs and gradients are those of gptsmith's component with your weights"
SIZES = dict(vocab_size=V, context_length=T, n_layer=2, n_head=H, n_embd=C)


def vectors(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def token_ids(*shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(2))


# --- 1.1 to 1.4: embedding, attention ------------------------------------------------------------


def embedding_setup(code: Any) -> Iterator[str]:
    yield "parameters: one table of V vectors, none for positions"
    same_parameters(code.GPTEmbedding(V, C), reference.GPTEmbedding(V, C))


def embedding_forward(code: Any) -> Iterator[str]:
    yield "shape: (B, T, C)"
    part, ids = code.GPTEmbedding(V, C), token_ids(B, T)
    holds(part(ids).shape == (B, T, C), f"{tuple(part(ids).shape)} for ids {(B, T)}")
    yield "positions: a token has the same vector at every position"
    repeated = part(torch.full((1, T), 3))
    same(repeated, repeated[:, :1].expand(-1, T, -1), "the embedding of a repeated token")
    yield "table: the vector of id i is row i"
    same(part(torch.arange(V)[None])[0], part.token.weight, "the embedding of ids 0 .. V - 1")
    yield EQUAL
    same_function(part, reference.GPTEmbedding(V, C), torch.cat([ids, torch.zeros_like(ids)]))


def attention_setup(code: Any) -> Iterator[str]:
    yield "parameters: four square matrices without biases"
    same_parameters(code.MultiHeadAttention(C, H), reference.MultiHeadAttention(C, H))
    yield "sizes: ValueError if n_embd is not a multiple of n_head"
    try:
        code.MultiHeadAttention(C, 3)
    except ValueError:
        return
    holds(False, f"n_embd {C} with n_head 3 is accepted: heads of {C / 3:.2f} channels")


def rotation(code: Any) -> Iterator[str]:
    at, x = torch.arange(T), vectors(B, H, T, D)
    yield "rotation, shape: that of x"
    y = code.rotate(x, at)
    holds(y.shape == x.shape, f"rotate gives {tuple(y.shape)} for x {tuple(x.shape)}")
    yield "rotation, length: a rotated vector is as long as before"
    same(y.norm(dim=-1), x.norm(dim=-1), "the length of rotate(x)")
    yield "rotation, angle: nothing changes at position 0, everything at position 1"
    same(y[:, :, 0], x[:, :, 0], "rotate(x) at position 0")
    first = y[0, 0, 1] - x[0, 0, 1]
    holds(first.abs().min() > 1e-6, f"channel {int(first.abs().argmin())} is not rotated")
    yield "rotation, distance: a product of rotated vectors depends on their distance alone"
    q, k = vectors(2, 1, 1, 1, D)
    products = [
        (code.rotate(q, torch.tensor([m + 3])) * code.rotate(k, torch.tensor([m]))).sum()
        for m in (0, 1, 5, 40)
    ]
    same(torch.stack(products), products[0].expand(4), "query at m + 3 times key at m", 1e-4)
    yield "rotation, equality: angles and pairs of channels are those of gptsmith"
    same(y, reference.rotate(x, at), "rotate(x)")


def attention_forward(code: Any) -> Iterator[str]:
    yield from rotation(code)
    part, x = code.MultiHeadAttention(C, H), vectors(B, T, C)
    yield "shape: (B, T, C)"
    holds(part(x).shape == x.shape, f"{tuple(part(x).shape)} for x {tuple(x.shape)}")
    plain = code.MultiHeadAttention(C, H)  # its heads stay apart in the output
    with torch.no_grad():
        plain.out.weight.copy_(torch.eye(C))
    yield "heads: head h reads its own D channels of queries, keys and values alone"
    projections = {"query": plain.query, "key": plain.key, "value": plain.value}
    of_head_0 = plain(x)[..., :D].square().sum()
    found = torch.autograd.grad(of_head_0, [p.weight for p in projections.values()])
    for name, gradient in zip(projections, found, strict=True):
        rows = (gradient.abs().amax(dim=1) > 1e-7).nonzero().flatten().tolist()
        foreign = [row for row in rows if row >= D]
        holds(
            not foreign, f"head 0 reads row {foreign and foreign[0]} of {name}, which is head 1's"
        )
    yield "causality: no position sees a later one"
    later = x.clone()
    later[:, 5] += 1
    causal(part(x), part(later), 5)
    yield "reach: every position sees itself and all earlier ones"
    nothing = part(x).isnan().any(dim=-1)[0].nonzero().flatten().tolist()
    holds(not nothing, f"position {nothing[:1]} is NaN: a softmax over no score")
    given = x.clone().requires_grad_()
    for t in range(T):
        [seen] = torch.autograd.grad(part(given)[:, t].square().sum(), [given])
        blind = [s for s in range(t + 1) if seen[:, s].abs().max() < 1e-7]
        holds(not blind, f"the output at position {t} does not depend on position {blind[:1]}")
    yield "weights: those of a query sum to 1, so position 0 gets out(value(x)) of itself"
    same(part(x)[:, 0], part.out(part.value(x[:, 0])), "the output at position 0")
    yield "values: they are not rotated, so equal inputs give equal outputs"
    y = part(x[:, :1].expand(-1, T, -1))
    same(y, y[:, :1].expand(-1, T, -1), "the output for equal inputs")
    yield "order: queries and keys are rotated, so the order of earlier positions matters"
    y, swapped = part(x)[:, -1], part(x[:, [1, 0, *range(2, T)]])[:, -1]
    holds((y - swapped).abs().max() > 1e-5, "the last output is the same after a swap of 0 and 1")
    yield "scores: products of rotated queries and keys, divided by the square root of D"
    same(
        measured_scores(plain, x[:, :2]),
        expected_scores(plain, x[:, :2]),
        "score 0 - score 1",
        1e-3,
    )
    yield EQUAL
    same_function(part, reference.MultiHeadAttention(C, H), x)


def heads_of(x: Tensor) -> Tensor:  # (B, T, C) -> (B, H, T, D)
    return x.unflatten(-1, (H, D)).transpose(1, 2)


def measured_scores(part: Any, x: Tensor) -> Tensor:
    """The difference of the two scores of position 1, (B, H), from its output, which is a weighted
    mean of two values if `out` does nothing."""
    v0, v1 = heads_of(part.value(x)).unbind(2)
    apart = v1 - v0
    share = ((heads_of(part(x))[:, :, 1] - v0) * apart).sum(-1) / apart.square().sum(-1)
    return ((1 - share) / share).log()


def expected_scores(part: Any, x: Tensor) -> Tensor:
    at = torch.arange(2)
    q, k = (reference.rotate(heads_of(linear(x)), at) for linear in (part.query, part.key))
    scores = (q[:, :, 1:] * k).sum(-1) / math.sqrt(D)  # (B, H, 2)
    return scores[..., 0] - scores[..., 1]


# --- 1.5 to 1.9: feed-forward layers, block ------------------------------------------------------


def feed_forward_setup(code: Any) -> Iterator[str]:
    yield "parameters: up (2F, C) and down (C, F) without biases, F = 4C"
    same_parameters(code.FeedForward(C), reference.FeedForward(C))
    yield "expansion: the argument sets F"
    same_parameters(code.FeedForward(C, expansion=3), reference.FeedForward(C, expansion=3))


def feed_forward_forward(code: Any) -> Iterator[str]:
    glu, x = code.SwiGLU(), vectors(B, T, 2 * C)
    yield "SwiGLU, shape: half of the channels"
    holds(glu(x).shape == (B, T, C), f"{tuple(glu(x).shape)} for {(B, T, 2 * C)}")
    main, gate = x.chunk(2, dim=-1)
    yield "SwiGLU, main: the first half passes as it is, so twice the main gives twice the output"
    same(glu(torch.cat([2 * main, gate], -1)), 2 * glu(x), "SwiGLU of (2 main, gate)")
    yield "SwiGLU, gate: swish(x) = x * sigmoid(x), of the second half"
    one = torch.ones_like(gate)
    same(glu(torch.cat([one, gate], -1)), gate * gate.sigmoid(), "SwiGLU of (1, gate)")
    part, x = code.FeedForward(C), vectors(B, T, C)
    yield "shape: (B, T, C)"
    holds(part(x).shape == x.shape, f"{tuple(part(x).shape)} for x {tuple(x.shape)}")
    yield "positions: each is computed by itself"
    other = x.clone()
    other[:, 3] += 1
    changed = changes_from(part(x), part(other))
    holds(changed == [3], f"a change of position 3 changes positions {changed}")
    yield EQUAL
    same_function(part, reference.FeedForward(C), x)


def block_setup(code: Any) -> Iterator[str]:
    yield "parameters: two norms, attention, feed-forward layers"
    part = code.TransformerBlock(C, H)
    same_parameters(part, reference.TransformerBlock(C, H))
    yield "norms: RMSNorm with eps 1e-5, each with its own weight"
    for name in ("attention_norm", "feed_forward_norm"):
        x = vectors(B, C) * 1e-3  # where eps matters
        rms = F.rms_norm(x, (C,), eps=1e-5)
        same(getattr(part, name)(x), rms, f"{name} of small numbers")
    shared = part.attention_norm.weight is part.feed_forward_norm.weight
    holds(not shared, "both norms are one object")


def block_dropout(code: Any) -> Iterator[str]:
    ones = torch.ones(100, 100)
    part = code.TransformerBlock(C, H, dropout=0.25).train()
    yield "training: a share of the numbers is 0, the others are scaled so that the mean stays"
    y = part.maybe_dropout(ones)
    share = float((y == 0).float().mean())
    holds(0.2 < share < 0.3, f"{share:.0%} of the numbers are 0 with dropout 0.25")
    same(y[y != 0], torch.full_like(y[y != 0], 1 / 0.75), "a number that is kept, of 1")
    yield "evaluation: nothing changes"
    same(part.eval().maybe_dropout(ones), ones, "x in evaluation mode")
    yield "zero: with dropout 0 nothing changes in training either"
    same(code.TransformerBlock(C, H).train().maybe_dropout(ones), ones, "x with dropout 0")


def block_forward(code: Any) -> Iterator[str]:
    x = vectors(B, T, C)
    part = code.TransformerBlock(C, H)
    yield "shape: (B, T, C)"
    holds(part(x).shape == x.shape, f"{tuple(part(x).shape)} for x {tuple(x.shape)}")
    yield "residual: if both branches give 0, the block returns x"
    same(silenced(code, "attention", "feed_forward")(x), x, "the output")
    yield "attention: x + attention(norm(x)), if the feed-forward layers give 0"
    one = silenced(code, "feed_forward")
    same(one(x), x + one.attention(one.attention_norm(x)), "the output")
    yield "feed-forward: x + feed_forward(norm(x)), if attention gives 0"
    one = silenced(code, "attention")
    same(one(x), x + one.feed_forward(one.feed_forward_norm(x)), "the output")
    yield "dropout: it acts on what is added, so with dropout 1 the block returns x"
    same(code.TransformerBlock(C, H, dropout=1.0).train()(x), x, "the output in training mode")
    yield EQUAL
    with torch.no_grad():  # different norms
        part.attention_norm.weight.copy_(1 + 0.5 * vectors(C))
        part.feed_forward_norm.weight.copy_(1 - 0.5 * vectors(C))
    same_function(part, reference.TransformerBlock(C, H), x)


@torch.no_grad()
def silenced(code: Any, *branches: str) -> Any:
    """A block in which these branches give zeros."""
    part = code.TransformerBlock(C, H)
    last = {"attention": part.attention.out, "feed_forward": part.feed_forward.down}
    for name in branches:
        last[name].weight.zero_()
    return part


# --- 1.10, 1.11: model ---------------------------------------------------------------------------


def model_setup(code: Any) -> Iterator[str]:
    yield "parameters: those of embedding, blocks, final norm and head, all registered"
    model = code.GPTModel(**SIZES)
    same_parameters(model, reference.GPTModel(**SIZES))
    yield "blocks: each has weights of its own"
    first, second = (block.attention.query.weight for block in model.blocks)
    holds(first is not second, "blocks 0 and 1 are one object")


def model_forward(code: Any) -> Iterator[str]:
    model, ids = code.GPTModel(**SIZES), token_ids(B, T)
    yield "shape: (B, T, V)"
    logits = model(ids)
    holds(logits.shape == (B, T, V), f"{tuple(logits.shape)} for ids {(B, T)}")
    yield "logits: numbers before the softmax, not probabilities or their logarithms"
    for name, sums in (("them", logits.sum(-1)), ("their exponentials", logits.exp().sum(-1))):
        holds((sums - 1).abs().max() > 1e-3, f"{name} sum to 1 at every position")
    yield "causality: no position sees a later one"
    later = ids.clone()
    later[:, 5] = (later[:, 5] + 1) % V
    causal(logits, model(later), 5)
    yield "use: every parameter has an effect"
    unused = [
        name
        for name, gradient in zip(
            dict(model.named_parameters()),
            torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True),
            strict=True,
        )
        if gradient is None or not gradient.any()
    ]
    holds(not unused, f"{unused and unused[0]} has none")
    yield "untrained: the loss is about ln V, that of guessing"
    loss = F.cross_entropy(logits.flatten(0, 1), token_ids(B * T)).item()
    holds(abs(loss - math.log(V)) < 0.75, f"{loss:.2f} nats, ln V is {math.log(V):.2f}")
    yield "length: ValueError for more tokens than context_length"
    try:
        model(token_ids(B, T + 1))
    except ValueError:
        pass
    else:
        holds(False, f"{T + 1} tokens are accepted with context_length {T}")
    yield EQUAL
    same_function(model, reference.GPTModel(**SIZES), ids)
    if stock.transformers_is_installed():
        yield "transformers: LlamaForCausalLM with your weights gives your logits"
        same(model(ids), stock.llama(model, SIZES)(ids).logits, "logits", 1e-4)


EXERCISES = {
    "1.1": Exercise("GPTEmbedding, set-up", ("GPTEmbedding",), embedding_setup),
    "1.2": Exercise("GPTEmbedding, forward", ("GPTEmbedding",), embedding_forward),
    "1.3": Exercise("MultiHeadAttention, set-up", ("MultiHeadAttention",), attention_setup),
    "1.4": Exercise(
        "MultiHeadAttention, forward", ("MultiHeadAttention", "rotate"), attention_forward
    ),
    "1.5": Exercise("FeedForward, set-up", ("FeedForward", "SwiGLU"), feed_forward_setup),
    "1.6": Exercise("FeedForward, forward", ("FeedForward", "SwiGLU"), feed_forward_forward),
    "1.7": Exercise("TransformerBlock, set-up", ("TransformerBlock",), block_setup),
    "1.8": Exercise("TransformerBlock, dropout", ("TransformerBlock",), block_dropout),
    "1.9": Exercise("TransformerBlock, forward", ("TransformerBlock",), block_forward),
    "1.10": Exercise("GPTModel, set-up", ("GPTModel",), model_setup),
    "1.11": Exercise("GPTModel, forward", ("GPTModel",), model_forward),
}
