"""The compiled CPU kernels of `attend_memory`: against float64, at every SIMD level, bit for bit the same again."""

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

from bridge_stg.ops import attend_memory, share_memory
from bridge_stg.ops.attend_memory.head_products import HeadWeights, attend_heads, contract_heads, expand_heads
from bridge_stg.ops.core.native import library_obstacle

from .cases import SHAPES, Shape, attend, check, draw

pytestmark = pytest.mark.skipif(library_obstacle("cpu") is not None, reason=str(library_obstacle("cpu")))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_float64(shape):
    check(shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[4]], ids=str)
def test_half_precision_accumulates_in_float32(shape, dtype):
    check(shape, dtype)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 200), st.integers(1, 40)),
    options=st.sets(st.sampled_from(["position", "bias", "mask"])),
    seed=st.integers(0, 2**16),
)
def test_any_shape(sizes, options, seed):
    shape = Shape(*sizes, " ".join(options))
    leaves, arguments = draw(shape, seed=seed)
    ours, theirs = (attend(shape, leaves, arguments, torch.float32, name) for name in ("native", "reference"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
def test_simd_level(level):
    """What the processor does not have falls to what it has."""
    environment = {**os.environ, "BRIDGE_STG_SIMD": level}
    command = [sys.executable, "-m", "tests.ops.attend_memory.cases"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [SHAPES[4], SHAPES[5], SHAPES[6]], ids=str)
def test_the_same_bits_again_on_any_number_of_threads(shape):
    leaves, arguments = draw(shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(attend(shape, leaves, arguments, torch.float32, "native"))
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_hidden_rows_may_hold_anything():
    shape = Shape(2, 9, 150, 24, "position bias mask")
    leaves, arguments = draw(shape)
    hidden = ~arguments["key_mask"]
    clean = attend(shape, leaves, arguments, torch.float32, "native")
    for leaf in leaves[1:]:
        leaf[hidden] = math.nan
    poisoned = attend(shape, leaves, arguments, torch.float32, "native")
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


def test_blind_rows_are_zero_with_zero_gradients():
    query, memory = (torch.randn(2, n, 24, requires_grad=True) for n in (9, 2100))
    mask = torch.ones(2, 2100, dtype=torch.bool)
    mask[1] = False
    bias = torch.zeros(2, 2100)
    bias[0, :1500] = -math.inf
    out, lse, mass = attend_memory(
        query, memory, key_mask=mask, bias=bias, scale=1.0, return_mass=True, backend="native"
    )
    assert (out[1] == 0).all() and lse[1].isneginf().all() and (mass[1] == 0).all()
    assert (mass[0, :1500] == 0).all() and lse[0].isfinite().all()
    torch.testing.assert_close(mass[0].sum(), torch.tensor(9.0))
    d_query, d_memory = torch.autograd.grad(out.sum() + lse.sum(), (query, memory))
    assert (d_query[1] == 0).all() and (d_memory[1] == 0).all() and (d_memory[0, :1500] == 0).all()
    assert d_query[0].isfinite().all() and d_memory[0, 1500:].abs().sum() > 0


def test_strides_do_not_matter():
    shape = Shape(2, 9, 70, 24, "position")
    leaves, arguments = draw(shape)
    dense = attend(shape, leaves, arguments, torch.float32, "native")
    inside = torch.randn(2, 90, 48).double()
    inside[:, 10:80, 16:40] = leaves[1]
    for memory in (leaves[1].permute(2, 0, 1).contiguous().permute(1, 2, 0), inside[:, 10:80, 16:40]):
        query = leaves[0].transpose(0, 1).contiguous().transpose(0, 1)
        again = attend(shape, [query, memory, *leaves[2:]], arguments, torch.float32, "native")
        assert all(torch.equal(a, b) for a, b in zip(dense, again, strict=True))


def test_backward_without_the_stash_takes_the_probabilities_again():
    shape = Shape(1, 70, 1100, 1024, "position bias mask")
    leaves, arguments = draw(shape)
    inputs = [x.float().requires_grad_() for x in leaves]
    gradients = []
    for stash in (True, False):
        out, lse, _, _ = torch.ops.bridge_stg.attend_memory(
            *inputs, arguments["key_mask"], None, None, arguments["scale"], False, stash, "native"
        )
        gradients.append(torch.autograd.grad(out.square().sum() + lse.sum(), inputs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", ["", "position bias mask"])
def test_opcheck(options):
    shape = Shape(2, 6, 7, 5, options)
    leaves, arguments = draw(shape)
    query, memory, position, bias = (x.float().requires_grad_() for x in leaves)
    opcheck(
        torch.ops.bridge_stg.attend_memory.default,
        (
            query,
            memory,
            position if options else None,
            bias if options else None,
            arguments.get("key_mask"),
            None,
            None,
            0.5,
            bool(options),
            True,
            "native",
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("positioned", [False, True])
def test_the_shared_gradient_is_the_sum_over_layers(layers, positioned, dtype):
    generator = torch.Generator().manual_seed(layers)
    memory, position = (torch.randn(2, 150, 24, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    queries = [torch.randn(2, 9 + i, 24, generator=generator).to(dtype).requires_grad_() for i in range(layers)]
    bias = torch.randn(2, 150, generator=generator).requires_grad_()
    leaves = [memory, bias, *queries, *([position] if positioned else [])]

    def gradients(shared: bool) -> tuple[torch.Tensor, ...]:
        x, p = memory, position if positioned else None
        if shared:
            x, p = share_memory(x, p) if positioned else (share_memory(x), None)
        loss = torch.zeros(())
        for i, query in enumerate(queries):
            out, lse = attend_memory(query, x, position=p, bias=bias, scale=0.2 + 0.05 * i, backend="native")
            loss = loss + (lse.sum() if i == 1 else out.float().square().sum() + lse.square().sum())
        return torch.autograd.grad(loss, leaves)

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        assert ours.dtype == theirs.dtype
        difference = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert difference <= (1e-2 if ours.dtype == torch.bfloat16 else 2e-6)


def test_what_it_does_not_take():
    query, memory = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    index, window = torch.tensor([[1, 2]]), torch.tensor([[[0, 2]] * 3])
    for options, reason in (({"index": index}, "got an index"), ({"window": window}, "got a window")):
        attend_memory(query, memory, scale=1.0, **options)
        with pytest.raises(ValueError, match=reason):
            attend_memory(query, memory, scale=1.0, backend="native", **options)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        attend_memory(query.double(), memory.double(), scale=1.0, backend="native")


@pytest.mark.parametrize("count", [0, 1, 5, 200])
@pytest.mark.parametrize(("heads", "head_dim", "width"), [(1, 3, 5), (8, 32, 256), (3, 20, 70)])
def test_head_products(count, heads, head_dim, width):
    generator = torch.Generator().manual_seed(count)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = normal(count, heads * head_dim), normal(heads * head_dim, width), normal(count, heads, width)
    weights = normal(count, heads, width), normal(count, heads * head_dim)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        narrow, weight, wide = (x.to(dtype).requires_grad_() for x in leaves)
        expanded, contracted = expand_heads(narrow, weight, heads), contract_heads(wide, weight)
        loss = (expanded * weights[0].to(dtype)).sum() + (contracted * weights[1].to(dtype)).sum()
        return [expanded, contracted, *torch.autograd.grad(loss, (narrow, weight, wide))]

    for ours, theirs in zip(run(torch.float32), run(torch.float64), strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("options", ["", "position bias mask"])
@pytest.mark.parametrize(
    ("clips", "queries", "keys"), [(9, 4, 40), (9, 1, 300), (5, 20, 7), (1, 4, 40), (5, 3, 2100), (5, 2, 0), (0, 2, 5)]
)
def test_attention_between_the_products_of_heads(clips, queries, keys, options):
    heads, head_dim, width = 3, 8, 24
    leaves, arguments = draw(Shape(clips, 1, keys, width, options))
    memory, position, bias = (x.float() for x in leaves[1:])
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(clips, queries, heads * head_dim, generator=generator)
    key, value = (torch.randn(heads * head_dim, width, generator=generator) / 5 for _ in range(2))
    weights = HeadWeights(key, value, heads)
    if "mask" in options and clips > 1:
        arguments["key_mask"][1] = False
    call: dict[str, Any] = {
        "position": position if options else None,
        "bias": bias if options else None,
        "key_mask": arguments.get("key_mask"),
        "scale": 0.3,
    }
    fused = attend_heads(query, weights, memory, **call)
    apart = attend_heads(query.requires_grad_(), weights, memory, **call)
    exact = attend_heads(
        query.double(),
        HeadWeights(key.double(), value.double(), heads),
        memory.double(),
        **{name: x.double() if name in ("position", "bias") and x is not None else x for name, x in call.items()},
    )
    for a, b, c in zip(fused, apart, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-5)
    if "mask" in options and clips > 1:
        assert (fused[0][1] == 0).all() and fused[1][1].isneginf().all()
    again = attend_heads(query.detach(), weights, memory, **call)
    assert all(torch.equal(a, b) for a, b in zip(fused, again, strict=True))


def test_clips_further_apart_than_32_bits_reach():
    apart = 2**30 + 64
    storage = torch.empty(2 * apart + 4096, dtype=torch.float16)  # pages that nobody touches cost nothing
    memory = storage.as_strided((3, 40, 64), (apart, 64, 1)).copy_(torch.randn(3, 40, 64))
    query = torch.randn(3, 8, 64).half()
    found, lse = attend_memory(query, memory, scale=0.1, backend="native")
    out, expected_lse = attend_memory(query, memory.contiguous(), scale=0.1, backend="native")
    assert torch.equal(found, out) and torch.equal(lse, expected_lse)
    torch.testing.assert_close(out, attend_memory(query, memory, scale=0.1, backend="reference")[0])
