"""The definition of `prune_tokens` in plain PyTorch: scores, selection, gather, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.modes import without_autocast
from .scoring import (
    Reduce,
    Scoring,
    fold_queries,
    inverse_norm,
    lowest_equal,
    order_key,
    products_backward,
    reduce_queries,
    row_magnitude,
    score_dtype,
    unfold_gradient,
)


def scores_of(tokens: Tensor, queries: Tensor, scoring: str, reduce: str, scale: float) -> Tensor:
    """`score_tokens` of arguments that were checked."""
    with without_autocast(tokens.device.type):
        dtype = score_dtype(tokens, queries)
        query = fold_queries(queries, reduce, dtype) * scale
        x = tokens.to(dtype)
        if scoring == "cosine":
            x = x / row_magnitude(x)
        dots = query @ x.transpose(1, 2)  # [B, Q, N]
        if scoring == "cosine":
            dots = dots * inverse_norm(x)[:, None, :]
        if reduce == "max":
            winner = lowest_equal(query).gather(1, dots.detach().argmax(dim=1))
            return dots.gather(1, winner[:, None])[:, 0]
        return reduce_queries(dots, reduce, dim=1)


def select_tokens(score: Tensor, keep: int, mask: Tensor | None = None) -> Tensor:
    """Ascending positions [B, keep] of the selection that `prune_tokens` defines, given the scores [B, N]."""
    size = score.shape[1]
    position = torch.arange(size - 1, -1, -1, device=score.device)
    # Unique keys make the unstable top-k exact on ties: score in the high half, reversed position in the low.
    key = (order_key(score, mask) << 32) | position
    best = key.topk(keep, dim=1, sorted=False).values
    return (size - 1 - (best & 0xFFFFFFFF)).sort(dim=1).values


def gather_rows(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens[b, index[b]]: [B, N, D] and [B, k] to [B, k, D], contiguous."""
    return tokens[batch_rows(index), index].contiguous()


def batch_rows(index: Tensor) -> Tensor:
    """[B, 1] segment numbers, to index [B, N, ...] together with `index` [B, k]; faster than an expanded gather."""
    return torch.arange(index.shape[0], device=index.device)[:, None]


def reference(
    tokens: Tensor,
    queries: Tensor,
    keep: int,
    scoring: Scoring = "dot",
    reduce: Reduce = "max",
    scale: float = 1.0,
    mask: Tensor | None = None,
    return_scores: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition of `prune_tokens`, differentiable by autograd; the dense scores are empty unless asked for."""
    score = scores_of(tokens, queries, scoring, reduce, scale)
    index = select_tokens(score, keep, mask)
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    scores = score if return_scores else score.new_empty(0)
    return gather_rows(tokens, index), index, score.gather(1, index), scores


def reference_backward(
    grad_kept: Tensor | None,
    grad_score: Tensor | None,
    grad_scores: Tensor | None,
    tokens: Tensor | None,
    kept: Tensor,
    index: Tensor,
    score: Tensor,
    scores: Tensor,
    queries: Tensor,
    token_count: int,
    scoring: str,
    reduce: str,
    scale: float,
    masked: bool,
    need_tokens: bool,
    need_queries: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens [B, N, D] and queries [B, Q, D]; an empty tensor for one that is not needed.

    Without a gradient of the dense scores only the kept rows are read.
    """
    batch, _, width = kept.shape
    rows = batch_rows(index)
    d_queries = torch.zeros_like(queries, dtype=score.dtype, memory_format=torch.contiguous_format)
    d_kept = None if grad_kept is None else grad_kept.to(score.dtype)
    d_tokens = None
    if grad_scores is not None:
        assert tokens is not None
        if grad_score is not None:
            grad_scores = grad_scores.scatter_add(1, index, grad_score)
        d_tokens, d_queries = score_backward(grad_scores, tokens, scores, queries, scoring, reduce, scale, masked)
        if d_kept is not None:
            d_tokens[rows, index] += d_kept  # an index occurs once: nothing races
    elif grad_score is not None:
        d_path, d_queries = score_backward(grad_score, kept, score, queries, scoring, reduce, scale, masked)
        d_kept = d_path if d_kept is None else d_kept + d_path
    if d_tokens is None and need_tokens:
        d_tokens = kept.new_zeros(batch, token_count, width)
        if d_kept is not None:
            d_tokens[rows, index] = d_kept.to(kept.dtype)
    return (
        d_tokens.to(kept.dtype) if need_tokens and d_tokens is not None else kept.new_empty(0),
        d_queries.to(queries.dtype) if need_queries else queries.new_empty(0),
    )


def score_backward(
    grad: Tensor,
    tokens: Tensor,
    score: Tensor,
    queries: Tensor,
    scoring: str,
    reduce: str,
    scale: float,
    masked: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients, in `score.dtype`, of the scores [B, n] of tokens [B, n, D]: of the tokens and of the queries.

    The products are taken again, which on kept rows costs k/N of the forward and lets it save nothing.
    """
    x = tokens.to(score.dtype)
    if masked:
        dead = score == -torch.inf
        grad = grad.masked_fill(dead, 0.0)
        # A masked row may hold anything; 0 * NaN must not reach the queries.
        x = x.masked_fill(dead[:, :, None], 0.0)
    query = fold_queries(queries, reduce, score.dtype)
    magnitude = inverse = None
    if scoring == "cosine":
        magnitude = row_magnitude(x)
        x = x / magnitude
        inverse = inverse_norm(x)[..., None]
    lowest = lowest_equal(query) if reduce == "max" else None
    d_products, shrink = products_backward(grad, x @ query.transpose(1, 2), inverse, reduce, scale, lowest)
    d_x = d_products @ query
    if magnitude is not None and shrink is not None:
        d_x = (d_x - shrink * x) / magnitude
    return d_x, unfold_gradient(d_products.transpose(1, 2) @ x, queries, reduce)
