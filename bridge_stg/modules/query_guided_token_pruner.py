"""`QueryGuidedTokenPruner`: learned scoring of visual tokens against bridging queries over `ops.prune_tokens`."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import prune_tokens, score_tokens
from ..ops.core.checks import BOOLEAN, FLOATING, Expect, check_choice, check_integer, check_number, check_tensors
from ..ops.core.modes import without_autocast
from ..ops.prune_tokens.reference import gather_rows
from ..ops.prune_tokens.scoring import REDUCES, SCORINGS, Reduce, Scoring, inverse_norm, row_magnitude, score_dtype
from ._linear import check_like_weight, input_dtype, weight_obstacle

Gate = Literal["soft", "straight_through"]
Budget = Literal["frame", "clip"]


class GatedTokens(NamedTuple):
    """The tokens that `QueryGuidedTokenPruner` keeps.

    Attributes:
        tokens: [B, k, token_dim] kept tokens, in their original order; [B', k, token_dim] under a budget per clip, and
            so on below.
        index: [B, k] int64 positions in 0..N-1, ascending; under a budget per clip in 0..F*N-1, where F = B / B' is
            the number of frames: frame index // N, token index % N.
        score: [B, k] float32 scores; -inf for a masked pick.
        log_gate: [B, k] float32, to be added to attention scores: log sigmoid(score + gate_bias), or with
            straight-through 0 with the gradient of that; -inf for a masked pick.
        scores: [B, N] float32 scores of all tokens ([B', F*N] under a budget per clip), or None if they were not asked
            for.
    """

    tokens: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index on purpose
    score: Tensor
    log_gate: Tensor
    scores: Tensor | None


class QueryGuidedTokenPruner(nn.Module):
    """Keeps the tokens that a learned bilinear score ranks highest, and gates them differentiably.

    score[b, n] = reduce_q((W_q g_q) . (W_f x_n) / sqrt(score_dim)). W_f is folded into the few queries at run
    time, so that no projected copy of the tokens is written. If `token_proj` does more than multiply by its weight (an
    adapter, a quantised or parametrized layer, hooks such as those of offloading), it is called with the tokens
    instead. Global module hooks, which profilers set, do not count.

    Args:
        token_dim: width of the tokens.
        query_dim: width of the queries.
        score_dim: width of the space in which they are compared.
        keep: a float in (0, 1] is the share of tokens to keep, ceil(keep * N); an int >= 1 is their number,
            all of them where a segment has fewer.
        scoring, reduce: as in `ops.prune_tokens`.
        budget: "frame" keeps as many tokens of every segment; "clip" lets the segments that share queries compete
            for the tokens of all of them.
        noise: scale of the Gumbel noise that is added to the scores before they select, in training mode only: the
            kept set is then a sample without replacement from softmax(score / noise) (Gumbel-top-k; Kool, van Hoof
            and Welling, 2019). Scores and gate stay without noise. 0 for none.
        gate: "soft", or "straight_through" for a gate that is open in the forward pass and has the gradient of the
            soft one in the backward pass (Bengio, Leonard and Courville, 2013).

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or `scoring`, `reduce`, `budget` or
            `gate` is unknown.
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
        budget: Budget = "frame",
        noise: float = 0.0,
        gate: Gate = "soft",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for width, size in {"token_dim": token_dim, "query_dim": query_dim, "score_dim": score_dim}.items():
            check_integer(name, width, size, 1)
        check_choice(name, "scoring", scoring, SCORINGS)
        check_choice(name, "reduce", reduce, REDUCES)
        noise = check_number(name, "noise", noise)
        if not (math.isfinite(noise) and noise >= 0):
            raise ValueError(f"noise must be a finite number of at least 0, got {noise!r}.")
        if budget not in ("frame", "clip"):
            raise ValueError(f"budget must be 'frame' or 'clip', got {budget!r}.")
        if gate not in ("soft", "straight_through"):
            raise ValueError(f"gate must be 'soft' or 'straight_through', got {gate!r}.")
        if dtype is not None and dtype not in FLOATING:
            raise TypeError(f"{name}: dtype must be floating point, got {dtype}.")
        self.token_dim = token_dim
        self.query_dim = query_dim
        self.keep = _checked_keep(keep)
        self.score_dim = score_dim
        self.scoring: Scoring = scoring
        self.reduce: Reduce = reduce
        self.budget: Budget = budget
        self.noise = noise
        self.gate: Gate = gate
        self.query_proj = nn.Linear(query_dim, score_dim, bias=False, device=device, dtype=dtype)
        self.token_proj = nn.Linear(token_dim, score_dim, bias=False, device=device, dtype=dtype)
        self.gate_bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gate_bias)

    def keep_count(self, size: int) -> int:
        """The number of tokens that are kept of a segment of `size` tokens."""
        # `sym_min` and `sym_max` put no guard on a size that is traced.
        if isinstance(self.keep, int):
            return cast(int, torch.sym_min(self.keep, size))
        # 0.07 * 100 is 7.000000000000001 in binary, and must still be 7.
        return cast(int, torch.sym_min(torch.sym_max(1, math.ceil(self.keep * size - 1e-9)), size))

    def forward(
        self, tokens: Tensor, queries: Tensor, mask: Tensor | None = None, *, return_scores: bool = False
    ) -> GatedTokens:
        """Keep the best tokens of each segment.

        Args:
            tokens: [B, N, token_dim].
            queries: [B', Q, query_dim], where B' divides B: with B = clips x frames in this order, B' may be the
                number of clips, whose queries then serve all of its frames.
            mask: [B, N] bool, True for a token that takes part; None for all.
            return_scores: whether to return the scores of all tokens too, for a loss on them.

        Raises:
            TypeError, ValueError: a tensor has the wrong dtype, shape or device, B' does not divide B, or what
                `ops.prune_tokens` raises.
        """
        self._check(tokens, queries, mask)
        clips = queries.shape[0]
        compared, query, scoring = self._compared(tokens, queries)
        if self.budget == "clip" and clips != tokens.shape[0]:
            one = compared is tokens
            tokens, compared = (x.unflatten(0, (clips, -1)).flatten(1, 2) for x in (tokens, compared))
            compared = tokens if one else compared
            mask = None if mask is None else mask.unflatten(0, (clips, -1)).flatten(1, 2)
        else:
            query = self._expand(query, tokens.shape[0])
        keep = self.keep_count(tokens.shape[1])
        scores, drawn, reduce = None, mask, self.reduce
        if self.training and self.noise > 0:
            scores = score_tokens(compared, query, scoring=scoring, reduce=reduce)
            drawn = self._draw(scores.detach(), keep, mask)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
        if return_scores and scores is None:
            kept, index, score, scores = prune_tokens(
                compared, query, keep, scoring=scoring, reduce=reduce, mask=drawn, return_scores=True
            )
        else:
            kept, index, score = prune_tokens(compared, query, keep, scoring=scoring, reduce=reduce, mask=drawn)
        if compared is not tokens:
            kept = gather_rows(tokens, index)
        log_gate = F.logsigmoid(score + self.gate_bias)
        if self.gate == "straight_through":
            hidden = log_gate == -torch.inf
            log_gate = (log_gate - log_gate.detach()).masked_fill(hidden, -torch.inf)
        return GatedTokens(kept, index, score, log_gate, scores if return_scores else None)

    def scores(self, tokens: Tensor, queries: Tensor) -> Tensor:
        """Scores [B, N] float32 of all tokens, without selecting; arguments as in `forward`."""
        self._check(tokens, queries, None)
        compared, query, scoring = self._compared(tokens, queries)
        return score_tokens(compared, self._expand(query, tokens.shape[0]), scoring=scoring, reduce=self.reduce)

    def _check(self, tokens: Tensor, queries: Tensor, mask: Tensor | None) -> None:
        sizes = check_tensors(
            type(self).__name__,
            Expect("tokens", tokens, f"B N {self.token_dim}", FLOATING),
            Expect("queries", queries, f"B' Q {self.query_dim}", FLOATING),
            Expect("mask", mask, "B N", BOOLEAN, optional=True),
        )
        batch, clips = sizes["B"], sizes["B'"]
        if batch != clips and (clips == 0 or batch % clips):
            raise ValueError(
                f"queries must have shape [B', Q, query_dim] with B' dividing the {batch} segments of the tokens, "
                f"got {list(queries.shape)}."
            )

    def _draw(self, scores: Tensor, keep: int, mask: Tensor | None) -> Tensor:
        """Mask [B, N] of `keep` tokens drawn by noisy scores, or of all unmasked ones if those are fewer."""
        gumbel = -torch.empty_like(scores).exponential_().log()
        noisy = (scores + self.noise * gumbel).nan_to_num(nan=-torch.inf)
        if mask is not None:
            noisy = noisy.masked_fill(~mask, -torch.inf)
        drawn = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, noisy.topk(keep, dim=1).indices, True)
        return drawn if mask is None else drawn & mask

    def _compared(self, tokens: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Scoring]:
        """Tokens [B, N, D] and queries [B', Q, D] whose products are the scores, and how to score them.

        If `token_proj` only multiplies by its weight, the tokens are the given ones and the queries contain W_f.
        """
        # Not under autocast: rounding the queries to bfloat16 would flip selections.
        with without_autocast(queries.device.type):
            queries = queries.to(input_dtype(self.query_proj, queries))
            if weight_obstacle(self.query_proj) is None:
                check_like_weight(type(self).__name__, self.query_proj.weight, queries=queries)
            query = self.query_proj(queries)
            if weight_obstacle(self.token_proj) is None and self.token_proj.bias is None:
                check_like_weight(type(self).__name__, self.token_proj.weight, queries=query)
                return tokens, query @ (self.token_proj.weight / math.sqrt(self.score_dim)), self.scoring
            projected = self.token_proj(tokens.to(input_dtype(self.token_proj, tokens)))
            if self.scoring == "cosine":  # divide by the norm of the token itself
                x = tokens.to(score_dtype(tokens, projected))
                magnitude = row_magnitude(x)
                projected = projected.to(x.dtype) / magnitude * inverse_norm(x / magnitude)[..., None]
            return projected, query / math.sqrt(self.score_dim), "dot"

    @staticmethod
    def _expand(query: Tensor, batch: int) -> Tensor:
        """Repeat each of the queries [B', Q, D] for its B / B' segments."""
        clips = query.shape[0]
        if clips == batch:
            return query
        return query[:, None].expand(-1, batch // clips, -1, -1).flatten(0, 1)

    def extra_repr(self) -> str:
        options = ("keep", "scoring", "reduce", "budget", "noise", "gate")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)


def _checked_keep(keep: float) -> int | float:
    rule = f"keep must be a share in (0, 1] or an int of at least 1, got {keep!r}."
    if not isinstance(keep, Real):
        raise TypeError(rule)
    if isinstance(keep, bool) or (keep < 1 if isinstance(keep, Integral) else not 0.0 < keep <= 1.0):
        raise ValueError(rule)
    return int(keep) if isinstance(keep, Integral) else float(keep)
