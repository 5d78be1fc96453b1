"""`prune_tokens`: its scores, its total order, its gradients, its messages."""

from __future__ import annotations

import math
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from bridge_stg.triton_kernels.prune_tokens.records import ScoreOptions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bridge_stg.ops import prune_tokens, score_tokens
from bridge_stg.ops.prune_tokens.reference import reference, select_tokens

OPTIONS = list(product(("dot", "cosine"), ("max", "mean", "logsumexp")))


def naive_scores(tokens: Tensor, queries: Tensor, scoring: str, reduce: str, scale: float) -> np.ndarray:
    """The definition in float64, token by token."""
    batch, size, _ = tokens.shape
    x, q = tokens.double().numpy(), queries.double().numpy()
    scores = np.empty((batch, size))
    for b, n in product(range(batch), range(size)):
        row = x[b, n]
        if scoring == "cosine":
            norm = math.sqrt(float((row**2).sum()))
            row = row / norm if norm else row
        products = [scale * float(query @ row) for query in q[b]]
        if reduce == "max":
            scores[b, n] = max(products)
        elif reduce == "mean":
            scores[b, n] = sum(products) / len(products)
        else:
            top = max(products)
            scores[b, n] = top + math.log(sum(math.exp(p - top) for p in products))
    return scores


def naive_selection(scores: np.ndarray, keep: int, mask: np.ndarray | None = None) -> list[int]:
    """Ascending picks of one segment, by sorting on (class, score, index)."""

    def rank(n: int) -> tuple[int, float, int]:
        if mask is not None and not mask[n]:
            return (2, 0.0, n)
        return (1, 0.0, n) if math.isnan(scores[n]) else (0, -float(scores[n]), n)

    return sorted(sorted(range(len(scores)), key=rank)[:keep])


@pytest.mark.parametrize(("scoring", "reduce"), OPTIONS)
def test_matches_float64_formulation(scoring, reduce):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 17, 8, generator=generator)
    queries = torch.randn(3, 4, 8, generator=generator)
    kept, index, score = prune_tokens(tokens, queries, 5, scoring=scoring, reduce=reduce, scale=0.3)
    expected = naive_scores(tokens, queries, scoring, reduce, 0.3)
    assert score.dtype == torch.float32 and index.dtype == torch.int64
    for b in range(3):
        assert index[b].tolist() == naive_selection(expected[b], 5)
        torch.testing.assert_close(kept[b], tokens[b, index[b]], rtol=0, atol=0)
        np.testing.assert_allclose(score[b].numpy(), expected[b][index[b].numpy()], rtol=1e-5, atol=1e-6)


values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf]), st.integers(-3, 3).map(float)
)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), size=st.integers(1, 12))
def test_total_order(data, size):
    scores = data.draw(st.lists(values, min_size=size, max_size=size))
    mask = data.draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=size, max_size=size)))
    keep = data.draw(st.integers(1, size))
    picked = select_tokens(torch.tensor([scores]), keep, None if mask is None else torch.tensor([mask]))
    expected = naive_selection(np.array(scores), keep, None if mask is None else np.array(mask))
    assert picked[0].tolist() == expected


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    size=st.integers(1, 9),
    queries=st.integers(1, 4),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_integer_inputs_select_exactly(batch, size, queries, width, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-2, 3, (batch, size, width), generator=generator).to(dtype)
    query = torch.randint(-2, 3, (batch, queries, width), generator=generator).to(dtype)
    keep = int(torch.randint(1, size + 1, (), generator=generator))
    scores = naive_scores(tokens.float(), query.float(), "dot", "max", 1.0)
    result = prune_tokens(tokens, query, keep)
    assert result.tokens.dtype == dtype and result.score.dtype == torch.float32
    for b in range(batch):
        assert result.index[b].tolist() == naive_selection(scores[b], keep)
        assert result.score[b].tolist() == scores[b][result.index[b].numpy()].tolist()


def test_masked_picks_come_last_with_score_minus_infinity():
    tokens = torch.tensor([[[5.0], [1.0], [4.0], [2.0]]])
    mask = torch.tensor([[False, True, False, True]])
    result = prune_tokens(tokens, torch.ones(1, 1, 1), 3, mask=mask, return_scores=True)
    assert result.index.tolist() == [[0, 1, 3]]
    assert result.score.tolist() == [[-math.inf, 1.0, 2.0]]
    assert result.tokens.flatten().tolist() == [5.0, 1.0, 2.0]
    assert result.scores.tolist() == [[-math.inf, 1.0, -math.inf, 2.0]]


def test_all_masked_keeps_the_first_tokens():
    mask = torch.zeros(1, 4, dtype=torch.bool)
    result = prune_tokens(torch.randn(1, 4, 2), torch.randn(1, 1, 2), 2, mask=mask)
    assert result.index.tolist() == [[0, 1]] and result.score.isneginf().all()


def test_nan_and_garbage_in_masked_tokens_reach_no_gradient():
    tokens = torch.randn(1, 5, 3)
    tokens[0, 1] = math.nan
    tokens[0, 3] = math.inf
    tokens.requires_grad_()
    queries = torch.randn(1, 2, 3, requires_grad=True)
    mask = torch.tensor([[True, False, True, False, True]])
    for dense in (False, True):
        result: Any = prune_tokens(tokens, queries, 5, scoring="cosine", mask=mask, return_scores=dense)
        scores = result.scores if dense else result.score
        loss = scores.masked_fill(scores.isneginf(), 0.0).sum()
        gradients = torch.autograd.grad(loss, (tokens, queries))
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert (gradients[0][0, [1, 3]] == 0).all()


def test_zero_token_scores_zero_in_cosine_without_gradient():
    tokens = torch.zeros(1, 2, 3, requires_grad=True)
    queries = torch.ones(1, 1, 3, requires_grad=True)
    score = prune_tokens(tokens, queries, 2, scoring="cosine").score
    assert score.tolist() == [[0.0, 0.0]]
    for gradient in torch.autograd.grad(score.sum(), (tokens, queries)):
        assert gradient.abs().sum() == 0


def test_tied_queries_send_the_gradient_to_the_lowest():
    tokens = torch.ones(1, 2, 3)
    for function in (prune_tokens, partial(reference, options=ScoreOptions())):
        queries = torch.ones(1, 3, 3, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(tokens, queries, 2)[2].sum(), queries)
        assert gradient[0].tolist() == [[2.0] * 3, [0.0] * 3, [0.0] * 3]


@pytest.mark.parametrize(("scoring", "reduce"), OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(scoring, reduce, masked):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator).requires_grad_()
    queries = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator).requires_grad_()
    mask = torch.tensor([[True, False, True, True, False, True], [False] * 5 + [True]]) if masked else None

    def pruned(tokens, queries):
        kept, _, score, scores = prune_tokens(
            tokens, queries, 3, scoring=scoring, reduce=reduce, scale=0.7, mask=mask, return_scores=True
        )
        return kept, score.masked_fill(score.isneginf(), 0.0), scores.masked_fill(scores.isneginf(), 0.0)

    assert torch.autograd.gradcheck(pruned, (tokens, queries))
    assert torch.autograd.gradcheck(lambda *x: pruned(*x)[:2], (tokens, queries))


@pytest.mark.parametrize(("scoring", "reduce"), OPTIONS)
def test_gradients_match_the_reference_under_autograd(scoring, reduce):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(2, 9, 4, generator=generator).requires_grad_()
    queries = torch.randn(2, 3, 4, generator=generator).requires_grad_()
    ours = partial(prune_tokens, scoring=scoring, reduce=reduce, scale=0.5)
    results = []
    for function in (ours, partial(reference, options=ScoreOptions(scoring, reduce, 0.5))):
        kept, _, score = function(tokens, queries, 4)[:3]
        loss = (kept.square().sum() + score.square().sum()) if scoring == "dot" else score.square().sum()
        results.append(torch.autograd.grad(loss, (tokens, queries)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dense_scores_are_those_of_score_tokens_with_the_same_gradient():
    tokens, queries = torch.randn(2, 8, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    dense = prune_tokens(tokens, queries, 3, scoring="cosine", return_scores=True).scores
    alone = score_tokens(tokens, queries, scoring="cosine")
    torch.testing.assert_close(dense, alone)
    ours = torch.autograd.grad(dense.square().sum(), (tokens, queries))
    theirs = torch.autograd.grad(alone.square().sum(), (tokens, queries))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_only_needed_gradients_are_made():
    tokens, queries = torch.randn(1, 4, 2), torch.randn(1, 1, 2, requires_grad=True)
    result = prune_tokens(tokens, queries, 2)
    assert not result.index.requires_grad
    (result.tokens.sum() + result.score.sum()).backward()
    assert tokens.grad is None and queries.grad is not None


def test_gradient_of_the_gradient_is_refused():
    tokens = torch.randn(1, 4, 2, requires_grad=True)
    score = prune_tokens(tokens, torch.randn(1, 1, 2), 2).score
    (gradient,) = torch.autograd.grad(score.sum(), tokens, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


def test_strides_do_not_matter():
    tokens, queries = torch.randn(2, 7, 6), torch.randn(1, 3, 6)
    permuted = tokens.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    expanded = queries.expand(2, -1, -1)
    ours = prune_tokens(permuted, expanded, 3)
    theirs = prune_tokens(tokens, expanded.contiguous(), 3)
    assert torch.equal(ours.index, theirs.index) and torch.equal(ours.tokens, theirs.tokens)
    assert ours.tokens.is_contiguous()


def test_keep_all_and_empty_batch():
    tokens, queries = torch.randn(2, 5, 3), torch.randn(2, 2, 3)
    everything = prune_tokens(tokens, queries, 5)
    assert torch.equal(everything.tokens, tokens)
    assert everything.tokens.data_ptr() != tokens.data_ptr()
    nothing = prune_tokens(tokens[:0], queries[:0], 3)
    assert nothing.tokens.shape == (0, 3, 3) and nothing.score.shape == (0, 3)


def test_low_precision_scores_accumulate_in_float32():
    # 1 + 2^-10 summed 512 times: bfloat16 accumulation would lose the small terms.
    tokens = torch.full((1, 2, 512), 1.0, dtype=torch.bfloat16)
    tokens[0, 1, 0] = 1.0078125
    score = prune_tokens(tokens, torch.ones(1, 1, 512, dtype=torch.bfloat16), 2).score
    assert score.tolist() == [[512.0, 512.0078125]]


def test_float32_queries_may_meet_half_tokens():
    tokens = torch.randn(1, 6, 4, dtype=torch.bfloat16, requires_grad=True)
    queries = torch.randn(1, 2, 4, requires_grad=True)
    result = prune_tokens(tokens, queries, 2)
    loss = result.tokens.float().sum() + result.score.sum()
    gradients = torch.autograd.grad(loss, (tokens, queries))
    assert result.tokens.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32]


def test_deterministic():
    tokens, queries = torch.randn(4, 50, 16, requires_grad=True), torch.randn(4, 5, 16, requires_grad=True)

    def once():
        result = prune_tokens(tokens, queries, 20, reduce="logsumexp", return_scores=True)
        loss = result.tokens.sum() + result.score.exp().sum() + result.scores.sum()
        return [*result, *torch.autograd.grad(loss, (tokens, queries))]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def call(**changes):
    arguments: dict[str, Any] = {
        "tokens": torch.zeros(2, 6, 4),
        "queries": torch.zeros(2, 3, 4),
        "keep": 2,
    } | changes
    return prune_tokens(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keep": 0}, ValueError, "keep must be in 1..6 (tokens per segment), got 0."),
        ({"keep": 7}, ValueError, "keep must be in 1..6 (tokens per segment), got 7."),
        ({"keep": 2.0}, TypeError, "keep must be an int, got float."),
        ({"keep": True}, TypeError, "keep must be an int, got bool."),
        ({"tokens": torch.zeros(6, 4)}, ValueError, "tokens must have shape [B, N, D], got 2 axes [6, 4]."),
        ({"tokens": torch.zeros(2, 6, 4).int()}, TypeError, "got torch.int32."),
        ({"tokens": [1.0]}, TypeError, "tokens must be a tensor, got list."),
        (
            {"queries": torch.zeros(2, 3, 5)},
            ValueError,
            "queries must have shape [B, Q, D] with D=4 (from tokens), got [2, 3, 5].",
        ),
        ({"queries": torch.zeros(2, 0, 4)}, ValueError, "the number of queries must be at least 1, got 0."),
        (
            {"queries": torch.zeros(2, 3, 4, device="meta")},
            ValueError,
            "must be on the device of tokens (cpu)",
        ),
        ({"mask": torch.zeros(2, 6)}, TypeError, "mask must be torch.bool, got torch.float32."),
        ({"mask": torch.zeros(2, 5).bool()}, ValueError, "with N=6 (from tokens), got [2, 5]."),
        (
            {"mask": torch.tensor([[True] * 6, [False] * 6]), "validate": True},
            ValueError,
            "mask must leave at least one token in every segment, got none in segment 1.",
        ),
        ({"scoring": "l2"}, ValueError, "scoring must be one of 'dot', 'cosine', got 'l2'."),
        ({"reduce": "sum"}, ValueError, "reduce must be one of 'max', 'mean', 'logsumexp', got 'sum'."),
        ({"scale": "1"}, TypeError, "scale must be a number, got str."),
        ({"backend": "abacus"}, ValueError, "prune_tokens has no backend 'abacus'; it has"),
    ],
)
def test_misuse_is_a_sentence(changes, error, message):
    with pytest.raises(error) as caught:
        call(**changes)
    assert message in str(caught.value)
    assert str(caught.value).startswith("prune_tokens")
