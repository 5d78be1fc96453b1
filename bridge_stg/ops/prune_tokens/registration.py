"""`prune_tokens` and `prune_tokens_varlen` as registered ops: schemas, fakes, gradients, backends, FLOP formulas.

The schemas of `torch.library` are flat; the functions `_pack...` alone turn their arguments into the records that the
backends take.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...triton_kernels.prune_tokens.records import PruneBackward, ScoreOptions
from ..core.backends import Backend, register_backend
from ..core.library import define_op, differentiate, refuse_gradient
from ..core.native import native_backend
from ..core.triton import triton_backend
from .reference import reference, reference_backward
from .scoring import kernel_limits, score_dtype
from .varlen_reference import reference as varlen_reference
from .varlen_reference import reference_backward as varlen_reference_backward


def _pack(scoring: str, reduce: str, scale: float, mask: Tensor | None, **call: Any) -> dict[str, Any]:
    return {"options": ScoreOptions(scoring, reduce, scale, mask is not None), "mask": mask, **call}


def _pack_varlen(scoring: str, reduce: str, scale: float, **call: Any) -> dict[str, Any]:
    return {"options": ScoreOptions(scoring, reduce, scale), **call}


def _pack_backward(scoring: str, reduce: str, scale: float, masked: bool, **call: Any) -> dict[str, Any]:
    return {"call": PruneBackward(options=ScoreOptions(scoring, reduce, scale, masked), **call)}


def _pack_varlen_backward(grad_packed: Tensor | None, packed: Tensor, row_count: int, **call: Any) -> dict[str, Any]:
    return _pack_backward(grad_kept=grad_packed, kept=packed, token_count=row_count, masked=False, **call)


def _fake(
    tokens: Tensor, queries: Tensor, keep: int, options: ScoreOptions, mask: Tensor | None, return_scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, size, width = tokens.shape
    dtype = score_dtype(tokens, queries)
    return (
        tokens.new_empty(batch, keep, width),
        tokens.new_empty(batch, keep, dtype=torch.int64),
        tokens.new_empty(batch, keep, dtype=dtype),
        tokens.new_empty((batch, size) if return_scores else (0,), dtype=dtype),
    )


def _fake_varlen(
    tokens: Tensor,
    cu_seqlens: Tensor,
    queries: Tensor,
    budget: Tensor,
    policy: str,
    capacity: int,
    options: ScoreOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        tokens.new_empty(capacity, tokens.shape[1]),
        tokens.new_empty(capacity, dtype=torch.int64),
        tokens.new_empty(capacity, dtype=score_dtype(tokens, queries)),
        cu_seqlens.new_empty(cu_seqlens.shape),
        tokens.new_empty((), dtype=torch.int64),
    )


def _fake_backward(call: PruneBackward) -> tuple[Tensor, Tensor]:
    return (
        call.kept.new_empty(call.token_shape if call.need_tokens else (0,)),
        call.queries.new_empty(call.queries.shape if call.need_queries else (0,)),
    )


dense_op = define_op(
    "prune_tokens",
    "(Tensor tokens, Tensor queries, SymInt keep, str scoring, str reduce, float scale, Tensor? mask, "
    "bool return_scores, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    pack=_pack,
)
_backward_op = define_op(
    "prune_tokens_backward",
    "(Tensor? grad_kept, Tensor? grad_score, Tensor? grad_scores, Tensor? tokens, Tensor kept, Tensor index, "
    "Tensor score, Tensor scores, Tensor queries, SymInt token_count, str scoring, str reduce, float scale, "
    "bool masked, bool need_tokens, bool need_queries, str backend) -> (Tensor, Tensor)",
    _fake_backward,
    pack=_pack_backward,
    backend_of="prune_tokens",
)
varlen_op = define_op(
    "prune_tokens_varlen",
    "(Tensor tokens, Tensor cu_seqlens, Tensor queries, Tensor budget, str policy, SymInt capacity, str scoring, "
    "str reduce, float scale, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_varlen,
    pack=_pack_varlen,
)
_varlen_backward_op = define_op(
    "prune_tokens_varlen_backward",
    "(Tensor? grad_packed, Tensor? grad_score, Tensor packed, Tensor index, Tensor cu_seqlens, Tensor queries, "
    "SymInt row_count, str scoring, str reduce, float scale, bool need_tokens, bool need_queries, str backend) "
    "-> (Tensor, Tensor)",
    _fake_backward,
    pack=_pack_varlen_backward,
    backend_of="prune_tokens_varlen",
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
    d_tokens, d_queries = _backward_op(*grads, *saved, *ctx.options, need_tokens, need_queries, ctx.backend)
    return (d_tokens if need_tokens else None, d_queries if need_queries else None, *(None,) * 7)


def _setup_varlen_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, cu_seqlens, queries, _, _, _, scoring, reduce, scale, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], output[1], cu_seqlens, queries)
    ctx.options = (tokens.shape[0], scoring, reduce, scale)
    ctx.backend = backend


def _varlen_backward(
    ctx: Any, grad_packed: Tensor | None, grad_index: None, grad_score: Tensor | None, *rest: None
) -> tuple[Tensor | None, ...]:
    if grad_packed is None and grad_score is None:
        return (None,) * 10
    need_tokens, _, need_queries = ctx.needs_input_grad[:3]
    d_tokens, d_queries = _varlen_backward_op(
        grad_packed, grad_score, *ctx.saved_tensors, *ctx.options, need_tokens, need_queries, ctx.backend
    )
    return (d_tokens if need_tokens else None, None, d_queries if need_queries else None, *(None,) * 7)


differentiate(dense_op, _backward, _setup_context)
differentiate(varlen_op, _varlen_backward, _setup_varlen_context)
refuse_gradient(_backward_op, "prune_tokens is differentiable once: its gradient has no gradient.")
refuse_gradient(_varlen_backward_op, "prune_tokens_varlen is differentiable once: its gradient has no gradient.")
register_backend(Backend("prune_tokens", "reference", reference, reference_backward))
register_backend(triton_backend("prune_tokens", "prune_tokens.dense", limits=kernel_limits))
register_backend(native_backend("prune_tokens", has_backward=True, limits=kernel_limits))
register_backend(Backend("prune_tokens_varlen", "reference", varlen_reference, varlen_reference_backward))
register_backend(triton_backend("prune_tokens_varlen", "prune_tokens.varlen", limits=kernel_limits))


@register_flop_formula(torch.ops.bridge_stg.prune_tokens)
def _flops(tokens: Any, queries: Any, *args: Any, **kwargs: Any) -> int:
    """One product of every token with every query: 2 B N Q D."""
    return 2 * math.prod(tokens) * queries[1]


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
    return 6 * math.prod(kept if grad_scores is None else tokens) * queries[1]


@register_flop_formula(torch.ops.bridge_stg.prune_tokens_varlen)
def _flops_varlen(tokens: Any, cu_seqlens: Any, queries: Any, *args: Any, **kwargs: Any) -> int:
    """One product of every row with every query of its segment: 2 R Q D."""
    return 2 * math.prod(tokens) * queries[1]


@register_flop_formula(torch.ops.bridge_stg.prune_tokens_varlen_backward)
def _flops_varlen_backward(
    grad_packed: Any, grad_score: Any, packed: Any, index: Any, cu_seqlens: Any, queries: Any, *args: Any, **kwargs: Any
) -> int:
    """The products of the packed rows again, and one product for each gradient."""
    return 0 if grad_score is None else 6 * math.prod(packed) * queries[1]
