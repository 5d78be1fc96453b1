"""The Triton kernels of `prune_tokens_varlen` in the interpreter, against the reference; outputs are poisoned."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bridge_stg.ops import prune_tokens_varlen

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, at infinities
]
BUDGETS = {"per_segment": 9, "per_clip": 30, "top_p": 0.7, "threshold": 0.3}
POLICIES = list(BUDGETS)


def offsets(lengths, dtype=torch.int64):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def both(tokens, cu_seqlens, queries, budget, **options):
    """Results and gradients of the kernels and of the reference, for one loss on all outputs."""
    found = []
    for backend in ("triton", "reference"):
        leaves = [x.detach().requires_grad_() for x in (tokens, queries)]
        result = prune_tokens_varlen(leaves[0], cu_seqlens, leaves[1], budget, backend=backend, **options)
        outputs = (result.tokens.float(), result.score)
        loss = sum((torch.linspace(-1, 1, x.numel()).view_as(x) * x).sum() for x in outputs)
        found.append((*(x.detach() for x in result), *torch.autograd.grad(loss, leaves)))
    return found


def agree(found, expected, tolerance=1e-5):
    for place in (0, 1, 3, 4):
        assert torch.equal(found[place], expected[place])
        assert found[place].dtype == expected[place].dtype
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-5)
    for got, want in zip(found[5:], expected[5:], strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", [112, 20])
def test_equals_the_reference(policy, capacity):
    case = POLICIES.index(policy) * 2 + (capacity == 20)
    dtype = (torch.float32, torch.float16)[case % 2]
    lengths = (37, 0, 70, 5)
    tokens, queries = torch.randn(112, 24).to(dtype), torch.randn(4, 3, 24).to(dtype)
    budget = BUDGETS[policy]
    if case % 2 and policy != "per_clip":
        budget = torch.tensor([budget] * 4)
    found, expected = both(
        tokens,
        offsets(lengths, (torch.int32, torch.int64)[case % 2]),
        queries,
        budget,
        policy=policy,
        capacity=capacity,
        scoring=("dot", "cosine")[case // 2 % 2],
        reduce=("max", "mean", "logsumexp")[case % 3],
        scale=0.5,
    )
    agree(found, expected, 1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("policy", POLICIES)
def test_ties_nan_and_infinities(policy):
    values = [1.0, math.nan, 1.0, -math.inf, 2.0, 1.0, 0.0, -0.0, math.nan, 1.0, 0.3, math.inf]
    tokens = torch.tensor(values)[:, None]
    queries = torch.ones(3, 1, 1)
    for budget in {"per_segment": (0, 2, 9), "per_clip": (0, 4, 50), "top_p": (0.5, 1.0)}.get(policy, (0.3, 1.0)):
        found, expected = (
            prune_tokens_varlen(
                tokens, offsets((5, 4, 3)), queries, budget, policy=policy, capacity=12, backend=backend
            )
            for backend in ("triton", "reference")
        )
        assert found.index.tolist() == expected.index.tolist()
        assert found.cu_seqlens_out.tolist() == expected.cu_seqlens_out.tolist()
        assert found.count == expected.count


def test_equal_scores_share_the_top_p_mass():
    """Half of the mass of 70 equal tokens: the first 35."""
    result = prune_tokens_varlen(
        torch.ones(70, 4), offsets((70,)), torch.ones(1, 1, 4), 0.5, policy="top_p", capacity=70, backend="triton"
    )
    assert result.index[:35].tolist() == list(range(35)) and result.count == 35


@pytest.mark.parametrize("policy", ["per_segment", "per_clip"])
def test_rows_outside_the_segments_are_not_kept(policy):
    tokens, queries = torch.randn(50, 8), torch.randn(2, 2, 8)
    cu_seqlens = torch.tensor([6, 20, 41])
    agree(*both(tokens, cu_seqlens, queries, 60, policy=policy, capacity=50))


def test_wrong_offsets_stay_inside_the_tensors():
    """What comes out of offsets that descend or pass the end is not promised, but it is rows, each at most once."""
    tokens, queries = torch.randn(40, 8, requires_grad=True), torch.randn(3, 2, 8, requires_grad=True)
    for wrong in ([0, 30, 10, 40], [-5, 3, 9, 12], [0, 10, 90, 1000], [40, 20, 10, 0]):
        for policy, budget in BUDGETS.items():
            result = prune_tokens_varlen(
                tokens, torch.tensor(wrong), queries, budget, policy=policy, capacity=16, backend="triton"
            )
            kept = result.index[result.index >= 0]
            assert result.index.min() >= -1 and (kept < 40).all() and kept.unique().numel() == kept.numel()
            torch.autograd.grad(result.score.nan_to_num().sum(), (tokens, queries))


def test_no_rows_at_all():
    result = prune_tokens_varlen(
        torch.empty(0, 8), offsets((0, 0)), torch.randn(2, 1, 8), 3, capacity=4, backend="triton"
    )
    assert result.count == 0 and result.index.tolist() == [-1] * 4
    assert result.cu_seqlens_out.tolist() == [0, 0, 0] and (result.tokens == 0).all() and (result.score == 0).all()


def test_strided_tokens_are_read_in_place():
    tokens, queries = torch.randn(8, 60).t(), torch.randn(3, 1, 8).expand(3, 2, 8)
    agree(*both(tokens, offsets((20, 20, 20)), queries, 7, policy="per_segment", capacity=21, scoring="cosine"))


def test_cosine_of_rows_beyond_the_range_of_squares():
    factors = torch.tensor([1e-38, 1e-30, 1e-25, 1e-12, 1.0, 1e12, 1e20, 1e30, 1e37])[:, None]
    tokens, queries, offsets = torch.randn(9, 20) * factors, torch.randn(2, 5, 20), torch.tensor([0, 4, 9])
    for reduce in ("max", "mean", "logsumexp"):
        found = []
        for backend in ("triton", "reference"):
            x, q = tokens.clone().requires_grad_(), queries.clone().requires_grad_()
            options = {"capacity": 9, "scoring": "cosine", "reduce": reduce, "backend": backend}
            packed = prune_tokens_varlen(x, offsets, q, 3, **options)
            d_x, d_q = torch.autograd.grad(packed.score.square().sum(), (x, q))
            found.append((packed.index, packed.score, d_x * factors, d_q))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
