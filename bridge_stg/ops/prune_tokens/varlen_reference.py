"""The definition of `prune_tokens_varlen` in plain PyTorch: scores, policies, packing, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_kernels.prune_tokens.records import PruneBackward, ScoreOptions
from .scoring import (
    fold_queries,
    order_key,
    products_backward,
    reduce_queries,
    scale_rows,
    score_dtype,
    unfold_gradient,
)


def segment_of(rows: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Segment of each row, clamped to 0..S-1, and whether the row lies in a segment at all."""
    segment = torch.searchsorted(cu_seqlens.to(torch.int64), rows, right=True) - 1
    last = cu_seqlens.shape[0] - 2
    return segment.clamp(0, last), (segment >= 0) & (segment <= last)


def score_rows(tokens: Tensor, segment: Tensor, queries: Tensor, options: ScoreOptions) -> Tensor:
    """Scores [R] of rows [R, D] against the queries [S, Q, D] of their segments."""
    dtype = score_dtype(tokens, queries)
    query = fold_queries(queries, options.reduce, dtype) * options.scale
    x, _, inverse = scale_rows(tokens.to(dtype), options)
    dots = row_products(x, segment, query)
    if inverse is not None:
        dots = dots * inverse
    return reduce_queries(dots, options.reduce, dim=1)


def row_products(x: Tensor, segment: Tensor, query: Tensor) -> Tensor:
    """Products x[r] . query[segment[r], q] [R, Q], computed a query at a time so that [R, Q, D] is never written."""
    return torch.stack([(x * query[:, q][segment]).sum(dim=-1) for q in range(query.shape[1])], dim=1)


def select_rows(score: Tensor, segment: Tensor, inside: Tensor, starts: Tensor, budget: Tensor, policy: str) -> Tensor:
    """Flags [R] bool of the rows that the policy keeps; `starts` [S] is where each segment begins."""
    budget = budget.expand(starts.shape)
    if policy == "threshold":
        return inside & (score >= budget[segment])
    best_first = order_key(score, inside).argsort(descending=True, stable=True)
    place = torch.arange(score.shape[0], device=score.device)
    if policy == "per_clip":
        return _unsort(best_first, place < budget[0]) & inside
    # Rows outside the segments sort behind all of them, so that every segment's block begins at its start.
    block = torch.where(inside, segment, starts.shape[0])[best_first]
    order = best_first[block.argsort(stable=True)]
    segment = segment[order]
    start = starts[segment]
    if policy == "per_segment":
        return _unsort(order, place - start < budget[segment]) & inside
    score = score[order]
    share = torch.where(score == score[start], 1.0, (score - score[start]).double().exp())
    # Sums in fixed point are exact, and so the same in any order.
    mass = (share.nan_to_num(0.0) * 2.0**32).round().to(torch.int64).masked_fill(~inside[order], 0)
    before = mass.cumsum(0) - mass
    total = torch.zeros_like(starts).index_put((segment,), mass, accumulate=True)
    kept = (before - before[start] < budget[segment] * total[segment].double()) & ~score.isnan()
    return _unsort(order, kept) & inside


def _unsort(order: Tensor, flags: Tensor) -> Tensor:
    return torch.empty_like(flags).index_put((order,), flags)


def reference(
    tokens: Tensor,
    cu_seqlens: Tensor,
    queries: Tensor,
    budget: Tensor,
    policy: str,
    capacity: int,
    options: ScoreOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The definition of `prune_tokens_varlen`, differentiable by autograd."""
    size = tokens.shape[0]
    row = torch.arange(size, device=tokens.device)
    segment, inside = segment_of(row, cu_seqlens)
    score = score_rows(tokens, segment, queries, options)
    # Offsets that do not ascend (`validate` refuses them) must still stay inside the rows.
    bounds = cu_seqlens.to(torch.int64).clamp(0, size)
    starts = bounds[:-1].clamp(max=max(size - 1, 0))
    kept = select_rows(score.detach(), segment, inside, starts, budget, policy) if size else inside
    place = kept.cumsum(0)
    slot = torch.where(kept & (place <= capacity), place - 1, capacity)
    index = torch.full((capacity + 1,), -1, device=tokens.device).index_put((slot,), row)[:capacity]
    # The spare slot took whatever was not kept.
    filled = index >= 0
    ends = torch.cat([place.new_zeros(1), place])[bounds]
    return (
        take_rows(tokens, index),
        index.contiguous(),
        take_rows(score[:, None], index)[:, 0].masked_fill(~filled, 0.0),
        ends.clamp(max=capacity).to(cu_seqlens.dtype),
        kept.sum(),
    )


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """The rows rows[index], zeros where the index is -1."""
    if rows.shape[0] == 0:
        return rows.new_zeros(index.shape[0], rows.shape[1])
    return rows[index.clamp(min=0)].masked_fill((index < 0)[:, None], 0)


def reference_backward(call: PruneBackward) -> tuple[Tensor, Tensor]:
    """Gradients of tokens [R, D] and queries [S, Q, D]; an empty tensor for one that is not needed."""
    packed, queries, index = call.kept, call.queries, call.index
    dtype = score_dtype(packed, queries)
    filled = index >= 0
    d_packed = torch.zeros_like(packed, dtype=dtype) if call.grad_kept is None else call.grad_kept.to(dtype)
    d_queries = torch.zeros_like(queries, dtype=dtype, memory_format=torch.contiguous_format)
    if call.grad_score is not None:
        assert call.cu_seqlens is not None
        segment, _ = segment_of(index.clamp(min=0), call.cu_seqlens)
        grad = call.grad_score.masked_fill(~filled, 0.0)
        d_path, d_queries = _score_backward(grad, packed.to(dtype), segment, queries, call.options)
        d_packed = d_packed + d_path
    d_tokens = packed.new_empty(0)
    if call.need_tokens:
        slot = torch.where(filled, index, call.token_count)  # the spare row takes the gradients of empty rows
        d_tokens = packed.new_zeros(call.token_count + 1, packed.shape[1])
        d_tokens = d_tokens.index_put((slot,), d_packed.to(packed.dtype))[: call.token_count]
    return d_tokens, d_queries.to(queries.dtype) if call.need_queries else queries.new_empty(0)


def _score_backward(
    grad: Tensor, x: Tensor, segment: Tensor, queries: Tensor, options: ScoreOptions
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores of rows [K, D] of packed segments; `reference.score_backward` is that of equal ones."""
    query = fold_queries(queries, options.reduce, x.dtype)
    x, magnitude, inverse = scale_rows(x, options)
    d_products, shrink = products_backward(grad, row_products(x, segment, query), inverse, options)
    d_x = torch.zeros_like(x)
    d_query = []
    for q in range(query.shape[1]):
        d_x = d_x + d_products[:, q, None] * query[:, q][segment]
        # index_put sums in a fixed order; index_add would race on CUDA.
        total = query.new_zeros(query.shape[0], query.shape[2])
        d_query.append(total.index_put((segment,), d_products[:, q, None] * x, accumulate=True))
    if magnitude is not None and shrink is not None:
        d_x = (d_x - shrink * x) / magnitude
    return d_x, unfold_gradient(torch.stack(d_query, dim=1), queries, options.reduce)
