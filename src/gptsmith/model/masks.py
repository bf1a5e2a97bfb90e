"""Attention masks as a small algebra, with one definition for all backends.

A mask is a function of four integer tensors, mask(b, h, q, k) -> bool: may position q of row b
attend to position k in head h? The same function object becomes a dense boolean tensor for
scaled_dot_product_attention (`Mask.dense`), a block mask for FlexAttention on CUDA
(`Mask.block_mask`) and a picture (`Mask.show`, `Mask.png`).

    causal() & sliding_window(256)    prefix(32)    causal() & ~sliding_window(8)    Mask(my_rule)

B batch, T time, H heads; Tq, Tk: queries and keys; b, h, q, k: indices along them.
"""

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gptsmith.user_code import run_file

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

VALID = "causal(), sliding_window(n), prefix(n), bidirectional(), combined by & | ~ and parentheses"

_OR, _AND, _ATOM = 0, 1, 2  # Python's precedence, for the parentheses in `Mask.expression`
_MAX_INT32 = 2**31 - 1  # FlexAttention's kernels index with int32
_LOOKAHEAD_BLOCK = 1 << 22  # mask entries evaluated at a time


class MaskProperties(NamedTuple):
    """Properties of a mask that are known without evaluating it.

    plain_causal: it is causal(). causal: no query attends to a later key. uses_b, uses_h: it
    depends on the row of the batch, or on the head. level: precedence of its outermost operator.
    """

    window: int | None = None
    plain_causal: bool = False
    causal: bool = False
    uses_b: bool = False
    uses_h: bool = False
    level: int = _ATOM


class Mask:
    """Which key each query may attend to: an elementwise rule that composes by & | ~.

    rule: function of broadcastable integer tensors (b, h, q, k) that returns a bool tensor (or a
    plain bool). It must be elementwise, because FlexAttention calls it with scalars under vmap
    and `dense` with broadcast tensors: tables may be indexed, `if` and `and` may not be used.
    ValueError for a rule that is not such a function.
    """

    def __init__(
        self,
        rule: Callable[..., Tensor | bool],
        expression: str | None = None,
        *,
        properties: MaskProperties | None = None,
    ) -> None:
        self.expression = expression or str(getattr(rule, "__name__", type(rule).__name__))
        if properties is None:  # a user's function, of which nothing is known
            self.rule = _with_checks(rule, self.expression)
            properties = _probe(self.rule, self.expression)
        else:
            self.rule = rule  # type: ignore[assignment]
        self.properties = properties
        self._measured: dict[tuple[int, int, int], int] = {}  # lookahead of (T, H, B)

    @property
    def window(self) -> int | None:
        """Keys more than window - 1 positions back are never visible; the KV cache drops them."""
        return self.properties.window

    @property
    def is_causal(self) -> bool:
        """Whether no query attends to a later key, as far as that is known without evaluating."""
        return self.properties.causal

    @property
    def shares_prefixes(self) -> bool:
        """Whether positions with equal tokens up to them have equal vectors: no query attends to a
        later key, and all rows have the same mask. As far as that is known without evaluating."""
        return self.properties.causal and not self.properties.uses_b

    @property
    def is_plain_causal(self) -> bool:
        """Whether the mask is causal() itself."""
        return self.properties.plain_causal

    @property
    def causal_window(self) -> int | None:
        """n of causal() & sliding_window(n), and 0 of causal() itself; None of all other masks."""
        if self.is_plain_causal:
            return 0
        window = f"sliding_window({self.window})"
        known = self.expression in (f"causal() & {window}", f"{window} & causal()")
        return self.window if known else None

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.rule(b, h, q, k)

    def __and__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        f, g, x, y = self.rule, other.rule, self.properties, other.properties
        window = y.window if x.window is None else min(x.window, y.window or x.window)
        properties = MaskProperties(window, causal=x.causal or y.causal, level=_AND)
        return self._combine(other, lambda b, h, q, k: f(b, h, q, k) & g(b, h, q, k), properties)

    def __or__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        f, g, x, y = self.rule, other.rule, self.properties, other.properties
        window = max(x.window, y.window) if x.window and y.window else None
        properties = MaskProperties(window, causal=x.causal and y.causal, level=_OR)
        return self._combine(other, lambda b, h, q, k: f(b, h, q, k) | g(b, h, q, k), properties)

    def _combine(self, other: "Mask", rule: Rule, properties: MaskProperties) -> "Mask":
        """The combined mask; `properties` has those in which & and | differ."""
        x, y = self.properties, other.properties
        sign = " & " if properties.level == _AND else " | "
        properties = properties._replace(
            plain_causal=x.plain_causal and y.plain_causal,
            uses_b=x.uses_b or y.uses_b,
            uses_h=x.uses_h or y.uses_h,
        )
        text = sign.join(_parenthesized(properties.level, mask) for mask in (self, other))
        return Mask(rule, text, properties=properties)

    def __invert__(self) -> "Mask":
        f = self.rule
        properties = MaskProperties(uses_b=self.properties.uses_b, uses_h=self.properties.uses_h)
        text = "~" + _parenthesized(_ATOM, self)
        return Mask(lambda b, h, q, k: ~f(b, h, q, k), text, properties=properties)

    def __repr__(self) -> str:
        return f"Mask({self.expression})"

    def dense(self, B: int, H: int, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """The mask as a bool tensor for scaled_dot_product_attention, True: may attend.

        q_positions (Tq,) or (B, Tq), k_positions (Tk,) or (B, Tk): int; negative positions are
        empty: they attend to nothing and nothing attends to them.
        Returns (B or 1, H or 1, Tq, Tk), 1 where the mask does not depend on the row or head.
        """
        q = q_positions.view(-1, 1, q_positions.size(-1), 1)  # (B or 1, 1, Tq, 1)
        k = k_positions.view(-1, 1, 1, k_positions.size(-1))  # (B or 1, 1, 1, Tk)
        b = torch.arange(B, device=q.device).view(B, 1, 1, 1)
        h = torch.arange(H, device=q.device).view(1, H, 1, 1)
        visible = self.rule(b, h, q.clamp(min=0), k.clamp(min=0))
        return visible & (q >= 0) & (k >= 0)  # (B or 1, H or 1, Tq, Tk)

    def lookahead(self, T: int, H: int, B: int = 1) -> int:
        """1 + the last of T positions that an earlier position attends to; 0 for causal masks.

        Keys once cached are never computed again, so a KV cache is exact if, and only if, the
        prompt is prefilled in one pass at least this long. Measured over all T x T pairs of every
        head and row, so it holds for user-defined rules too.
        """
        if self.is_causal or T <= 1:
            return 0
        if (T, H, B) in self._measured:
            return self._measured[T, H, B]
        keys = torch.arange(T)
        rows = max(1, _LOOKAHEAD_BLOCK // (T * (H if self.properties.uses_h else 1)))
        last = 0
        for start in range(0, T, rows):
            queries = keys[start : start + rows]
            ahead = self.dense(B, H, queries, keys) & (keys > queries[:, None])  # (B, H, Tq, Tk)
            seen = ahead.flatten(0, -2).any(0).nonzero()
            if len(seen):
                last = max(last, int(seen[-1]) + 1)
        self._measured[T, H, B] = last
        return last

    def block_mask(self, B: int, H: int, T: int, device: torch.device | str) -> "BlockMask":
        """The mask as FlexAttention's BlockMask, (T, T) per row and head where it depends on them.

        Building it costs about T x T evaluations: reuse it while B, H and T stay the same.
        """
        from torch.nn.attention.flex_attention import create_block_mask

        rows, heads = B if self.properties.uses_b else None, H if self.properties.uses_h else None
        # dynamo cannot trace the question, and a graph does not cache the result
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return create_block_mask(self.rule, rows, heads, T, T, device=device)
        return create_block_mask(self.rule, rows, heads, T, T, device=device)

    def show(self, T: int = 32, H: int = 1) -> str:
        """The mask as text: a row per query, a column per key; a table per head if they differ.

        For the first T positions and, of a mask over documents, the first row of the batch.
        """
        picture = self._picture(T, H)
        heads = ["\n".join("".join(" ■" if x else " ·" for x in row) for row in p) for p in picture]
        if len(heads) == 1:
            return f"{self.expression}\n{heads[0]}"
        return "\n".join(f"{self.expression} head {i}\n{text}" for i, text in enumerate(heads))

    def png(self, path: Path | str, T: int = 32, H: int = 1) -> None:
        """Draw the mask into a PNG file: queries downwards, keys to the right, a panel per head."""
        from matplotlib.figure import Figure

        from gptsmith import files

        picture = self._picture(T, H)
        figure = Figure(figsize=(4 * len(picture), 4.4), layout="constrained")
        panels = figure.subplots(1, len(picture), squeeze=False)[0]
        for i, (panel, head) in enumerate(zip(panels, picture, strict=True)):
            panel.imshow(head, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            panel.set(xlabel="key", ylabel="query", title=f"head {i}" if len(picture) > 1 else None)
        # a file name may have characters that the font lacks, or dollars, which mean a formula
        name = ascii(self.expression)[1:-1]
        figure.suptitle(name.replace("$", r"\$"))
        files.write_figure(path, figure, format="png")

    def _picture(self, T: int, H: int) -> list[list[list[bool]]]:
        positions = torch.arange(T)
        return self.dense(1, H, positions, positions)[0].tolist()


def causal() -> Mask:
    """Every position attends to itself and to all earlier ones."""
    properties = MaskProperties(plain_causal=True, causal=True)
    return Mask(lambda b, h, q, k: q >= k, "causal()", properties=properties)


def sliding_window(n: int) -> Mask:
    """The n - 1 previous positions, itself, and all later ones: intersect it with causal()."""
    n = _check_integer("sliding_window", n, 1)
    properties = MaskProperties(window=n)
    return Mask(lambda b, h, q, k: q - k < n, f"sliding_window({n})", properties=properties)


def prefix(n: int) -> Mask:
    """Every position attends to the first n; the rest is causal (prefix LM, as in T5)."""
    n = _check_integer("prefix", n, 0)
    return Mask(lambda b, h, q, k: (k < n) | (q >= k), f"prefix({n})", properties=MaskProperties())


def bidirectional() -> Mask:
    """Every position attends to every position."""
    properties = MaskProperties()
    return Mask(lambda b, h, q, k: (q >= 0) & (k >= 0), "bidirectional()", properties=properties)


def documents(ids: Tensor) -> Mask:
    """Positions attend to positions of the same document only.

    ids: (B, T) integers, the same for all positions of a document.
    """
    if ids.dim() != 2 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise ValueError(
            f"documents(ids): got {ids.dtype} of shape {tuple(ids.shape)};"
            " give integers of shape (B, T)"
        )
    properties = MaskProperties(uses_b=True)
    return Mask(lambda b, h, q, k: ids[b, q] == ids[b, k], "documents(ids)", properties=properties)


def dense_mask(tensor: Tensor, B: int, H: int, T: int) -> Tensor:
    """Check a mask given as a tensor and return it as bool, (B or 1, H or 1, T, T).

    tensor: (T, T), (B, T, T) or (B, H, T, T), bool or the numbers 0 (blocked) and 1 of any dtype.
    Other values raise ValueError, which catches additive float masks.
    """
    if tensor.dim() == 2:
        tensor = tensor[None]
    if tensor.dim() == 3:
        tensor = tensor[:, None]
    try:
        fits = tensor.shape[-2:] == (T, T) and tensor.expand(B, H, T, T).dim() == 4
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask of shape {tuple(tensor.shape)} for {B} rows of {T} tokens and {H} heads:"
            f" give {(T, T)}, {(B, T, T)} or {(B, H, T, T)}"
        )
    if tensor.dtype != torch.bool:
        if not ((tensor == 0) | (tensor == 1)).all():
            raise ValueError(
                f"mask of {tensor.dtype} holds values other than 0 and 1: give booleans"
                " (True: may attend); additive masks are not supported"
            )
        tensor = tensor == 1
    return tensor


def parse(expression: str, folder: Path | None = None, trust_code: bool = False) -> Mask:
    """The mask that a configuration names: an expression, or `file.py:function`.

    A file is looked up in `folder` (default: the working directory) and imported only with
    trust_code.
    ValueError names the expression, the invalid part and the valid forms.
    """
    text = expression.strip()
    if found := re.fullmatch(r"([^\n]+\.py):(\w+)", text):
        return _from_file(text, Path(folder or ".") / found[1], found[2], trust_code)
    if len(text) > 400:
        raise ValueError(f"mask {text[:40]!r}... has {len(text)} characters; at most 400 are read")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise ValueError(f"mask {text!r}: {reason}; valid are {VALID}") from error
    return _build(tree.body, text)


def _build(node: ast.AST, text: str) -> Mask:
    """The mask of a syntax tree, of which only the forms in VALID are allowed."""
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return _build(left, text) & _build(right, text)
        case ast.BinOp(left, ast.BitOr(), right):
            return _build(left, text) | _build(right, text)
        case ast.UnaryOp(ast.Invert(), operand):
            return ~_build(operand, text)
        case ast.Call(ast.Name("causal"), [], []):
            return causal()
        case ast.Call(ast.Name("bidirectional"), [], []):
            return bidirectional()
        case ast.Call(ast.Name("sliding_window" | "prefix" as name), [ast.Constant(n)], []):
            build = sliding_window if name == "sliding_window" else prefix
            try:
                return build(n)  # type: ignore[arg-type]  # they check it
            except ValueError as error:
                raise ValueError(f"mask {text!r}: {error}") from error
    part = ast.get_source_segment(text, node) or text
    raise ValueError(f"mask {text!r}: cannot read {part!r}; valid are {VALID}")


def _from_file(text: str, path: Path, name: str, trust_code: bool) -> Mask:
    module = run_file(path, f"mask {text!r}", trust_code=trust_code)
    found = getattr(module, name, None)
    if isinstance(found, Mask):
        return Mask(found.rule, text, properties=found.properties)
    if not callable(found) or len(inspect.signature(found).parameters) != 4:
        raise ValueError(f"mask {text!r}: {path} has no function {name}(b, h, q, k)")
    return Mask(found, text)


def _with_checks(rule: Callable[..., Tensor | bool], expression: str) -> Rule:
    """A user's rule that is checked at each call; errors contain the expression."""

    def checked(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        try:
            visible = rule(b, h, q, k)
        except (RuntimeError, TypeError, IndexError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"mask {expression}: not an elementwise function of index tensors (b, h, q, k)"
                f" here ({reason}); combine comparisons by & | ~ instead of if, and, or, not,"
                " and index only tables that are large enough and moved to q.device"
            ) from error
        if isinstance(visible, bool):
            return q.new_full((), visible, dtype=torch.bool)
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
            got = visible.dtype if isinstance(visible, Tensor) else type(visible).__name__
            raise ValueError(f"mask {expression}: returns {got}; return bool, such as q >= k")
        return visible

    return checked


def _probe(rule: Rule, expression: str) -> MaskProperties:
    """Call the rule once with all-zero indices of size two.

    They are valid for a table of any size, an `if` on them fails, and the shape of the result
    shows whether the rule depends on b and h.
    """
    zeros = torch.zeros(2, dtype=torch.long)
    b, h, q, k = (zeros.view([2 if i == j else 1 for j in range(4)]) for i in range(4))
    shape = rule(b, h, q, k).shape
    if len(shape) > 4 or any(size not in (1, 2) for size in shape):
        raise ValueError(
            f"mask {expression}: returns shape {tuple(shape)} for indices that broadcast to"
            " (2, 2, 2, 2); return one bool for each element"
        )
    by_b, by_h = ([1] * (4 - len(shape)) + list(shape))[:2]
    return MaskProperties(uses_b=by_b == 2, uses_h=by_h == 2)


def _check_integer(name: str, n: object, least: int) -> int:
    if not isinstance(n, int) or isinstance(n, bool) or not least <= n <= _MAX_INT32:
        raise ValueError(f"{name}({n!r}) needs a whole number from {least} to {_MAX_INT32}")
    return n


def _parenthesized(level: int, mask: Mask) -> str:
    return f"({mask.expression})" if mask.properties.level < level else mask.expression
