"""`prune_tokens`: score the tokens of each segment against a few queries, keep the best k in their order.

The reference is `score_tokens` -> `select_tokens` -> gather, all plain PyTorch.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..core.backends import Backend, choose_backend, register_backend
from ..core.checks import (
    BOOLEAN,
    FLOATING,
    Expect,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_tensors,
)
from ..core.library import define_op, differentiate, refuse_gradient
from ..core.modes import refuse_transforms, without_autocast
from ..core.native import native_backend
from ..core.triton import triton_backend
from .scoring import (
    REDUCES,
    SCORINGS,
    Reduce,
    Scoring,
    fold_queries,
    inverse_norm,
    kernel_limits,
    lowest_equal,
    order_key,
    products_backward,
    reduce_queries,
    row_magnitude,
    score_dtype,
    unfold_gradient,
)


class PrunedTokens(NamedTuple):
    """What `prune_tokens` keeps of each segment.

    Attributes:
        tokens: [B, k, D] the kept tokens, dtype of the input, in their original order.
        index: [B, k] int64 positions in 0..N-1, ascending.
        score: [B, k] float32 scores of the kept tokens (float64 for float64 inputs); -inf for a masked pick.
    """

    tokens: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index on purpose
    score: Tensor


class ScoredTokens(NamedTuple):
    """`PrunedTokens` and, as `scores`, the scores [B, N] of all tokens, -inf where masked; differentiable too."""

    tokens: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index on purpose
    score: Tensor
    scores: Tensor


@overload
def prune_tokens(
    tokens: Tensor,
    queries: Tensor,
    keep: int,
    *,
    scoring: Scoring = ...,
    reduce: Reduce = ...,
    scale: float | None = ...,
    mask: Tensor | None = ...,
    return_scores: Literal[False] = ...,
    validate: bool = ...,
    backend: str | None = ...,
) -> PrunedTokens: ...


@overload
def prune_tokens(
    tokens: Tensor,
    queries: Tensor,
    keep: int,
    *,
    scoring: Scoring = ...,
    reduce: Reduce = ...,
    scale: float | None = ...,
    mask: Tensor | None = ...,
    return_scores: Literal[True],
    validate: bool = ...,
    backend: str | None = ...,
) -> ScoredTokens: ...


def prune_tokens(
    tokens: Tensor,
    queries: Tensor,
    keep: int,
    *,
    scoring: Scoring = "dot",
    reduce: Reduce = "max",
    scale: float | None = None,
    mask: Tensor | None = None,
    return_scores: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> PrunedTokens | ScoredTokens:
    """Keep the `keep` tokens of each segment that score highest against the segment's queries.

    score[b, n] = reduce_q(scale * queries[b, q] . x[b, n]), where x is the token ("dot") or the token divided
    by its Euclidean norm ("cosine"; a zero token scores 0 and gets no score gradient, any other finite one has its
    cosine, however long or short). "mean" folds the queries to their mean before the product, which tells at
    infinities. Scores are accumulated in float32 whatever the input dtype: a bfloat16 product flips selections.

    Exactly `keep` tokens are selected by one total order: unmasked tokens by score (+0 equals -0), then
    unmasked tokens whose score is NaN, then masked tokens; ties go to the lower index. The order is that of the
    float32 scores, for float64 inputs too.

    Differentiable in `tokens` and `queries`, through the kept tokens and through `score`; once, not twice, and in
    reverse mode alone. With "max", a tie between queries sends the gradient to the lowest query. Nothing flows through
    a masked pick's score. Forward and backward are bitwise reproducible on one device, and never wait for the device.

    Args:
        tokens: [B, N, D] floating point; any strides (on CPU, rows whose features are not adjacent are copied).
        queries: [B, Q, D] floating point, already in the space of the tokens; may be expanded (stride 0).
        keep: tokens to keep in each segment, 1..N.
        scoring: "dot" or "cosine".
        reduce: how the scores of the Q queries become one: "max", "mean" or "logsumexp".
        scale: factor on every product, a finite number that float32 holds; 1 if None.
        mask: [B, N] bool, True for a token that takes part, False for a masked one; None for all.
        return_scores: whether to return the scores of all tokens as well, for a loss on them.
        validate: whether to check that no segment is masked as a whole, which waits for the device. Without it such a
            segment keeps its first tokens, with score -inf.
        backend: one of `bridge_stg.backends()`; None picks.

    Returns:
        PrunedTokens(tokens [B, k, D], index [B, k], score [B, k]); with `return_scores`
        ScoredTokens(tokens, index, score, scores [B, N]).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; a backend that
            cannot run; with `validate`, a segment without an unmasked token.
        NotImplementedError: a second derivative, or one by `torch.func` (`grad`, `jvp`).
    """
    op = "prune_tokens"
    sizes = check_tensors(
        op,
        Expect("tokens", tokens, "B N D", FLOATING),
        Expect("queries", queries, "B Q D", FLOATING),
        Expect("mask", mask, "B N", BOOLEAN, optional=True),
    )
    factor = _check_scoring(op, sizes["Q"], scoring, reduce, scale)
    keep = check_integer(op, "keep", keep, 1, sizes["N"], "tokens per segment")
    return_scores = check_flag(op, "return_scores", return_scores)
    validate = check_flag(op, "validate", validate)
    refuse_transforms(op, tokens, queries)
    if validate and mask is not None and not mask.is_meta and bool((hidden := ~mask.any(dim=1)).any()):
        raise ValueError(
            f"{op}: mask must leave at least one token in every segment, "
            f"got none in segment {int(hidden.nonzero()[0])}."
        )
    chosen = choose_backend(op, backend, tokens.device.type, tokens=tokens, queries=queries)
    kept, index, score, scores = cast(
        tuple[Tensor, ...],
        _forward_op(tokens, queries, keep, scoring, reduce, factor, mask, return_scores, chosen),
    )
    return ScoredTokens(kept, index, score, scores) if return_scores else PrunedTokens(kept, index, score)


def score_tokens(
    tokens: Tensor,
    queries: Tensor,
    *,
    scoring: Scoring = "dot",
    reduce: Reduce = "max",
    scale: float | None = None,
) -> Tensor:
    """The score of every token, [B, N] float32 (float64 for float64 inputs), as defined by `prune_tokens`.

    Plain differentiable PyTorch, for losses that need the scores of all tokens; never under autocast.

    Raises:
        TypeError, ValueError: as `prune_tokens`.
    """
    op = "score_tokens"
    sizes = check_tensors(
        op, Expect("tokens", tokens, "B N D", FLOATING), Expect("queries", queries, "B Q D", FLOATING)
    )
    return scores_of(tokens, queries, scoring, reduce, _check_scoring(op, sizes["Q"], scoring, reduce, scale))


def _check_scoring(op: str, queries: int, scoring: str, reduce: str, scale: float | None) -> float:
    """Check how tokens are scored, and return the scale."""
    check_integer(op, "the number of queries", queries, 1)
    check_choice(op, "scoring", scoring, SCORINGS)
    check_choice(op, "reduce", reduce, REDUCES)
    return 1.0 if scale is None else check_number(op, "scale", scale)


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


def _fake_backward(*args: Any) -> tuple[Tensor, Tensor]:
    kept, queries, token_count = args[4], args[8], args[9]
    need_tokens, need_queries = args[-3:-1]
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
