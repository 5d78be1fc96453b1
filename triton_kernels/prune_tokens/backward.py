"""Gradients of tokens and queries, for both prune ops: coefficients of the products, then two passes, no atomics.

Scored rows are the kept ones, or all tokens when the scores of all have a gradient. The first kernel writes once their
coefficients d loss / d (x . q), [rows, Q] float32, and for cosine the factor of x that its norm takes off. Then
d queries sums coefficient * x over the rows of a segment in a fixed order, and d tokens, which owns every row of its
result, finds whether a row was kept by a binary search in `index`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..common.configs import gradient_config, multiprocessors, product_constants
from .backward_kernels import coefficient_kernel, query_kernel, token_kernel
from .records import PruneBackward
from .scores import fold_mean
from .segments import safe_offsets, segment_strides, tile_count


@dataclass(frozen=True)
class Operands:
    """What the kernels of one backward share.

    Attributes:
        x: [B, n, D] or packed [n, D] by strides: the rows whose scores have a gradient.
        score: [B, n] their scores, -inf where a row is masked; None for packed rows.
        gradient: [B, n] or [n] contiguous gradient of these scores, or None.
        extra: [B, k] contiguous gradient of the kept scores, to add where `x` is all tokens; or None.
        bounds, offsets: [S + 1] of `safe_offsets` for packed tokens, else None.
        queries: [B, Q, D] by strides, folded.
        constants: tile sizes, flags and launch options of the kernels.
    """

    x: Tensor
    score: Tensor | None
    gradient: Tensor | None
    extra: Tensor | None
    bounds: Tensor | None
    offsets: Tensor | None
    queries: Tensor
    constants: dict[str, int]


def launch_backward(call: PruneBackward) -> tuple[Tensor, Tensor]:
    """(d tokens, d queries), each empty where not needed; see `reference_backward`."""
    kept, queries = call.kept, call.queries
    if 0 in (queries.shape[0], call.token_count, call.index.shape[-1]):
        return (
            kept.new_zeros(call.token_shape if call.need_tokens else 0),
            queries.new_zeros(queries.shape if call.need_queries else 0),
        )
    shared = _operands(call)
    coefficients, shrink = (None, None) if shared.gradient is None else _coefficients(call, shared)
    d_queries = queries.new_empty(0)
    if call.need_queries:
        d_queries = queries.new_zeros(queries.shape) if coefficients is None else _d_queries(call, shared, coefficients)
    d_tokens = _d_tokens(call, shared, coefficients, shrink) if call.need_tokens else kept.new_empty(0)
    return d_tokens, d_queries


def _operands(call: PruneBackward) -> Operands:
    packed = call.cu_seqlens is not None
    bounds, offsets = (
        (None, None) if call.cu_seqlens is None else safe_offsets(call.cu_seqlens, call.token_count, call.index)
    )
    x, score, gradient = call.scored_rows()
    extra = None if call.grad_scores is None or call.grad_score is None else call.grad_score.contiguous()
    constants = product_constants(gradient_config(call.kept, call.queries), call.kept, call.queries)
    return Operands(
        x=x,
        score=score,
        gradient=None if gradient is None else gradient.contiguous(),
        extra=extra,
        bounds=bounds,
        offsets=offsets,
        queries=fold_mean(call.queries, call.options.reduce),
        constants=constants | {"MASKED": call.options.masked, "PACKED": packed},
    )


def _coefficients(call: PruneBackward, shared: Operands) -> tuple[Tensor, Tensor | None]:
    """(coefficients [rows, Q], for cosine shrink [rows, 2]) of `coefficient_kernel`."""
    gradient, queries, options = shared.gradient, shared.queries, call.options
    assert gradient is not None
    segments, query_count = queries.shape[:2]
    length = shared.x.shape[-2]
    coefficients = gradient.new_empty(gradient.numel(), query_count)
    shrink = gradient.new_empty(gradient.numel(), 2) if options.cosine else None
    coefficient_kernel[(tile_count(length, segments, shared.constants["BLOCK_N"], shared.offsets is not None),)](
        shared.x,
        queries,
        shared.score,
        gradient,
        shared.extra,
        call.index,
        shared.offsets,
        coefficients,
        shrink,
        segments,
        length,
        call.index.shape[-1],
        query_count,
        options.scale,
        segment_strides(shared.x),
        queries.stride(),
        COSINE=options.cosine,
        REDUCE=options.reduce,
        **shared.constants,
    )
    return coefficients, shrink


def _d_queries(call: PruneBackward, shared: Operands, coefficients: Tensor) -> Tensor:
    x = shared.x
    segments, query_count, width = shared.queries.shape
    length, block_d = x.shape[-2], 64
    tiles = triton.cdiv(query_count, shared.constants["BLOCK_Q"]) * triton.cdiv(width, block_d)
    # Enough programs to fill the machine twice, but no split of fewer than 256 rows.
    mean_length = length if shared.offsets is None else length // segments
    wanted = triton.cdiv(2 * multiprocessors(x.device), segments * tiles)
    splits = max(1, min(wanted, mean_length // 256))
    dtype = shared.queries.dtype
    out = x.new_empty(splits, segments, query_count, width, dtype=dtype if splits == 1 else torch.float32)
    query_kernel[(segments * tiles * splits,)](
        coefficients,
        x,
        shared.score,
        shared.offsets,
        out,
        segments,
        length,
        query_count,
        splits,
        segment_strides(x),
        **(shared.constants | {"BLOCK_N": 32, "BLOCK_D": block_d}),
    )
    d_queries = out[0] if splits == 1 else out.sum(0).to(dtype)
    if call.options.reduce == "mean":  # each query has its share of the gradient of the one folded query
        d_queries = (d_queries / call.queries.shape[1]).to(call.queries.dtype).expand(call.queries.shape).contiguous()
    return d_queries


def _d_tokens(call: PruneBackward, shared: Operands, coefficients: Tensor | None, shrink: Tensor | None) -> Tensor:
    segments, query_count = shared.queries.shape[:2]
    d_tokens = call.kept.new_empty(call.token_shape)
    token_kernel[(tile_count(call.token_count, segments, shared.constants["BLOCK_N"], shared.bounds is not None),)](
        call.grad_kept,
        coefficients,
        shrink,
        shared.x,
        shared.score,
        shared.queries,
        call.index,
        shared.bounds,
        d_tokens,
        segments,
        call.token_count,
        call.index.shape[-1],
        query_count,
        segment_strides(call.grad_kept),
        segment_strides(shared.x),
        shared.queries.stride(),
        COSINE=call.options.cosine,
        DENSE=call.grad_scores is not None,
        **shared.constants,
    )
    return d_tokens
