"""`prune_tokens_varlen`: what each policy keeps, how it is packed, its gradients, its messages."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from bridge_stg.triton_kernels.prune_tokens.records import ScoreOptions
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_stg.ops import prune_tokens, prune_tokens_varlen
from bridge_stg.ops.prune_tokens.varlen import Policy
from bridge_stg.ops.prune_tokens.varlen_reference import reference

POLICIES: tuple[Policy, ...] = ("per_segment", "per_clip", "top_p", "threshold")
BUDGETS: dict[Policy, Any] = {"per_segment": 2, "per_clip": 5, "top_p": 0.6, "threshold": 0.0}


def naive_rows(scores: list[float], cu_seqlens: list[int], budget, policy: str) -> list[int]:
    """Rows kept, by plain sorting."""

    def best_first(rows):
        return sorted(rows, key=lambda r: (math.isnan(scores[r]), -scores[r] if scores[r] == scores[r] else 0.0, r))

    if policy == "per_clip":
        return sorted(best_first(range(cu_seqlens[-1]))[:budget])
    kept = []
    for start, end in pairwise(cu_seqlens):
        rows = best_first(range(start, end))
        if policy == "per_segment":
            kept += rows[:budget]
        elif policy == "threshold":
            kept += [r for r in rows if scores[r] >= budget]
        else:
            rows = [r for r in rows if not math.isnan(scores[r])]
            shares = [1.0 if scores[r] == scores[rows[0]] else math.exp(scores[r] - scores[rows[0]]) for r in rows]
            total, reached = sum(shares), 0.0
            for row, share in zip(rows, shares, strict=True):
                if reached >= budget * total:
                    break
                kept.append(row)
                reached += share
    return sorted(kept)


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    policy=st.sampled_from(POLICIES),
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
)
def test_policies(data, policy, lengths):
    rows = sum(lengths)
    special = st.sampled_from([math.nan, math.inf, -math.inf])
    score = st.one_of(st.integers(-4, 4).map(float), special)
    scores = data.draw(st.lists(score, min_size=rows, max_size=rows))
    budget = data.draw(
        {
            "per_segment": st.integers(0, 6),
            "per_clip": st.integers(0, 12),
            # Not a share that sums of exact scores can hit: at equality either side of the bound is right.
            "top_p": st.sampled_from([0.1234567, 0.3456789, 0.6543217, 0.8765431]),
            "threshold": st.integers(-3, 3).map(float),
        }[policy]
    )
    capacity = data.draw(st.integers(1, rows + 3))
    offsets = [0, *np.cumsum(lengths).tolist()]
    # A single feature and a query of 1 make the score the token itself.
    result = prune_tokens_varlen(
        torch.tensor(scores).reshape(-1, 1),
        torch.tensor(offsets, dtype=torch.int32),
        torch.ones(len(lengths), 1, 1),
        budget,
        policy=policy,
        capacity=capacity,
        validate=capacity >= rows,
    )
    expected = naive_rows(scores, offsets, budget, policy)
    packed = expected[:capacity]
    padding = capacity - len(packed)
    assert result.count.item() == len(expected)
    assert result.index.tolist() == packed + [-1] * padding
    np.testing.assert_array_equal(result.score.numpy(), np.array([scores[r] for r in packed] + [0.0] * padding, "f4"))
    np.testing.assert_array_equal(result.tokens[:, 0].numpy(), result.score.numpy())
    starts = [sum(r < offset for r in expected) for offset in offsets]
    assert result.cu_seqlens_out.tolist() == [min(s, capacity) for s in starts]
    assert result.cu_seqlens_out.dtype == torch.int32


@pytest.mark.parametrize("scoring", ["dot", "cosine"])
@pytest.mark.parametrize("reduce", ["max", "mean", "logsumexp"])
def test_equal_segments_agree_with_prune_tokens(scoring, reduce):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 7, 4, generator=generator)
    queries = torch.randn(3, 2, 4, generator=generator)
    options: dict[str, Any] = {"scoring": scoring, "reduce": reduce, "scale": 0.6}
    dense = prune_tokens(tokens, queries, 3, **options)
    packed = prune_tokens_varlen(
        tokens.flatten(0, 1), torch.arange(0, 22, 7), queries, 3, policy="per_segment", capacity=9, **options
    )
    assert torch.equal(packed.index.view(3, 3), dense.index + torch.arange(0, 21, 7)[:, None])
    assert torch.equal(packed.tokens.view(3, 3, 4), dense.tokens)
    torch.testing.assert_close(packed.score.view(3, 3), dense.score)
    assert packed.cu_seqlens_out.tolist() == [0, 3, 6, 9] and packed.count.item() == 9


def test_budget_tensor_gives_each_segment_its_own():
    tokens = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0]).reshape(-1, 1)
    offsets, queries = torch.tensor([0, 3, 5]), torch.ones(1, 1, 1).expand(2, -1, -1)

    def kept(budget, policy):
        result = prune_tokens_varlen(tokens, offsets, queries, budget, policy=policy, capacity=5, validate=True)
        return [row for row in result.index.tolist() if row >= 0]

    assert kept(torch.tensor([2, 0]), "per_segment") == [0, 2]
    assert kept(torch.tensor(3, dtype=torch.int32), "per_clip") == [0, 3, 4]
    assert kept(torch.tensor([2.5, 4.5]), "threshold") == [0, 3]
    assert kept(torch.tensor([1.0, 0.5]), "top_p") == [0, 1, 2, 3]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scoring", ["dot", "cosine"])
@pytest.mark.parametrize("capacity", [3, 9])
def test_gradcheck(policy, scoring, capacity):
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(8, 3, dtype=torch.float64, generator=generator).requires_grad_()
    queries = torch.randn(3, 2, 3, dtype=torch.float64, generator=generator).requires_grad_()
    offsets = torch.tensor([0, 3, 3, 8])
    options: dict[str, Any] = {"policy": policy, "scoring": scoring, "scale": 0.7}
    options["reduce"] = {"per_segment": "max", "per_clip": "mean"}.get(policy, "logsumexp")

    def pruned(tokens, queries):
        result = prune_tokens_varlen(tokens, offsets, queries, BUDGETS[policy], capacity=capacity, **options)
        return result.tokens, result.score

    assert torch.autograd.gradcheck(pruned, (tokens, queries))


def test_gradients_match_the_reference_under_autograd():
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(9, 4, generator=generator).requires_grad_()
    queries = torch.randn(2, 3, 4, generator=generator).requires_grad_()
    offsets = torch.tensor([0, 4, 9])
    ours = prune_tokens_varlen(tokens, offsets, queries, 2, policy="per_segment", capacity=6, reduce="mean")
    theirs = reference(tokens, offsets, queries, torch.tensor(2), "per_segment", 6, ScoreOptions(reduce="mean"))
    gradients = [
        torch.autograd.grad(r[0].square().sum() + r[2].square().sum(), (tokens, queries)) for r in (ours, theirs)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_offsets_that_break_the_rule_stay_inside_the_tokens():
    tokens = torch.randn(4, 2, requires_grad=True)
    for offsets in ([0, 9, 2], [-5, 1, 4], [3, 2, 1], [0, 2, 3]):
        cu_seqlens = torch.tensor(offsets)
        for policy, budget in BUDGETS.items():
            result = prune_tokens_varlen(tokens, cu_seqlens, torch.ones(2, 1, 2), budget, policy=policy, capacity=4)
            assert result.index.max() < 4
            (result.tokens.sum() + result.score.sum()).backward()
        with pytest.raises(ValueError, match=r"cu_seqlens must ascend from 0 to 4 \(rows of tokens\), got"):
            prune_tokens_varlen(
                tokens, cu_seqlens, torch.ones(2, 1, 2), 1, policy="per_segment", capacity=4, validate=True
            )


def test_rows_behind_the_last_segment_are_not_kept():
    tokens = torch.tensor([1.0, 2.0, 9.0]).reshape(-1, 1)
    for policy, budget in BUDGETS.items():
        result = prune_tokens_varlen(
            tokens, torch.tensor([0, 2]), torch.ones(1, 1, 1), budget, policy=policy, capacity=3
        )
        assert 2 not in result.index.tolist()


def test_deterministic():
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randn(60, 8, generator=generator).requires_grad_()
    queries = torch.randn(3, 4, 8, generator=generator).requires_grad_()

    def once():
        result = prune_tokens_varlen(tokens, torch.tensor([0, 20, 33, 60]), queries, 0.7, policy="top_p", capacity=60)
        gradients = torch.autograd.grad(result.tokens.sum() + result.score.exp().sum(), (tokens, queries))
        return [*result, *gradients]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def call(**changes):
    arguments: dict[str, Any] = {
        "tokens": torch.zeros(6, 4),
        "cu_seqlens": torch.tensor([0, 2, 6]),
        "queries": torch.zeros(2, 3, 4),
        "budget": 1,
        "policy": "per_segment",
        "capacity": 6,
    } | changes
    return prune_tokens_varlen(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"tokens": torch.zeros(1, 6, 4)},
            ValueError,
            "tokens must have shape [R, D], got 3 axes [1, 6, 4].",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 6])},
            ValueError,
            "cu_seqlens must have shape [S + 1] with S=2 (from queries), got [2].",
        ),
        (
            {"cu_seqlens": torch.tensor([0.0, 2.0, 6.0])},
            TypeError,
            "cu_seqlens must be torch.int64 or torch.int32",
        ),
        ({"queries": torch.zeros(2, 3, 5)}, ValueError, "with D=4 (from tokens), got [2, 3, 5]."),
        (
            {"policy": "best"},
            ValueError,
            "policy must be one of 'per_segment', 'per_clip', 'top_p', 'threshold'",
        ),
        ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0."),
        ({"budget": -1}, ValueError, "budget must be at least 0, got -1."),
        ({"budget": 0.5}, TypeError, "budget must be an int, got float."),
        (
            {"budget": 1.5, "policy": "top_p"},
            ValueError,
            "budget must be in (0, 1] for policy 'top_p', got 1.5.",
        ),
        ({"budget": torch.tensor([1.0, 2.0])}, TypeError, "for policy 'per_segment', got torch.float32."),
        ({"budget": torch.tensor([1, 2, 3])}, ValueError, "budget must have shape [] or [2] for policy"),
        (
            {"budget": torch.tensor([1, 2]), "policy": "per_clip"},
            ValueError,
            "budget must have shape [] for policy",
        ),
        (
            {"budget": torch.tensor(1, device="meta")},
            ValueError,
            "budget must be on the device of tokens (cpu)",
        ),
        (
            {"budget": torch.tensor([1, -1]), "validate": True},
            ValueError,
            "budget must be at least 0, got -1.",
        ),
        (
            {"budget": torch.tensor([0.5, 0.0]), "policy": "top_p", "validate": True},
            ValueError,
            "budget must be in (0, 1] for policy 'top_p', got [0.5, 0.0].",
        ),
        (
            {"budget": 3, "capacity": 4, "validate": True},
            ValueError,
            "capacity must be at least the 5 tokens that were selected, got 4.",
        ),
        ({"backend": "native"}, ValueError, "prune_tokens_varlen has no backend 'native'"),
    ],
)
def test_misuse_is_a_sentence(changes, error, message):
    with pytest.raises(error) as caught:
        call(**changes)
    assert message in str(caught.value)
    assert str(caught.value).startswith("prune_tokens_varlen")
