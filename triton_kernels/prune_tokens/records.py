"""The records that the prune ops hand to their backends; the C++ of `csrc/prune_tokens` has the same ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ScoreOptions:
    """How tokens are scored.

    Attributes:
        scoring: "dot" or "cosine".
        reduce: how the scores of the queries become one: "max", "mean" or "logsumexp".
        scale: factor on every product.
        masked: whether there is a mask; a masked token has the score -inf and no gradient of it.
    """

    scoring: str = "dot"
    reduce: str = "max"
    scale: float = 1.0
    masked: bool = False

    @property
    def cosine(self) -> bool:
        """Whether products are divided by the norm of the token."""
        return self.scoring == "cosine"


@dataclass(frozen=True)
class PruneBackward:
    """What the backward of `prune_tokens` or `prune_tokens_varlen` reads, and which gradients it computes.

    Shapes are those of `prune_tokens`; in brackets those of packed segments.

    Attributes:
        grad_kept, grad_score: gradients of `kept` and of its scores, or None.
        kept: [B, k, D] ([capacity, D]) the kept tokens.
        index: [B, k] ([capacity]) int64 positions of the kept tokens, ascending; -1 at the end of packed ones.
        queries: [B, Q, D] ([S, Q, D]).
        token_count: N (R).
        options: how the tokens were scored.
        need_tokens, need_queries: whether the gradient of the tokens and that of the queries is asked for.
        score: [B, k] scores of the kept tokens, read where there is a mask; None for packed segments, which have none.
        tokens, scores, grad_scores: [B, N, D] all tokens, [B, N] their scores and the gradient of these; read where
            `grad_scores` is not None.
        cu_seqlens: [S + 1] where the packed segments begin; None for segments of equal length.
    """

    grad_kept: Tensor | None
    grad_score: Tensor | None
    kept: Tensor
    index: Tensor
    queries: Tensor
    token_count: int
    options: ScoreOptions
    need_tokens: bool
    need_queries: bool
    score: Tensor | None = None
    tokens: Tensor | None = None
    scores: Tensor | None = None
    grad_scores: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Shape of the tokens, and so of their gradient."""
        *segments, _, width = self.kept.shape
        return (*segments, self.token_count, width)

    def scored_rows(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The rows whose scores have a gradient, their scores and that gradient: all tokens, or the kept ones."""
        if self.grad_scores is None:
            return self.kept, self.score, self.grad_score
        assert self.tokens is not None, "the gradient of all scores needs all tokens"
        return self.tokens, self.scores, self.grad_scores
