"""What `prune_tokens` and `prune_tokens_varlen` share: the arithmetic of scores and the order they select by."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...triton_kernels.prune_tokens.records import ScoreOptions
from ..core.checks import check_choice, check_integer, check_number

Scoring = Literal["dot", "cosine"]
Reduce = Literal["max", "mean", "logsumexp"]
SCORINGS = ("dot", "cosine")
REDUCES = ("max", "mean", "logsumexp")


def check_scoring(op: str, query_count: int, scoring: str, reduce: str, scale: float | None) -> float:
    """Check how tokens are to be scored, and return the scale, 1 for None.

    Raises:
        TypeError, ValueError: no queries, an unknown scoring or reduce, or a scale that float32 does not hold.
    """
    check_choice(op, "scoring", scoring, SCORINGS)
    check_choice(op, "reduce", reduce, REDUCES)
    check_integer(op, "the number of queries", query_count, 1)
    return 1.0 if scale is None else check_number(op, "scale", scale)


def score_dtype(tokens: Tensor, queries: Tensor) -> torch.dtype:
    """Dtype of the scores: float32, or float64 where an input is float64."""
    return torch.float64 if torch.float64 in (tokens.dtype, queries.dtype) else torch.float32


def fold_queries(queries: Tensor, reduce: str, dtype: torch.dtype) -> Tensor:
    """Queries [B, Q, D] in the dtype of the scores; "mean" needs only their mean, [B, 1, D]."""
    query = queries.to(dtype)
    return query.mean(dim=1, keepdim=True) if reduce == "mean" else query


def unfold_gradient(d_query: Tensor, queries: Tensor, reduce: str) -> Tensor:
    """Gradient of the queries from that of `fold_queries`' result."""
    if reduce == "mean":
        return (d_query / queries.shape[1]).expand(queries.shape).contiguous()
    return d_query.contiguous()


def reduce_queries(dots: Tensor, reduce: str, dim: int) -> Tensor:
    """Reduce the axis of the folded queries; at a tie `max` sends its gradient to the lowest of them."""
    if reduce == "logsumexp":
        return dots.logsumexp(dim=dim)
    return dots.max(dim=dim).values


def lowest_equal(query: Tensor) -> Tensor:
    """Position [B, Q] int64 of the first query that equals each of the queries [B, Q, D].

    A matrix product rounds by the place of a column, so that equal queries would share the wins of one at random.
    """
    query = query.detach()
    # The "distance" of p = 0 counts the numbers that differ.
    equal = torch.cdist(query, query, p=0.0) == 0
    itself = torch.arange(query.shape[1], device=query.device)
    return (equal | (itself[:, None] == itself)).int().argmax(dim=-1)


def inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| over the last axis; 0, with zero gradient, where x is zero."""
    square = x.square().sum(dim=-1)
    zero = square == 0
    return square.masked_fill(zero, 1.0).rsqrt().masked_fill(zero, 0.0)


def row_magnitude(x: Tensor) -> Tensor:
    """Power of two [..., 1] to divide rows [..., D] by before they are squared; dividing by it rounds nothing.

    It is 1 for zero rows, for infinite ones and for those of ordinary size, else the magnitude of the row's largest
    number, whose square over- or underflows long before the norm does. A constant to autograd.
    """
    if x.shape[-1] == 0:
        return x.new_ones(*x.shape[:-1], 1)
    peak = x.detach().abs().amax(dim=-1, keepdim=True)
    ordinary = ((peak >= 2.0**-30) & (peak <= 2.0**30)) | (peak == 0) | ~peak.isfinite()
    return torch.where(ordinary, 1.0, peak / (2 * torch.frexp(peak).mantissa))


def scale_rows(x: Tensor, options: ScoreOptions) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows [..., D] as they meet the queries, with what cosine scores need beside them.

    Returns:
        (the rows over their magnitude, that magnitude [..., 1], 1 / the norm [..., 1] of the rows so scaled) for
        cosine; else (the rows, None, None).
    """
    if not options.cosine:
        return x, None, None
    magnitude = row_magnitude(x)
    x = x / magnitude
    return x, magnitude, inverse_norm(x)[..., None]


def products_backward(
    grad: Tensor, products: Tensor, inverse: Tensor | None, options: ScoreOptions, lowest: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the products x . q, from that of the scores.

    Args:
        grad: [..., n] gradient of the scores.
        products: [..., n, Q] x . q, without scale and norm.
        inverse: [..., n, 1] 1 / |x| for cosine, else None.
        lowest: [..., Q] of `lowest_equal`, where equal queries may have products that differ.

    Returns:
        (d products [..., n, Q]; for cosine the factor [..., n, 1] of x to subtract from the gradient of x:
        d(q . x / |x|) / dx = q / |x| - (q . x / |x|) x / |x|^2).
    """
    factor = options.scale if inverse is None else options.scale * inverse
    dots = products * factor
    if options.reduce == "max":
        winner = dots.argmax(dim=-1)
        winner = winner if lowest is None else lowest.gather(-1, winner)
        weight = torch.zeros_like(dots).scatter_(-1, winner[..., None], 1.0)
    else:
        weight = dots.softmax(dim=-1)  # 1 for "mean", which has a single folded query
    weight = weight * grad[..., None]
    shrink = None if inverse is None else (weight * dots).sum(dim=-1, keepdim=True) * inverse.square()
    return weight * factor, shrink


def kernel_limits(tokens: Tensor, queries: Tensor) -> str | None:
    """Why a call is beyond the compiled and the Triton kernels, or None."""
    for tensor in (tokens, queries):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it takes float32, float16 and bfloat16, got {tensor.dtype}"
    return None


def order_key(score: Tensor, mask: Tensor | None = None) -> Tensor:
    """Int64 keys in the range of int32 that sort as the scores do in float32: best highest, +0 equal to -0.

    Unmasked NaN have a key below that of every score, -inf too; masked tokens have the lowest.
    """
    bits = (score.detach().float() + 0.0).view(torch.int32)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = key.masked_fill(score.isnan(), -0x7FFFFFFF)
    if mask is not None:
        key = key.masked_fill(~mask, -0x80000000)
    return key.long()
