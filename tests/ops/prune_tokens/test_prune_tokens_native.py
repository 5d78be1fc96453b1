"""The compiled CPU kernels of `prune_tokens`: against the reference, every SIMD level, the same bits again."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from bridge_stg.ops import prune_tokens
from bridge_stg.ops.core.backends import choose_backend
from bridge_stg.ops.core.native import library_obstacle

from .cases import OPTIONS, SHAPES, Shape, check, check_integers, run

pytestmark = pytest.mark.skipif(library_obstacle("cpu") is not None, reason=str(library_obstacle("cpu")))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = torch.ops.bridge_stg


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, dtype):
    for masked in (False, True):
        check(shape, dtype, masked=masked, dense=masked == (shape.queries > 3))


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 150), st.integers(1, 40), st.integers(1, 64)),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    reduce=st.sampled_from(["max", "mean"]),
    seed=st.integers(0, 2**16),
)
def test_integer_values_select_exactly(sizes, share, dtype, reduce, seed):
    segments, tokens, width, queries = sizes
    if reduce == "mean":
        queries = 1 << queries % 7  # whose mean is exact
    check_integers(Shape(segments, tokens, width, queries, max(1, round(share * tokens))), dtype, seed, reduce=reduce)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), size=st.integers(1, 40), reduce=st.sampled_from(["max", "mean", "logsumexp"]))
def test_total_order(data, size, reduce):
    """A single feature and a query of 1 make the score the token itself."""
    value = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e38, -1e-40])
    tokens = torch.tensor(data.draw(st.lists(value, min_size=size, max_size=size))).view(1, -1, 1)
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=size, max_size=size).map(lambda m: torch.tensor([m])))
    keep = data.draw(st.integers(1, size))
    ours, theirs = (
        prune_tokens(tokens, torch.ones(1, 1, 1), keep, mask=mask, reduce=reduce, return_scores=True, backend=name)
        for name in ("native", "reference")
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_all_scores_equal_keep_the_first():
    for width in (8, 1024):
        result = prune_tokens(torch.ones(2, 77, width), torch.ones(2, 6, width), 20, backend="native")
        assert result.index.tolist() == [list(range(20))] * 2


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
def test_simd_level(level):
    """What the processor does not have falls to what it has."""
    environment = {**os.environ, "BRIDGE_STG_SIMD": level}
    command = [sys.executable, "-m", "tests.ops.prune_tokens.cases"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", [Shape(2, 1500, 33, 3, 1100), Shape(40, 30, 16, 8, 7)], ids=str)
def test_the_same_bits_again_on_any_number_of_threads(shape, dense):
    leaves = draw(shape.segments, shape.tokens, shape.width), draw(shape.segments, shape.queries, shape.width, seed=1)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            found.append(run(leaves, shape.keep, "native", reduce="logsumexp", return_scores=dense))
    finally:
        torch.set_num_threads(before)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype):
    tokens, queries = draw(3, 20, 12, dtype=dtype), draw(3, 4, 12, dtype=dtype, seed=1)
    wide = torch.full((3, 25, 20), math.nan, dtype=dtype)
    wide[:, 2:22, 5:17] = tokens
    everywhere = queries[:1].expand(3, -1, -1)
    for query in (queries, everywhere):
        expected = run((tokens, query.contiguous()), 6, "native")
        for x in (wide[:, 2:22, 5:17], tokens.transpose(1, 2).contiguous().transpose(1, 2), tokens.transpose(0, 1)):
            x = x if x.shape == tokens.shape else x.contiguous().transpose(0, 1)
            for q in (query, query.transpose(1, 2).contiguous().transpose(1, 2)):
                found = run((x, q), 6, "native")
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_expanded_gradients():
    leaves = draw(2, 9, 5).requires_grad_(), draw(2, 3, 5, seed=1).requires_grad_()
    for name in ("tokens", "score", "scores"):
        ours, theirs = (
            torch.autograd.grad(
                getattr(prune_tokens(*leaves, 4, return_scores=True, backend=backend), name).sum(),
                leaves,
                allow_unused=True,
            )
            for backend in ("native", "reference")
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_that_nobody_needs_are_left_out():
    tokens, queries = draw(2, 9, 5), draw(2, 3, 5, seed=1)
    result = prune_tokens(tokens, queries, 4, backend="native")
    saved = (None, result.tokens, result.index, result.score, torch.empty(0), queries, 9, "dot", "max", 1.0, False)
    grads = torch.ones_like(result.tokens), torch.ones_like(result.score), None
    d_tokens, d_queries = OPS.prune_tokens_backward(*grads, *saved, True, True, "native")
    alone, none = OPS.prune_tokens_backward(*grads, *saved, True, False, "native")
    assert torch.equal(alone, d_tokens) and none.numel() == 0
    none, alone = OPS.prune_tokens_backward(*grads, *saved, False, True, "native")
    assert torch.equal(alone, d_queries) and none.numel() == 0


def test_garbage_in_masked_tokens_reaches_no_gradient():
    tokens, queries = draw(1, 40, 6), draw(1, 2, 6, seed=1)
    mask = torch.arange(40)[None] % 3 > 0
    tokens[~mask] = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 0.0, math.nan])
    for scoring, reduce in OPTIONS:
        for dense in (False, True):
            options: dict[str, Any] = {"scoring": scoring, "reduce": reduce, "return_scores": dense, "mask": mask}
            ours, theirs = (run((tokens, queries), 35, name, **options) for name in ("native", "reference"))
            assert torch.equal(ours[0], theirs[0])
            for a, b in zip(ours[-2:], theirs[-2:], strict=True):
                assert a.isfinite().all()
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_zero_tokens_score_zero_under_cosine():
    tokens, queries = draw(1, 6, 4), draw(1, 2, 4, seed=1)
    tokens[0, 2] = 0.0
    ours, theirs = (run((tokens, queries), 6, name, scoring="cosine") for name in ("native", "reference"))
    assert ours[2][0, 2] == 0.0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_large_gradients_come_straight_from_the_system():
    """Beyond 32 MiB; the result outlives the call, and is given back once."""
    tokens = draw(8, 1100, 1024).requires_grad_()
    queries = draw(8, 1, 1024, seed=1)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(prune_tokens(tokens, queries, 3, backend="native").tokens.sum(), tokens)
        assert gradient.is_contiguous() and gradient.sum() == 8 * 3 * 1024
        assert gradient.clone().add_(1).min() == 1


def test_what_is_chosen():
    half, double = (torch.empty(1, 1, 1, dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
    assert choose_backend("prune_tokens", None, "cpu", tokens=half, queries=half) == "native"
    assert choose_backend("prune_tokens", None, "cpu", tokens=double, queries=half) == "reference"
    with pytest.raises(ValueError, match=r"it takes float32, float16 and bfloat16, got torch\.float64"):
        prune_tokens(double, double, 1, backend="native")


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted):
    tokens, queries = draw(2, 7, 5), draw(2, 3, 5, seed=1)
    if permuted:
        tokens, queries = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (tokens, queries))
    tokens.requires_grad_(), queries.requires_grad_()
    mask = torch.arange(14).view(2, 7) % 3 > 0
    opcheck(OPS.prune_tokens.default, (tokens, queries, 3, "cosine", "max", 0.5, None, permuted, "native"))
    opcheck(OPS.prune_tokens.default, (tokens.detach(), queries, 3, "dot", "mean", 0.5, mask, False, "native"))


def test_segments_further_apart_than_32_bits_reach():
    apart = 2**30 + 64
    storage = torch.empty(2 * apart + 4096, dtype=torch.float16)  # pages that nobody touches cost nothing
    tokens = storage.as_strided((3, 40, 32), (apart, 32, 1)).copy_(torch.randint(-8, 9, (3, 40, 32)))
    queries = torch.randint(-3, 4, (3, 4, 32)).half()
    found = prune_tokens(tokens, queries, 7, backend="native")
    expected = prune_tokens(tokens.contiguous(), queries, 7, backend="reference")
    assert torch.equal(found.index, expected.index) and torch.equal(found.tokens, expected.tokens)
