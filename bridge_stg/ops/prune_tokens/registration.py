"""`prune_tokens` as a registered op: schemas, fakes, gradients, backends, FLOP formulas."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..core.backends import Backend, register_backend
from ..core.library import define_op, differentiate, refuse_gradient
from ..core.native import native_backend
from ..core.triton import triton_backend
from .reference import reference, reference_backward
from .scoring import (
    kernel_limits,
    score_dtype,
)


def _fake(
    tokens: Tensor,
    queries: Tensor,
    keep: int,
    scoring: str,
    reduce: str,
    scale: float,
    mask: Tensor | None,
    return_scores: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, size, width = tokens.shape
    dtype = score_dtype(tokens, queries)
    return (
        tokens.new_empty(batch, keep, width),
        tokens.new_empty(batch, keep, dtype=torch.int64),
        tokens.new_empty(batch, keep, dtype=dtype),
        tokens.new_empty((batch, size) if return_scores else (0,), dtype=dtype),
    )


def _fake_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, _, width = kept.shape
    return (
        kept.new_empty((batch, token_count, width) if need_tokens else (0,)),
        queries.new_empty(queries.shape if need_queries else (0,)),
    )


_forward_op = define_op(
    "prune_tokens",
    "(Tensor tokens, Tensor queries, SymInt keep, str scoring, str reduce, float scale, Tensor? mask, "
    "bool return_scores, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
_backward_op = define_op(
    "prune_tokens_backward",
    "(Tensor? grad_kept, Tensor? grad_score, Tensor? grad_scores, Tensor? tokens, Tensor kept, Tensor index, "
    "Tensor score, Tensor scores, Tensor queries, SymInt token_count, str scoring, str reduce, float scale, "
    "bool masked, bool need_tokens, bool need_queries, str backend) -> (Tensor, Tensor)",
    _fake_backward,
    backend_of="prune_tokens",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, queries, _, scoring, reduce, scale, mask, return_scores, backend = inputs
    ctx.set_materialize_grads(False)
    # Only a gradient of the dense scores reads all tokens again; otherwise they may be freed.
    ctx.save_for_backward(tokens if return_scores else None, *output, queries)
    ctx.options = (tokens.shape[1], scoring, reduce, scale, mask is not None)
    ctx.backend = backend


def _backward(
    ctx: Any,
    grad_kept: Tensor | None,
    grad_index: None,
    grad_score: Tensor | None,
    grad_scores: Tensor | None,
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if saved[0] is None:
        grad_scores = None  # of the empty tensor in place of the dense scores
    grads = (grad_kept, grad_score, grad_scores)
    if all(grad is None for grad in grads):
        return (None,) * 9
    need_tokens, need_queries = ctx.needs_input_grad[:2]
    d_tokens, d_queries = cast(
        tuple[Tensor, Tensor],
        _backward_op(*grads, *saved, *ctx.options, need_tokens, need_queries, ctx.backend),
    )
    return (d_tokens if need_tokens else None, d_queries if need_queries else None, *(None,) * 7)


differentiate(_forward_op, _backward, _setup_context)
refuse_gradient(_backward_op, "prune_tokens is differentiable once: its gradient has no gradient.")
register_backend(Backend("prune_tokens", "reference", reference, reference_backward))
register_backend(triton_backend("prune_tokens", "prune_tokens.dense", limits=kernel_limits))
register_backend(native_backend("prune_tokens", has_backward=True, limits=kernel_limits))


@register_flop_formula(torch.ops.bridge_stg.prune_tokens)
def _flops(tokens: Any, queries: Any, *args: Any, **kwargs: Any) -> int:
    """One product of every token with every query: 2 B N Q D."""
    batch, size, width = tokens
    return 2 * batch * size * queries[1] * width


@register_flop_formula(torch.ops.bridge_stg.prune_tokens_backward)
def _flops_backward(
    grad_kept: Any,
    grad_score: Any,
    grad_scores: Any,
    tokens: Any,
    kept: Any,
    index: Any,
    score: Any,
    scores: Any,
    queries: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    """The products again, and one product for each gradient: of the kept rows, of all with dense scores."""
    if grad_score is None and grad_scores is None:
        return 0
    batch, rows, width = kept if grad_scores is None else tokens
    return 6 * batch * rows * queries[1] * width
