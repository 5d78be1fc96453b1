"""`QueryGuidedTokenPruner`: learned scoring of visual tokens against bridging queries over `ops.prune_tokens`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import prune_tokens, score_tokens
from ..ops.prune_tokens import Reduce, Scoring


class GatedTokens(NamedTuple):
    """What `QueryGuidedTokenPruner` keeps.

    Attributes:
        tokens: [B, k, token_dim] kept tokens, in their original order.
        index: [B, k] int64 positions in 0..N-1, ascending.
        score: [B, k] float32 scores; -inf for a masked pick.
        log_gate: [B, k] float32 log sigmoid(score + gate_bias), to be added to attention scores.
        scores: [B, N] float32 scores of all tokens, or None where they were not asked for.
    """

    tokens: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index on purpose
    score: Tensor
    log_gate: Tensor
    scores: Tensor | None


class QueryGuidedTokenPruner(nn.Module):
    """Keeps the tokens that a learned bilinear score ranks highest, and gates them differentiably.

    score[b, n] = reduce_q((W_q g_q) . (W_f x_n) / sqrt(score_dim)). W_f is folded into the few queries at run
    time, so that no projected copy of the tokens is written.

    Args:
        token_dim: width of the tokens.
        query_dim: width of the queries.
        score_dim: width of the space they are compared in.
        keep: a float in (0, 1] is the share of tokens to keep, ceil(keep * N); an int >= 1 is their number,
            all of them where a segment has fewer.
        scoring, reduce: as in `ops.prune_tokens`.

    Raises:
        ValueError: `keep` out of range.
    """

    def __init__(
        self,
        token_dim: int,
        query_dim: int,
        score_dim: int = 256,
        keep: float = 0.25,
        *,
        scoring: Scoring = "dot",
        reduce: Reduce = "max",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(keep, bool) or (keep < 1 if isinstance(keep, int) else not 0.0 < keep <= 1.0):
            raise ValueError(f"keep must be a share in (0, 1] or an int of at least 1, got {keep!r}.")
        self.keep = keep
        self.score_dim = score_dim
        self.scoring: Scoring = scoring
        self.reduce: Reduce = reduce
        self.query_proj = nn.Linear(query_dim, score_dim, bias=False, device=device, dtype=dtype)
        self.token_proj = nn.Linear(token_dim, score_dim, bias=False, device=device, dtype=dtype)
        self.gate_bias = nn.Parameter(torch.zeros((), device=device, dtype=dtype))

    def keep_count(self, size: int) -> int:
        """Tokens kept of a segment of `size`."""
        if isinstance(self.keep, int):
            return min(self.keep, size)
        # 0.07 * 100 is 7.000000000000001 in binary, and must still be 7.
        return max(1, math.ceil(self.keep * size - 1e-9))

    def forward(
        self, tokens: Tensor, queries: Tensor, mask: Tensor | None = None, *, return_scores: bool = False
    ) -> GatedTokens:
        """Keep the best tokens of each segment.

        Args:
            tokens: [B, N, token_dim].
            queries: [B', Q, query_dim], where B' divides B: with B = clips x frames in this order, B' may be the
                number of clips, whose queries then serve all of its frames.
            mask: [B, N] bool, True for a token that takes part; None for all.
            return_scores: whether the scores of all tokens are wanted, for a loss on them; they are computed once.

        Raises:
            ValueError: B' does not divide B; what `ops.prune_tokens` raises.
        """
        keep = self.keep_count(tokens.shape[1])
        query = self._token_space(queries, tokens.shape[0])
        scores = None
        if return_scores:
            kept, index, score, scores = prune_tokens(
                tokens, query, keep, scoring=self.scoring, reduce=self.reduce, mask=mask, return_scores=True
            )
        else:
            kept, index, score = prune_tokens(tokens, query, keep, scoring=self.scoring, reduce=self.reduce, mask=mask)
        return GatedTokens(kept, index, score, F.logsigmoid(score + self.gate_bias), scores)

    def scores(self, tokens: Tensor, queries: Tensor) -> Tensor:
        """Scores [B, N] float32 of all tokens, without selecting; arguments as in `forward`."""
        query = self._token_space(queries, tokens.shape[0])
        return score_tokens(tokens, query, scoring=self.scoring, reduce=self.reduce)

    def _token_space(self, queries: Tensor, batch: int) -> Tensor:
        """Queries [B', Q, query_dim] -> (W_q g) W_f / sqrt(score_dim), [B, Q, token_dim]."""
        if queries.dim() != 3 or (batch and (not len(queries) or batch % len(queries))):
            raise ValueError(
                f"queries must have shape [B', Q, query_dim] with B' dividing the {batch} segments of the tokens, "
                f"got {list(queries.shape)}."
            )
        # Not under autocast: rounding the queries to bfloat16 would flip selections.
        with torch.autocast(queries.device.type, enabled=False):
            projected = self.query_proj(queries.to(self.query_proj.weight.dtype))
            query = projected @ (self.token_proj.weight / math.sqrt(self.score_dim))
        if len(query) == batch:
            return query
        repeat = batch // max(len(query), 1)
        return query[:, None].expand(-1, repeat, -1, -1).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"keep={self.keep}, scoring={self.scoring!r}, reduce={self.reduce!r}"
