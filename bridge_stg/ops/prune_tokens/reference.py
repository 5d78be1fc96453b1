"""The definition of `prune_tokens` in plain PyTorch: scores, selection, gather, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_kernels.prune_tokens.records import PruneBackward, ScoreOptions
from ..core.modes import without_autocast
from .scoring import (
    fold_queries,
    lowest_equal,
    order_key,
    products_backward,
    reduce_queries,
    scale_rows,
    score_dtype,
    unfold_gradient,
)


def scores_of(tokens: Tensor, queries: Tensor, options: ScoreOptions) -> Tensor:
    """The scores [B, N] of `score_tokens`, for arguments that were checked."""
    with without_autocast(tokens.device.type):
        dtype = score_dtype(tokens, queries)
        query = fold_queries(queries, options.reduce, dtype) * options.scale
        x, _, inverse = scale_rows(tokens.to(dtype), options)
        dots = query @ x.transpose(1, 2)  # [B, Q, N]
        if inverse is not None:
            dots = dots * inverse.transpose(1, 2)
        if options.reduce == "max":
            winner = lowest_equal(query).gather(1, dots.detach().argmax(dim=1))
            return dots.gather(1, winner[:, None])[:, 0]
        return reduce_queries(dots, options.reduce, dim=1)


def select_tokens(score: Tensor, keep: int, mask: Tensor | None = None) -> Tensor:
    """Ascending positions [B, keep] of the selection that `prune_tokens` defines, given the scores [B, N]."""
    size = score.shape[1]
    position = torch.arange(size - 1, -1, -1, device=score.device)
    # Unique keys make the unstable top-k exact on ties: score in the high half, reversed position in the low.
    key = (order_key(score, mask) << 32) | position
    best = key.topk(keep, dim=1, sorted=False).values
    return (size - 1 - (best & 0xFFFFFFFF)).sort(dim=1).values


def gather_rows(tokens: Tensor, index: Tensor) -> Tensor:
    """The rows tokens[b, index[b]] of tokens [B, N, D] and index [B, k], as a contiguous [B, k, D]."""
    return tokens[batch_rows(index), index].contiguous()


def batch_rows(index: Tensor) -> Tensor:
    """Segment numbers [B, 1]: with `index` [B, k] they index [B, N, ...] faster than an expanded gather does."""
    return torch.arange(index.shape[0], device=index.device)[:, None]


def reference(
    tokens: Tensor,
    queries: Tensor,
    keep: int,
    options: ScoreOptions,
    mask: Tensor | None = None,
    return_scores: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition of `prune_tokens`, differentiable by autograd; the dense scores are empty unless asked for."""
    score = scores_of(tokens, queries, options)
    index = select_tokens(score, keep, mask)
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    scores = score if return_scores else score.new_empty(0)
    return gather_rows(tokens, index), index, score.gather(1, index), scores


def reference_backward(call: PruneBackward) -> tuple[Tensor, Tensor]:
    """Gradients of tokens [B, N, D] and queries [B, Q, D]; an empty tensor for one that is not needed.

    Without a gradient of the dense scores only the kept rows are read.
    """
    kept, queries, index = call.kept, call.queries, call.index
    dtype = score_dtype(kept, queries)
    rows = batch_rows(index)
    d_queries = torch.zeros_like(queries, dtype=dtype, memory_format=torch.contiguous_format)
    d_kept = None if call.grad_kept is None else call.grad_kept.to(dtype)
    d_tokens = None
    x, score, grad = call.scored_rows()
    if grad is not None:
        if call.grad_scores is not None and call.grad_score is not None:
            grad = grad.scatter_add(1, index, call.grad_score)
        d_x, d_queries = score_backward(grad, x, score, queries, call.options)
        if call.grad_scores is None:
            d_kept = d_x if d_kept is None else d_kept + d_x
        else:
            d_tokens = d_x
            if d_kept is not None:
                d_tokens[rows, index] += d_kept  # an index occurs once: nothing races
    if d_tokens is None and call.need_tokens:
        d_tokens = kept.new_zeros(call.token_shape)
        if d_kept is not None:
            d_tokens[rows, index] = d_kept.to(kept.dtype)
    return (
        d_tokens.to(kept.dtype) if call.need_tokens and d_tokens is not None else kept.new_empty(0),
        d_queries.to(queries.dtype) if call.need_queries else queries.new_empty(0),
    )


def score_backward(
    grad: Tensor, tokens: Tensor, score: Tensor | None, queries: Tensor, options: ScoreOptions
) -> tuple[Tensor, Tensor]:
    """Gradients, in `grad.dtype`, of the scores [B, n] of tokens [B, n, D]: of the tokens and of the queries.

    The products are computed again: on kept rows that costs k/N of the forward, which then need not save them.
    """
    x = tokens.to(grad.dtype)
    if options.masked and score is not None:
        dead = score == -torch.inf
        grad = grad.masked_fill(dead, 0.0)
        # A masked row may hold anything; 0 * NaN must not reach the queries.
        x = x.masked_fill(dead[:, :, None], 0.0)
    query = fold_queries(queries, options.reduce, grad.dtype)
    x, magnitude, inverse = scale_rows(x, options)
    lowest = lowest_equal(query) if options.reduce == "max" else None
    d_products, shrink = products_backward(grad, x @ query.transpose(1, 2), inverse, options, lowest)
    d_x = d_products @ query
    if magnitude is not None and shrink is not None:
        d_x = (d_x - shrink * x) / magnitude
    return d_x, unfold_gradient(d_products.transpose(1, 2) @ x, queries, options.reduce)
