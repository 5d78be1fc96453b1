"""Scores of `prune_tokens` at the ends of float32: rows that are long, short, zero or infinite, and equal queries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bridge_stg.ops import backends, prune_tokens, score_tokens

ON_CPU = [row.name for row in backends() if row.op == "prune_tokens" and row.usable and row.name != "triton"]


def far_rows():
    """Tokens whose squares over- and underflow float32 in all but one row, their factors, and queries."""
    generator = torch.Generator().manual_seed(4)
    factors = torch.tensor([1e-38, 1e-30, 1e-25, 1e-12, 1.0, 1e12, 1e20, 1e30, 1e37])[:, None]
    return torch.randn(2, 9, 20, generator=generator) * factors, factors, torch.randn(2, 5, 20, generator=generator)


@pytest.mark.parametrize("reduce", ["max", "mean", "logsumexp"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_cosine_of_rows_beyond_the_range_of_squares(backend, reduce):
    tokens, factors, queries = far_rows()
    found = []
    for wide in (False, True):
        leaves = [x.double() if wide else x for x in (tokens, queries)]
        x, q = (leaf.requires_grad_() for leaf in leaves)
        options: dict[str, Any] = {"scoring": "cosine", "reduce": reduce, "scale": 0.7, "return_scores": True}
        result = prune_tokens(x, q, 7, **options, backend="reference" if wide else backend)
        loss = (result.scores * torch.linspace(-1, 1, 9)).sum() + result.score.square().sum()
        d_x, d_q = torch.autograd.grad(loss, (x, q))
        found.append((result.score, result.scores, d_x * factors, d_q))
        assert result.index.shape == (2, 7)
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


def test_zero_rows_score_zero_without_a_gradient():
    tokens, queries = torch.zeros(1, 3, 4), torch.ones(1, 2, 4)
    tokens[0, 1] = 1e-45  # the smallest there is: not zero
    for backend in ("reference", None):
        x = tokens.clone().requires_grad_()
        scores = prune_tokens(x, queries, 3, scoring="cosine", return_scores=True, backend=backend).scores
        torch.testing.assert_close(scores, torch.tensor([[0.0, 2.0, 0.0]]))
        scores[0, 0].backward()
        assert not x.grad.any()


@pytest.mark.parametrize("scoring", ["dot", "cosine"])
@pytest.mark.parametrize("count", [2, 3, 5, 8, 17])
def test_equal_queries_leave_the_gradient_to_the_lowest(scoring, count):
    """A matrix product rounds by the place of a column, which would share the wins of one query at random."""
    tokens = torch.randn(2, 33, 100)
    queries = torch.randn(2, 1, 100).repeat(1, count, 1)
    for backend in ("reference", None):
        q = queries.clone().requires_grad_()
        prune_tokens(tokens, q, 9, scoring=scoring, backend=backend).score.sum().backward()
        assert q.grad[:, 0].any() and not q.grad[:, 1:].any()
    q = queries.clone().requires_grad_()
    score_tokens(tokens, q, scoring=scoring).sum().backward()
    assert not q.grad[:, 1:].any()


@pytest.mark.parametrize("scoring", ["dot", "cosine"])
@pytest.mark.parametrize("reduce", ["max", "mean", "logsumexp"])
def test_infinities_and_nan_score_alike_on_every_backend(scoring, reduce):
    values = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, math.inf, -math.inf, math.nan])
    generator = torch.Generator().manual_seed(0)
    tokens, queries = (values[torch.randint(0, 8, (40, n, 3), generator=generator)] for n in (6, 3))
    tokens[:20], queries[10:30] = tokens[:20].nan_to_num(0.25, 1.0, -1.0), queries[10:30].nan_to_num(0.25, 1.0, -1.0)
    options: dict[str, Any] = {"scoring": scoring, "reduce": reduce, "return_scores": True}
    found, expected = (prune_tokens(tokens, queries, 3, **options, backend=name) for name in (None, "reference"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_mean_folds_the_queries_before_the_product():
    """An infinite token meets the mean of the queries: the mean of its products would be inf - inf."""
    tokens, queries = torch.tensor([[[math.inf, 0.0]]]), torch.tensor([[[2.0, 1.0], [-1.0, 1.0]]])
    for backend in ("reference", None):
        assert prune_tokens(tokens, queries, 1, reduce="mean", backend=backend).score.tolist() == [[math.inf]]
