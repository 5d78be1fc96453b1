"""`prune_tokens_varlen`: `prune_tokens` for packed segments of any length, with a budget in place of a fixed k.

Only the device knows how many tokens are kept: the result lies in a buffer of fixed capacity, with its count.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from ..core.backends import choose_backend
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
from ..core.modes import refuse_transforms
from .registration import varlen_op
from .scoring import Reduce, Scoring, check_scoring

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
    capacity = check_integer(op, "capacity", capacity, 1)
    validate = check_flag(op, "validate", validate) and not tokens.is_meta  # which has no values
    factor = check_scoring(op, sizes["Q"], scoring, reduce, scale)
    limit = _budget_tensor(budget, policy, segments, tokens.device)
    refuse_transforms(op, tokens, queries)
    if validate:
        _check_values(cu_seqlens, limit, policy, sizes["R"])
    chosen = choose_backend(op, backend, tokens.device.type, tokens=tokens, queries=queries)
    packed = PackedTokens(
        *cast(
            tuple[Tensor, ...],
            varlen_op(tokens, cu_seqlens, queries, limit, policy, capacity, scoring, reduce, factor, chosen),
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
