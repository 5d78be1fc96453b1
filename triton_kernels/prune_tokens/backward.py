"""Gradients of tokens and queries, for both prune ops: coefficients of the products, then two passes, no atomics.

Scored rows are the kept ones, or all tokens when the scores of all have a gradient. Their coefficients
d loss / d (x . q), [rows, Q] float32, and for cosine the factor of x that its norm takes off, are written once; then
d queries sums coefficient * x over the rows of a segment in a fixed order, and d tokens, which owns every row of its
result, finds whether a row was kept by a binary search in `index`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..common.configs import Config, gradient_config, multiprocessors, upcasts
from .backward_kernels import coefficient_kernel, query_kernel, token_kernel
from .scores import fold_mean


@dataclass(frozen=True)
class Rows:
    """The rows whose score has a gradient.

    Attributes:
        x: [B, n, D] or packed [n, D] by strides; None only where nothing reads it.
        score: [B, n], -inf where a row is masked; None where none is.
        gradient: [B, n] or [n] gradient of the scores, or None.
        offsets: [S + 1] where each segment's packed rows begin, or None.
        segments, length: B and n; packed: S and n.
        dense: whether these are all tokens, in place of the kept ones.
        extra: [B, k] gradient to add to that of the picked rows, or None.
    """

    x: Tensor | None
    score: Tensor | None
    gradient: Tensor | None
    offsets: Tensor | None
    segments: int
    length: int
    dense: bool = False
    extra: Tensor | None = None


def score_gradients(
    rows: Rows,
    queries: Tensor,
    grad_kept: Tensor | None,
    index: Tensor,
    bounds: Tensor | None,
    keep: int,
    token_count: int,
    scoring: str,
    reduce: str,
    scale: float,
    masked: bool,
    need_tokens: bool,
    need_queries: bool,
    template: Tensor,
) -> tuple[Tensor, Tensor]:
    """(d tokens [B, N, D] or [R, D], d queries [B, Q, D]), each empty where not needed.

    Args:
        grad_kept: [B, k, D] or packed [k, D] by strides, or None.
        index: [B, k] or [k] int64, ascending, -1 at the end of a packed one.
        bounds: [S + 1] of `bounds_kernel` for packed tokens, else None.
        keep, token_count: k and N; packed: capacity and R.
        template: the kept tokens, whose dtype and device d tokens has.
    """
    packed = bounds is not None
    query_count, width = queries.shape[1:]
    segments = rows.segments
    d_tokens = template.new_empty(0)
    d_queries = queries.new_empty(0)
    tokens_shape = (token_count, width) if packed else (segments, token_count, width)
    if segments == 0 or token_count == 0 or keep == 0:
        return (
            template.new_zeros(tokens_shape) if need_tokens else d_tokens,
            queries.new_zeros(queries.shape) if need_queries else d_queries,
        )
    scored = rows.gradient is not None
    config = gradient_config(template, queries)
    upcast = upcasts(template, queries)
    asked, queries = queries, fold_mean(queries, reduce)
    query_count = queries.shape[1]
    x = template if rows.x is None else rows.x
    x_strides = (0, *x.stride()) if packed else x.stride()
    coefficients = shrink = None
    shape = {"WIDTH": width, "BLOCK_Q": config.block_q, "BLOCK_D": config.block_d, "UPCAST": upcast}
    shape |= {"COSINE": scoring == "cosine", "PACKED": packed}
    if scored:
        assert rows.gradient is not None
        count = rows.gradient.numel()
        coefficients = template.new_empty(count, query_count, dtype=torch.float32)
        shrink = template.new_empty(count, 2, dtype=torch.float32) if scoring == "cosine" else None
        coefficient_kernel[(_tiles(rows.length, segments, config.block_n, packed),)](
            x,
            queries,
            rows.score,
            rows.gradient.contiguous(),
            None if rows.extra is None else rows.extra.contiguous(),
            index,
            rows.offsets,
            coefficients,
            shrink,
            segments,
            rows.length,
            keep,
            query_count,
            scale,
            *x_strides,
            *queries.stride(),
            BLOCK_N=config.block_n,
            REDUCE=reduce,
            MASKED=masked,
            **shape,
            **config.launch(),
        )
    if need_queries and not scored:
        d_queries = asked.new_zeros(asked.shape)
    elif need_queries:
        d_queries = _query_gradient(rows, x, x_strides, queries, coefficients, masked, shape, config)
        if reduce == "mean":
            d_queries = (d_queries / asked.shape[1]).to(asked.dtype).expand(asked.shape).contiguous()
    if need_tokens:
        d_tokens = template.new_empty(tokens_shape)
        grad_strides = (0, 0, 0) if grad_kept is None else (0, *grad_kept.stride()) if packed else grad_kept.stride()
        token_kernel[(_tiles(token_count, segments, config.block_n, packed),)](
            grad_kept,
            coefficients,
            shrink,
            x,
            rows.score,
            queries,
            index,
            bounds,
            d_tokens,
            segments,
            token_count,
            keep,
            query_count,
            *grad_strides,
            *x_strides,
            *queries.stride(),
            BLOCK_N=config.block_n,
            DENSE=rows.dense,
            MASKED=masked,
            **shape,
            **config.launch(),
        )
    return d_tokens, d_queries


def _tiles(length: int, segments: int, block: int, packed: bool) -> int:
    return length // block + segments if packed else segments * triton.cdiv(length, block)


def _query_gradient(
    rows: Rows,
    x: Tensor,
    x_strides: tuple[int, ...],
    queries: Tensor,
    coefficients: Tensor | None,
    masked: bool,
    shape: Mapping[str, object],
    config: Config,
) -> Tensor:
    segments, query_count, width = queries.shape
    block_d = 64
    tiles = triton.cdiv(query_count, config.block_q) * triton.cdiv(width, block_d)
    # Enough programs to fill the machine twice, but no split of fewer than 256 rows.
    mean_length = rows.length // segments if rows.offsets is not None else rows.length
    wanted = triton.cdiv(2 * multiprocessors(x.device), segments * tiles)
    splits = max(1, min(wanted, mean_length // 256))
    out = x.new_empty(splits, segments, query_count, width, dtype=queries.dtype if splits == 1 else torch.float32)
    query_kernel[(segments * tiles * splits,)](
        coefficients,
        x,
        rows.score,
        rows.offsets,
        out,
        segments,
        rows.length,
        query_count,
        splits,
        x_strides,
        WIDTH=width,
        BLOCK_N=32,
        BLOCK_Q=config.block_q,
        BLOCK_D=block_d,
        UPCAST=shape["UPCAST"],
        MASKED=masked,
        PACKED=shape["PACKED"],
        **config.launch(),
    )
    return out[0] if splits == 1 else out.sum(0).to(queries.dtype)
