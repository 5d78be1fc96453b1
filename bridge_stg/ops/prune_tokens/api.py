"""`prune_tokens`: score the tokens of each segment against a few queries, keep the best k in their order.

`reference.py` holds the definition in plain PyTorch, `registration.py` the registered op.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast, overload

from torch import Tensor

from ...triton_kernels.prune_tokens.records import ScoreOptions
from ..core.backends import choose_backend
from ..core.checks import BOOLEAN, FLOATING, Expect, check_flag, check_integer, check_tensors
from ..core.modes import refuse_transforms
from .reference import scores_of
from .registration import dense_op
from .scoring import Reduce, Scoring, check_scoring


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
    cosine, however long or short). "mean" averages the queries before the product, which is not the mean of the
    products where these are infinite. Scores are accumulated in float32 whatever the input dtype, because rounding to
    bfloat16 changes what is selected.

    Exactly `keep` tokens are selected by one total order: unmasked tokens by score (+0 equals -0), then
    unmasked tokens whose score is NaN, then masked tokens; ties go to the lower index. The order is that of the
    float32 scores, for float64 inputs too.

    Differentiable in `tokens` and `queries`, through the kept tokens and through `score`; once, not twice, and in
    reverse mode alone. With "max", a tie between queries sends the gradient to the lowest query. The score of a masked
    pick has no gradient. Forward and backward are bitwise reproducible on one device, and never wait for the device.

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
    factor = check_scoring(op, sizes["Q"], scoring, reduce, scale)
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
        dense_op(tokens, queries, keep, scoring, reduce, factor, mask, return_scores, chosen),
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
    factor = check_scoring(op, sizes["Q"], scoring, reduce, scale)
    return scores_of(tokens, queries, ScoreOptions(scoring, reduce, factor))
