"""`prune_tokens_varlen`: `prune_tokens` for packed segments of any length, with a budget in place of a fixed k.

How many tokens survive is known to the device only: the result lies in a buffer of fixed capacity, with its count.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..core.backends import Backend, choose_backend, register_backend
from ..core.checks import (
    FLOATING,
    INTEGER,
    Expect,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_tensors,
)
from ..core.library import define_op, differentiate, refuse_gradient
from ..core.modes import refuse_transforms
from ..core.triton import triton_backend
from .scoring import (
    REDUCES,
    SCORINGS,
    Reduce,
    Scoring,
    fold_queries,
    inverse_norm,
    kernel_limits,
    order_key,
    products_backward,
    reduce_queries,
    row_magnitude,
    score_dtype,
    unfold_gradient,
)

Policy = Literal["per_segment", "per_clip", "top_p", "threshold"]
POLICIES = ("per_segment", "per_clip", "top_p", "threshold")
_COUNTS = ("per_segment", "per_clip")


class PackedTokens(NamedTuple):
    """What `prune_tokens_varlen` keeps, packed in the original order.

    Attributes:
        tokens: [capacity, D] kept tokens, dtype of the input; zeros in rows >= count.
        index: [capacity] int64 rows of the input, ascending; -1 in rows >= count.
        score: [capacity] float32 scores (float64 for float64 inputs); 0 in rows >= count.
        cu_seqlens_out: [S + 1] where each segment's tokens start in `tokens`, dtype of `cu_seqlens`, cut off at
            the capacity.
        count: [] int64 number of tokens selected. Above the capacity, the last ones were left out.
    """

    tokens: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index on purpose
    score: Tensor
    cu_seqlens_out: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count on purpose


def prune_tokens_varlen(
    tokens: Tensor,
    cu_seqlens: Tensor,
    queries: Tensor,
    budget: float | Tensor,
    *,
    policy: Policy = "per_segment",
    capacity: int,
    scoring: Scoring = "dot",
    reduce: Reduce = "max",
    scale: float | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> PackedTokens:
    """Keep the best tokens of packed segments, as many as a budget allows.

    Scores, the total order and its ties are those of `prune_tokens`. What is kept:

    - "per_segment": the best `budget` tokens of each segment, all of a shorter one; int, or one for each segment;
    - "per_clip": the best `budget` tokens of all segments together; int;
    - "top_p": of each segment the fewest best tokens whose share of softmax(score) reaches `budget`, in (0, 1];
      shares below 2^-33 of the best token's count as nothing;
    - "threshold": every token whose score is at least `budget`.

    "top_p" and "threshold" never keep a token whose score is NaN. Rows of `tokens` outside the segments are not
    kept; offsets that do not ascend give unspecified rows, each at most once, and never lead outside the tensors.
    The host never waits for the device.

    Differentiable in `tokens` and `queries`, through the kept tokens and through `score`; once, not twice, and in
    reverse mode alone.

    Args:
        tokens: [R, D] floating point, the segments one after another.
        cu_seqlens: [S + 1] int32 or int64, 0 = cu_seqlens[0] <= ... <= cu_seqlens[S] = R.
        queries: [S, Q, D] floating point, in the space of the tokens; may be expanded (stride 0).
        budget: a number, or a tensor [] or (except "per_clip") [S] on the device of the tokens: int32 or int64
            where it counts tokens, floating point otherwise; a number is finite.
        policy: one of the four above.
        capacity: rows of the result; R always suffices, S * budget does for a "per_segment" int.
        scoring, reduce, scale: as in `prune_tokens`.
        validate: whether to check the values of `cu_seqlens` and of a tensor `budget`, and that all that was selected
            found room, which waits for the device.
        backend: one of `bridge_stg.backends()`; None picks.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; a backend that
            cannot run; with `validate`, offsets that do not ascend from 0 to R, a budget out of range, or more
            selected tokens than `capacity`.
        NotImplementedError: a second derivative, or one by `torch.func` (`grad`, `jvp`).
    """
    op = "prune_tokens_varlen"
    check_choice(op, "policy", policy, POLICIES)
    check_choice(op, "scoring", scoring, SCORINGS)
    check_choice(op, "reduce", reduce, REDUCES)
    sizes = check_tensors(
        op,
        Expect("tokens", tokens, "R D", FLOATING),
        Expect("cu_seqlens", cu_seqlens, "S+1", INTEGER),
        Expect("queries", queries, "S Q D", FLOATING),
    )
    segments = sizes["S"]
    if sizes["S+1"] != segments + 1:
        raise ValueError(
            f"{op}: cu_seqlens must have shape [S + 1] with S={segments} (from queries), got [{sizes['S+1']}]."
        )
    check_integer(op, "the number of segments", segments, 1)
    check_integer(op, "the number of queries", sizes["Q"], 1)
    capacity = check_integer(op, "capacity", capacity, 1)
    validate = check_flag(op, "validate", validate) and not tokens.is_meta  # which has no values
    factor = 1.0 if scale is None else check_number(op, "scale", scale)
    limit = _budget_tensor(budget, policy, segments, tokens.device)
    refuse_transforms(op, tokens, queries)
    if validate:
        _check_values(cu_seqlens, limit, policy, sizes["R"])
    chosen = choose_backend(op, backend, tokens.device.type, tokens=tokens, queries=queries)
    packed = PackedTokens(
        *cast(
            tuple[Tensor, ...],
            _forward_op(tokens, cu_seqlens, queries, limit, policy, capacity, scoring, reduce, factor, chosen),
        )
    )
    if validate and (count := int(packed.count)) > capacity:
        raise ValueError(f"{op}: capacity must be at least the {count} tokens that were selected, got {capacity}.")
    return packed


def _budget_tensor(budget: float | Tensor, policy: str, segments: int, device: torch.device) -> Tensor:
    op = "prune_tokens_varlen"
    counts = policy in _COUNTS
    if isinstance(budget, Tensor):
        allowed = INTEGER if counts else FLOATING
        if budget.dtype not in allowed:
            raise TypeError(
                f"{op}: budget must be {' or '.join(map(str, allowed))} for policy {policy!r}, got {budget.dtype}."
            )
        if budget.dim() and (policy == "per_clip" or tuple(budget.shape) != (segments,)):
            shapes = "[]" if policy == "per_clip" else f"[] or [{segments}]"
            raise ValueError(f"{op}: budget must have shape {shapes} for policy {policy!r}, got {list(budget.shape)}.")
        if budget.device != device:
            raise ValueError(f"{op}: budget must be on the device of tokens ({device}), got {budget.device}.")
        return budget
    if counts:
        budget = check_integer(op, "budget", budget, 0)
        return torch.full((), budget, dtype=torch.int64, device=device)
    number = check_number(op, "budget", budget)
    if policy == "top_p" and not 0.0 < number <= 1.0:
        raise ValueError(f"{op}: budget must be in (0, 1] for policy 'top_p', got {budget}.")
    return torch.full((), number, dtype=torch.float64, device=device)


def _check_values(cu_seqlens: Tensor, budget: Tensor, policy: str, rows: int) -> None:
    op = "prune_tokens_varlen"
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != rows or offsets != sorted(offsets):
        raise ValueError(f"{op}: cu_seqlens must ascend from 0 to {rows} (rows of tokens), got {offsets}.")
    if policy in _COUNTS and bool((budget < 0).any()):
        raise ValueError(f"{op}: budget must be at least 0, got {int(budget.min())}.")
    if policy == "top_p" and not bool(((budget > 0) & (budget <= 1)).all()):
        raise ValueError(f"{op}: budget must be in (0, 1] for policy 'top_p', got {budget.tolist()}.")


def segment_of(rows: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Segment of each row, in 0..S-1, and whether the row lies in any."""
    segment = torch.searchsorted(cu_seqlens.to(torch.int64), rows, right=True) - 1
    last = cu_seqlens.shape[0] - 2
    return segment.clamp(0, last), (segment >= 0) & (segment <= last)


def score_rows(tokens: Tensor, segment: Tensor, queries: Tensor, scoring: str, reduce: str, scale: float) -> Tensor:
    """Scores [R] of rows [R, D] against the queries [S, Q, D] of their segments."""
    dtype = score_dtype(tokens, queries)
    query = fold_queries(queries, reduce, dtype) * scale
    x = tokens.to(dtype)
    if scoring == "cosine":
        x = x / row_magnitude(x)
    dots = row_products(x, segment, query)
    if scoring == "cosine":
        dots = dots * inverse_norm(x)[:, None]
    return reduce_queries(dots, reduce, dim=1)


def row_products(x: Tensor, segment: Tensor, query: Tensor) -> Tensor:
    """x[r] . query[segment[r], q] as [R, Q], one query at a time: [R, Q, D] is never written."""
    return torch.stack([(x * query[:, q][segment]).sum(dim=-1) for q in range(query.shape[1])], dim=1)


def select_rows(score: Tensor, segment: Tensor, inside: Tensor, starts: Tensor, budget: Tensor, policy: str) -> Tensor:
    """Which rows the policy keeps, [R] bool; `starts` is where each segment begins."""
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
    # In fixed point the sums are exact, and so the same in any order.
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
    scoring: str,
    reduce: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The definition of `prune_tokens_varlen`, differentiable by autograd."""
    size = tokens.shape[0]
    row = torch.arange(size, device=tokens.device)
    segment, inside = segment_of(row, cu_seqlens)
    score = score_rows(tokens, segment, queries, scoring, reduce, scale)
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
    """rows[index], zeros where the index is -1."""
    if rows.shape[0] == 0:
        return rows.new_zeros(index.shape[0], rows.shape[1])
    return rows[index.clamp(min=0)].masked_fill((index < 0)[:, None], 0)


def reference_backward(
    grad_packed: Tensor | None,
    grad_score: Tensor | None,
    packed: Tensor,
    index: Tensor,
    cu_seqlens: Tensor,
    queries: Tensor,
    row_count: int,
    scoring: str,
    reduce: str,
    scale: float,
    need_tokens: bool,
    need_queries: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens [R, D] and queries [S, Q, D]; an empty tensor for one that is not needed."""
    dtype = score_dtype(packed, queries)
    filled = index >= 0
    d_packed = torch.zeros_like(packed, dtype=dtype) if grad_packed is None else grad_packed.to(dtype)
    d_queries = torch.zeros_like(queries, dtype=dtype, memory_format=torch.contiguous_format)
    if grad_score is not None:
        segment, _ = segment_of(index.clamp(min=0), cu_seqlens)
        grad = grad_score.masked_fill(~filled, 0.0)
        d_path, d_queries = _score_backward(grad, packed.to(dtype), segment, queries, scoring, reduce, scale)
        d_packed = d_packed + d_path
    d_tokens = packed.new_empty(0)
    if need_tokens:
        slot = torch.where(filled, index, row_count)  # the spare row takes the gradients of empty rows
        d_tokens = packed.new_zeros(row_count + 1, packed.shape[1]).index_put((slot,), d_packed.to(packed.dtype))
        d_tokens = d_tokens[:row_count]
    return d_tokens, d_queries.to(queries.dtype) if need_queries else queries.new_empty(0)


def _score_backward(
    grad: Tensor, x: Tensor, segment: Tensor, queries: Tensor, scoring: str, reduce: str, scale: float
) -> tuple[Tensor, Tensor]:
    """As `prune_tokens.score_backward`, for rows [K, D] of packed segments."""
    query = fold_queries(queries, reduce, x.dtype)
    magnitude = inverse = None
    if scoring == "cosine":
        magnitude = row_magnitude(x)
        x = x / magnitude
        inverse = inverse_norm(x)[:, None]
    d_products, shrink = products_backward(grad, row_products(x, segment, query), inverse, reduce, scale)
    d_x = torch.zeros_like(x)
    d_query = []
    for q in range(query.shape[1]):
        d_x = d_x + d_products[:, q, None] * query[:, q][segment]
        # index_put sums in a fixed order; index_add would race on CUDA.
        total = query.new_zeros(query.shape[0], query.shape[2])
        d_query.append(total.index_put((segment,), d_products[:, q, None] * x, accumulate=True))
    if magnitude is not None and shrink is not None:
        d_x = (d_x - shrink * x) / magnitude
    return d_x, unfold_gradient(torch.stack(d_query, dim=1), queries, reduce)


def _fake(
    tokens: Tensor,
    cu_seqlens: Tensor,
    queries: Tensor,
    budget: Tensor,
    policy: str,
    capacity: int,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        tokens.new_empty(capacity, tokens.shape[1]),
        tokens.new_empty(capacity, dtype=torch.int64),
        tokens.new_empty(capacity, dtype=score_dtype(tokens, queries)),
        cu_seqlens.new_empty(cu_seqlens.shape),
        tokens.new_empty((), dtype=torch.int64),
    )


def _fake_backward(*args: Any) -> tuple[Tensor, Tensor]:
    packed, queries, row_count = args[2], args[5], args[6]
    need_tokens, need_queries = args[-3:-1]
    return (
        packed.new_empty((row_count, packed.shape[1]) if need_tokens else (0,)),
        queries.new_empty(queries.shape if need_queries else (0,)),
    )


_forward_op = define_op(
    "prune_tokens_varlen",
    "(Tensor tokens, Tensor cu_seqlens, Tensor queries, Tensor budget, str policy, SymInt capacity, str scoring, "
    "str reduce, float scale, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
_backward_op = define_op(
    "prune_tokens_varlen_backward",
    "(Tensor? grad_packed, Tensor? grad_score, Tensor packed, Tensor index, Tensor cu_seqlens, Tensor queries, "
    "SymInt row_count, str scoring, str reduce, float scale, bool need_tokens, bool need_queries, str backend) "
    "-> (Tensor, Tensor)",
    _fake_backward,
    backend_of="prune_tokens_varlen",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, cu_seqlens, queries, _, _, _, scoring, reduce, scale, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], output[1], cu_seqlens, queries)
    ctx.options = (tokens.shape[0], scoring, reduce, scale)
    ctx.backend = backend


def _backward(
    ctx: Any, grad_packed: Tensor | None, grad_index: None, grad_score: Tensor | None, *rest: None
) -> tuple[Tensor | None, ...]:
    if grad_packed is None and grad_score is None:
        return (None,) * 10
    need_tokens, _, need_queries = ctx.needs_input_grad[:3]
    d_tokens, d_queries = cast(
        tuple[Tensor, Tensor],
        _backward_op(grad_packed, grad_score, *ctx.saved_tensors, *ctx.options, need_tokens, need_queries, ctx.backend),
    )
    return (d_tokens if need_tokens else None, None, d_queries if need_queries else None, *(None,) * 7)


differentiate(_forward_op, _backward, _setup_context)
refuse_gradient(_backward_op, "prune_tokens_varlen is differentiable once: its gradient has no gradient.")
register_backend(Backend("prune_tokens_varlen", "reference", reference, reference_backward))
register_backend(triton_backend("prune_tokens_varlen", "prune_tokens.varlen", limits=kernel_limits))


@register_flop_formula(torch.ops.bridge_stg.prune_tokens_varlen)
def _flops(tokens: Any, cu_seqlens: Any, queries: Any, *args: Any, **kwargs: Any) -> int:
    """One product of every row with every query of its segment: 2 R Q D."""
    rows, width = tokens
    return 2 * rows * queries[1] * width


@register_flop_formula(torch.ops.bridge_stg.prune_tokens_varlen_backward)
def _flops_backward(
    grad_packed: Any,
    grad_score: Any,
    packed: Any,
    index: Any,
    cu_seqlens: Any,
    queries: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    """The products of the packed rows again, and one product for each gradient."""
    if grad_score is None:
        return 0
    rows, width = packed
    return 6 * rows * queries[1] * width
