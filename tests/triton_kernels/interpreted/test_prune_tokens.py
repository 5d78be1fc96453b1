"""The Triton kernels of `prune_tokens` in the interpreter, against the reference; every output is poisoned before."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from bridge_stg.triton_kernels.common import configs
from bridge_stg.triton_kernels.prune_tokens import dense as kernels
from bridge_stg.triton_kernels.prune_tokens.selection import load_keys
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_stg.ops import prune_tokens

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, at infinities
]
OPTIONS = list(product(("dot", "cosine"), ("max", "mean", "logsumexp")))


@pytest.fixture(params=["fused", "split"])
def path(request):
    """Both ways to launch, whatever the rules would pick."""
    with configs.overruled({"fused": request.param == "fused"}):
        yield request.param


def both(tokens, queries, keep, **options):
    """Results and gradients of the kernels and of the reference, for one loss on all outputs."""
    found = []
    for backend in ("triton", "reference"):
        leaves = [x.detach().requires_grad_() for x in (tokens, queries)]
        result = prune_tokens(*leaves, keep, backend=backend, **options)
        outputs = [x for x in result if x.is_floating_point()]
        loss = sum(weighted(x) for x in outputs)
        found.append((*(x.detach() for x in result), *torch.autograd.grad(loss, leaves)))
    return found


def weighted(x):
    x = x.float()
    weights = torch.linspace(-1, 1, x.numel()).view_as(x)
    return (weights * x.masked_fill(~x.isfinite(), 0.0)).sum()


def agree(found, expected, dtype):
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for got, want in zip(found[2:-2], expected[2:-2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for got, want in zip(found[-2:], expected[-2:], strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize(("scoring", "reduce"), OPTIONS)
def test_equals_the_reference(path, scoring, reduce):
    case = OPTIONS.index((scoring, reduce)) + 6 * (path == "split")
    dtype = (torch.float32, torch.float16, torch.bfloat16)[case % 3]
    query_count, width, size = ((3, 24, 37), (17, 8, 20), (1, 72, 33), (64, 40, 48))[case % 4]
    # Halves and quarters: equal scores are equal in any order of summation.
    tokens = torch.randint(-4, 5, (2, size, width)).to(dtype) / 4
    queries = torch.randint(-4, 5, (2, query_count, width)).to(dtype) / 4
    if scoring == "cosine" or reduce != "max":
        tokens, queries = torch.randn_like(tokens), torch.randn_like(queries)
    mask = torch.rand(2, size) > 0.4 if case % 2 else None
    dense = case % 5 < 2
    found, expected = both(
        tokens, queries, size // 3, scoring=scoring, reduce=reduce, scale=0.5, mask=mask, return_scores=dense
    )
    agree(found, expected, dtype)


@pytest.mark.parametrize(("size", "keep"), [(1, 1), (16, 16), (33, 1), (65, 64), (300, 77)])
def test_sizes_at_the_edges(path, size, keep):
    tokens, queries = torch.randn(2, size, 8), torch.randn(2, 2, 8)
    agree(*both(tokens, queries, keep), torch.float32)


def test_all_equal_scores_keep_the_first(path):
    result = prune_tokens(torch.ones(2, 70, 8), torch.ones(2, 3, 8), 40, backend="triton")
    assert result.index.tolist() == [list(range(40))] * 2


@pytest.mark.parametrize("reduce", ["max", "logsumexp", "mean"])
def test_nan_and_infinite_scores(path, reduce):
    values = [math.nan, 1.0, math.inf, -math.inf, 2.0, math.nan, 0.0, -0.0, 3.0, math.inf, -5.0]
    tokens, queries = torch.tensor(values).view(1, -1, 1), torch.ones(1, 2, 1)
    mask = torch.ones(1, len(values), dtype=torch.bool)
    mask[0, 2] = False
    for keep in (1, 5, 9, 11):
        found, expected = (
            prune_tokens(tokens, queries, keep, reduce=reduce, mask=mask, return_scores=True, backend=backend)
            for backend in ("triton", "reference")
        )
        assert found.index.tolist() == expected.index.tolist()
        torch.testing.assert_close(found.score, expected.score, equal_nan=True)
        torch.testing.assert_close(found.scores, expected.scores, equal_nan=True)


def test_garbage_in_masked_tokens_reaches_no_gradient(path):
    tokens, queries = torch.randn(1, 20, 8), torch.randn(1, 2, 8)
    mask = torch.arange(20)[None] % 2 == 0
    tokens[0, 1::2] = math.nan
    tokens.requires_grad_()
    queries.requires_grad_()
    for dense in (False, True):
        result = prune_tokens(tokens, queries, 15, scoring="cosine", mask=mask, return_scores=dense, backend="triton")
        loss = weighted(result.scores if dense else result.score)
        gradients = torch.autograd.grad(loss, (tokens, queries))
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert (gradients[0][0, 1::2] == 0).all()


def test_permuted_inputs_are_read_in_place(path):
    tokens = torch.randn(24, 2, 30).permute(1, 2, 0)
    queries = torch.randn(1, 24, 1).expand(3, 24, 2).permute(2, 0, 1)
    mask = (torch.rand(30, 2) > 0.3).t()
    agree(*both(tokens, queries, 9, scoring="cosine", mask=mask), torch.float32)


def test_empty_batch():
    result = prune_tokens(torch.empty(0, 5, 8), torch.empty(0, 2, 8), 3, backend="triton", return_scores=True)
    assert [list(x.shape) for x in result] == [[0, 3, 8], [0, 3], [0, 3], [0, 5]]


def test_long_segments(monkeypatch):
    """The chunked selection, whose spans and block are made small."""
    monkeypatch.setattr(configs, "SELECT_SPANS", (16,))
    monkeypatch.setattr(kernels, "LONG_BLOCK", 64)
    tokens = torch.randint(-3, 4, (2, 150, 8)).float()
    queries = torch.randint(-3, 4, (2, 2, 8)).float()
    mask = torch.rand(2, 150) > 0.5
    for keep in (64, 150):
        agree(*both(tokens, queries, keep, mask=mask), torch.float32)


def test_more_than_two_billion_elements(tmp_path):
    """Rows that lie 2^30 elements apart, in a sparse file: every offset of a row must be taken in 64 bits."""
    step = 2**30 + 8
    far = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * 4 * step, dtype=torch.float16)
    tokens = far.as_strided((2, 4, 8), (4 * step, step, 1))
    tokens.copy_(torch.randn(2, 4, 8))
    queries = torch.randn(2, 2, 8).half()
    for fused in (False, True):
        with configs.overruled({"fused": fused}):
            found = prune_tokens(tokens, queries, 3, scoring="cosine", backend="triton")
        expected = prune_tokens(tokens.contiguous(), queries, 3, scoring="cosine", backend="reference")
        assert torch.equal(found.index, expected.index) and torch.equal(found.tokens, expected.tokens)


def test_only_the_gradients_asked_for():
    tokens, queries = torch.randn(2, 10, 8), torch.randn(2, 2, 8, requires_grad=True)
    result = prune_tokens(tokens, queries, 4, backend="triton")
    (d_queries,) = torch.autograd.grad(result.score.sum(), queries)
    expected = prune_tokens(tokens, queries, 4, backend="reference")
    torch.testing.assert_close(d_queries, torch.autograd.grad(expected.score.sum(), queries)[0])
    tokens.requires_grad_()
    result = prune_tokens(tokens, queries.detach(), 4, backend="triton")
    (d_tokens,) = torch.autograd.grad(result.tokens.sum(), tokens)
    assert d_tokens.sum(-1).eq(8).sum(-1).tolist() == [4, 4]


def test_mixed_dtypes():
    tokens, queries = torch.randn(2, 20, 8).half(), torch.randn(2, 2, 8)
    found, expected = both(tokens, queries, 5)
    agree(found, expected, torch.float16)


def test_float64_is_refused_by_name():
    with pytest.raises(ValueError, match=r"it takes float32, float16 and bfloat16, got torch\.float64"):
        prune_tokens(torch.randn(1, 4, 8).double(), torch.randn(1, 1, 8).double(), 2, backend="triton")


@triton.jit
def write_keys(score, key, size, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    _score, found = load_keys(score, None, 0, n, size)
    tl.store(key + n, found.to(tl.int64), mask=n < size)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(width=32), min_size=2, max_size=16))
def test_keys_sort_as_the_scores(values):
    score = torch.tensor(values)
    key = torch.empty(16, dtype=torch.int64)
    write_keys[(1,)](score, key, len(values), BLOCK=16)
    numbers = [(v, k) for v, k in zip(values, key.tolist(), strict=False) if not math.isnan(v)]
    assert all((a < b) == (x < y) for a, x in numbers for b, y in numbers)
    assert all(k == 1 for v, k in zip(values, key.tolist(), strict=False) if math.isnan(v))
    assert all(k > 1 for _, k in numbers)


def test_segments_further_apart_than_32_bits_reach(path):
    apart = 2**30 + 64
    storage = torch.empty(2 * apart + 4096, dtype=torch.float16)  # pages that nobody touches cost nothing
    tokens = storage.as_strided((3, 40, 32), (apart, 32, 1)).copy_(torch.randint(-8, 9, (3, 40, 32)))
    queries = torch.randint(-3, 4, (3, 4, 32)).half()
    found = prune_tokens(tokens, queries, 7, backend="triton")
    expected = prune_tokens(tokens.contiguous(), queries, 7, backend="reference")
    assert torch.equal(found.index, expected.index) and torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("reduce", ["max", "mean", "logsumexp"])
def test_cosine_of_rows_beyond_the_range_of_squares(path, reduce):
    factors = torch.tensor([1e-38, 1e-30, 1e-25, 1e-12, 1.0, 1e12, 1e20, 1e30, 1e37])[:, None]
    tokens, queries = torch.randn(2, 9, 20) * factors, torch.randn(2, 17, 20)
    options = {"scoring": "cosine", "reduce": reduce, "scale": 0.7, "return_scores": True}
    for keep in (5, 9):
        found, expected = both(tokens, queries, keep, **options)
        assert torch.equal(found[1], expected[1])
        for ours, theirs in zip(found[2:4], expected[2:4], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        # The gradient of the kept tokens themselves is 1 and more: beside it that of long rows is nothing.
        short = slice(0, 5)
        torch.testing.assert_close(found[4][:, short], expected[4][:, short], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[5], expected[5], rtol=1e-5, atol=1e-5)


def test_infinities_and_nan_score_as_in_the_reference(path):
    values = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, math.inf, -math.inf, math.nan])
    tokens, queries = (values[torch.randint(0, 8, (30, n, 3))] for n in (6, 3))
    tokens[:15], queries[8:22] = tokens[:15].nan_to_num(0.25, 1.0, -1.0), queries[8:22].nan_to_num(0.25, 1.0, -1.0)
    for scoring, reduce in OPTIONS:
        call = {"scoring": scoring, "reduce": reduce, "return_scores": True}
        found, expected = (prune_tokens(tokens, queries, 3, **call, backend=b) for b in ("triton", "reference"))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
