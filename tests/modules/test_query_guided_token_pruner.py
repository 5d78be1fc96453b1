"""`QueryGuidedTokenPruner`: absorbed projections, gate, dense scores, shared queries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bridge_stg.modules import QueryGuidedTokenPruner


@pytest.fixture
def pruner():
    torch.manual_seed(0)
    pruner = QueryGuidedTokenPruner(12, 10, 8, keep=0.25)
    torch.nn.init.constant_(pruner.gate_bias, 0.3)
    return pruner


def tensors(batch=4, size=20, queries=3, clips=4):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, size, 12, generator=generator).requires_grad_(),
        torch.randn(clips, queries, 10, generator=generator).requires_grad_(),
    )


def test_score_is_the_product_of_the_projections(pruner):
    tokens, queries = tensors()
    result = pruner(tokens, queries)
    expected = (pruner.query_proj(queries) @ pruner.token_proj(tokens).transpose(1, 2) / math.sqrt(8)).amax(1)
    assert result.index.shape == (4, 5) and result.scores is None
    torch.testing.assert_close(pruner.scores(tokens, queries), expected)
    torch.testing.assert_close(result.score, expected.gather(1, result.index))
    torch.testing.assert_close(result.index, expected.topk(5).indices.sort().values)
    torch.testing.assert_close(result.log_gate, torch.nn.functional.logsigmoid(result.score + 0.3))
    assert torch.equal(result.tokens, tokens.gather(1, result.index[..., None].expand(-1, -1, 12)))


def test_dense_scores_cost_one_pass_and_train_everything(pruner):
    tokens, queries = tensors()
    leaves = (tokens, queries, *pruner.parameters())
    once = pruner(tokens, queries, return_scores=True)
    apart = pruner(tokens, queries)
    torch.testing.assert_close(once.scores, pruner.scores(tokens, queries))
    assert torch.equal(once.tokens, apart.tokens)

    def loss(result, scores):
        return result.tokens.square().sum() + result.log_gate.sum() + scores.square().mean()

    ours = torch.autograd.grad(loss(once, once.scores), leaves)
    theirs = torch.autograd.grad(loss(apart, pruner.scores(tokens, queries)), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_queries_of_a_clip_serve_its_frames(pruner):
    tokens, queries = tensors(batch=6, clips=2)
    shared = pruner(tokens, queries)
    repeated = pruner(tokens, queries.repeat_interleave(3, dim=0))
    assert torch.equal(shared.index, repeated.index)
    torch.testing.assert_close(shared.score, repeated.score)
    torch.testing.assert_close(pruner.scores(tokens, queries), pruner(tokens, queries, return_scores=True).scores)


def test_masked_tokens_are_gated_shut(pruner):
    tokens, queries = tensors()
    mask = torch.zeros(4, 20, dtype=torch.bool)
    mask[:, [2, 7]] = True
    result = pruner(tokens, queries, mask)
    assert all({2, 7} <= set(row) for row in result.index.tolist())
    kept = mask.gather(1, result.index)
    assert result.log_gate[~kept].isneginf().all() and result.log_gate[kept].isfinite().all()
    result.log_gate[kept].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in pruner.parameters())


@pytest.mark.parametrize(
    ("keep", "size", "count"),
    [(0.25, 20, 5), (0.07, 100, 7), (0.01, 20, 1), (1.0, 7, 7), (0.3, 7, 3), (4, 20, 4), (4, 3, 3)],
)
def test_keep_is_a_share_or_a_count(keep, size, count):
    pruner = QueryGuidedTokenPruner(12, 10, 8, keep)
    assert pruner.keep_count(size) == count
    tokens, queries = tensors(size=size)
    assert pruner(tokens, queries).tokens.shape == (4, count, 12)


def test_precision_of_selection_survives_autocast(pruner):
    tokens, queries = tensors()
    plain = pruner(tokens, queries)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = pruner(tokens, queries)
    assert torch.equal(plain.index, cast.index) and torch.equal(plain.score, cast.score)


def test_misuse_is_a_sentence(pruner):
    for keep in (0, -1, 0.0, 1.5, True):
        with pytest.raises(ValueError, match=r"keep must be a share in \(0, 1\] or an int of at least 1"):
            QueryGuidedTokenPruner(12, 10, 8, keep)
    with pytest.raises(TypeError, match=r"keep must be a share in \(0, 1\] or an int of at least 1, got '0\.5'"):
        QueryGuidedTokenPruner(12, 10, 8, "0.5")
    tokens, queries = tensors()
    with pytest.raises(ValueError, match=r"queries must have shape \[B', Q, 10\], got \[4, 3, 9\]"):
        pruner(tokens, queries[..., :9])
    with pytest.raises(ValueError, match=r"tokens must have shape \[B, N, 12\], got \[4, 20, 11\]"):
        pruner.scores(tokens[..., :11], queries)
    with pytest.raises(ValueError, match=r"mask must have shape \[B, N\] with B=4"):
        pruner(tokens, queries, torch.ones(3, 20, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be torch\.bool, got torch\.float32"):
        pruner(tokens, queries, torch.ones(4, 20))
    with pytest.raises(TypeError, match="queries must be a tensor, got list"):
        pruner(tokens, [queries])
    with pytest.raises(ValueError, match=r"queries must be on the device of the weights \(cpu\), got meta"):
        pruner(tokens.to("meta"), queries.to("meta"))
    with pytest.raises(ValueError, match=r"with B' dividing the 4 segments of the tokens, got \[3, 1, 10\]"):
        pruner(tokens, torch.zeros(3, 1, 10))


def test_tokens_of_a_clip_compete_under_a_budget_per_clip(pruner):
    pruner.budget = "clip"
    tokens, queries = tensors(batch=6, clips=2)
    mask = torch.rand(6, 20, generator=torch.Generator().manual_seed(2)) > 0.2
    result = pruner(tokens, queries, mask, return_scores=True)
    assert result.tokens.shape == (2, 15, 12) and result.scores.shape == (2, 60)
    apart = pruner.scores(tokens, queries).masked_fill(~mask, -torch.inf).view(2, 60)
    assert torch.equal(result.index, apart.topk(15).indices.sort().values)
    assert torch.equal(result.tokens[1, 3], tokens[3 + result.index[1, 3] // 20, result.index[1, 3] % 20])


def test_a_clip_of_one_frame_has_the_budget_of_a_frame(pruner):
    tokens, queries = tensors()
    per_frame = pruner(tokens, queries)
    pruner.budget = "clip"
    assert torch.equal(pruner(tokens, queries).index, per_frame.index)


def test_noise_draws_without_replacement_in_proportion_to_the_softmax(pruner):
    pruner.keep, pruner.noise = 1, 0.5
    tokens, queries = tensors(batch=1, clips=1, size=6)
    many = tokens.detach().expand(20_000, -1, -1)
    torch.manual_seed(0)
    index = pruner(many, queries.detach()).index.flatten()
    share = index.bincount(minlength=6) / len(index)
    expected = (pruner.scores(tokens, queries)[0] / 0.5).softmax(0)
    assert (share - expected).abs().max() < 0.015  # four standard errors of 20,000 draws
    pruner.eval()
    assert (pruner(many[:50], queries.detach()).index == expected.argmax()).all()


def test_noise_changes_the_choice_and_nothing_else(pruner):
    pruner.noise = 5.0
    tokens, queries = tensors()
    mask = torch.ones(4, 20, dtype=torch.bool)
    mask[:, :16] = False
    torch.manual_seed(0)
    result = pruner(tokens, queries, mask, return_scores=True)
    assert torch.equal(result.index[:, -4:], torch.arange(16, 20).expand(4, -1))  # what is masked comes last
    assert result.log_gate[:, 0].isneginf().all()
    dense = pruner.scores(tokens, queries)
    torch.testing.assert_close(result.scores[mask], dense[mask])
    assert result.scores[~mask].isneginf().all()
    torch.testing.assert_close(result.score[:, 1:], dense.gather(1, result.index)[:, 1:])
    free = [pruner(tokens, queries) for _ in range(2)]
    assert not torch.equal(free[0].index, free[1].index)
    for one in free:
        assert (one.index.diff(dim=1) > 0).all()
        torch.testing.assert_close(one.log_gate, torch.nn.functional.logsigmoid(one.score + 0.3))


def test_a_straight_through_gate_is_open_and_keeps_the_gradient(pruner):
    tokens, queries = tensors()
    mask = torch.ones(4, 20, dtype=torch.bool)
    mask[0, 2:] = False
    leaves = (tokens, queries, *pruner.parameters())
    soft = pruner(tokens, queries, mask)
    pruner.gate = "straight_through"
    hard = pruner(tokens, queries, mask)
    seen = mask.gather(1, hard.index)
    assert (hard.log_gate[seen] == 0).all() and hard.log_gate[~seen].isneginf().all() and not seen.all()
    expected = torch.autograd.grad(soft.log_gate[seen].square().sum() / 2, leaves)
    ours = torch.autograd.grad((hard.log_gate * soft.log_gate.detach())[seen].sum(), leaves)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "option",
    [
        {"noise": -1.0},
        {"noise": math.nan},
        {"noise": "1"},
        {"budget": "video"},
        {"gate": "open"},
        {"scoring": "l2"},
        {"reduce": "sum"},
        {"token_dim": 0},
        {"query_dim": 2.0},
        {"score_dim": True},
        {"keep": math.nan},
        {"keep": None},
        {"dtype": torch.int32},
    ],
)
def test_bad_options(option):
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(option))} must be"):
        QueryGuidedTokenPruner(**{"token_dim": 12, "query_dim": 10, "score_dim": 8, **option})


def test_numbers_of_numpy_are_numbers():
    assert QueryGuidedTokenPruner(12, 10, 8, np.float32(0.5)).keep_count(8) == 4
    assert QueryGuidedTokenPruner(12, 10, 8, np.int64(3)).keep_count(8) == 3
