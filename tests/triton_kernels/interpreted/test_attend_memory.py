"""The Triton kernels of `attend_memory` in the interpreter, against the reference in float64; outputs are poisoned."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bridge_stg.triton_kernels.attend_memory.tiles import split_keys
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_stg.ops import attend_memory, share_memory, warmup

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, at infinities
]
NAMES = ("position", "bias", "key_mask", "index", "window")
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 2e-5}, torch.float16: {"rtol": 1e-2, "atol": 4e-3}}


def draw(names, dtype=torch.float32, batch=2, rows=5, size=150, width=64, seed=0):
    """(query, memory) and the named options, some keys hidden in each way."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    query, memory = normal(batch, rows, width).to(dtype), normal(batch, size, width).to(dtype)
    keys = max(size // 2, 1) if "index" in names else size
    options = {
        "position": normal(batch, size, width).to(dtype),
        "bias": normal(batch, size).masked_fill(torch.rand(batch, size, generator=generator) < 0.1, -math.inf),
        "key_mask": torch.rand(batch, size, generator=generator) > 0.3,
        "index": torch.randint(-1, size + 1, (batch, keys), generator=generator),
        "window": torch.randint(-3, keys + 4, (batch, rows, 2), generator=generator),
    }
    return query, memory, {name: options[name] for name in names}


def run(query, memory, options, backend, dtype=None, scale=0.15):
    """(out, lse, mass, gradients...) of one loss on out and on the lse of the rows that see something."""
    leaves = {"query": query, "memory": memory} | {k: v for k, v in options.items() if k in ("position", "bias")}
    leaves = {k: (v if dtype is None else v.to(dtype)).detach().requires_grad_() for k, v in leaves.items()}
    out, lse, mass = attend_memory(**(options | leaves), scale=scale, return_mass=True, backend=backend)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    slopes = torch.linspace(1, 2, lse.numel(), dtype=lse.dtype).view_as(lse)
    loss = loss + (lse * slopes).masked_fill(lse.isneginf(), 0.0).sum()
    return [out.detach(), lse.detach(), mass, *torch.autograd.grad(loss, list(leaves.values()))]


def check(query, memory, options, **changes):
    tolerance: dict[str, Any] = TOLERANCE[query.dtype]
    found = run(query, memory, options, "triton", **changes)
    expected = run(query, memory, options, "reference", torch.float64, **changes)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "names", [(), *((name,) for name in NAMES), ("position", "bias", "window"), NAMES], ids="+".join
)
def test_matches_float64(names, dtype):
    check(*draw(names, dtype))


@pytest.mark.parametrize(
    ("rows", "size", "width"), [(1, 1, 64), (1, 70, 40), (40, 65, 128), (70, 40, 256), (3, 33, 200), (2, 20, 512)]
)
@pytest.mark.parametrize("names", [("bias",), NAMES], ids="+".join)
def test_sizes(rows, size, width, names):
    dtype = torch.float32 if width in (40, 128) else torch.float16
    check(*draw(names, dtype, 1, rows, size, width))


@settings(max_examples=6, deadline=None)
@given(
    batch=st.integers(0, 2),
    rows=st.integers(0, 4),
    size=st.integers(0, 70),
    width=st.integers(1, 70),
    names=st.sets(st.sampled_from(NAMES)),
    seed=st.integers(0, 2**16),
)
def test_any_shape(batch, rows, size, width, names, seed):
    check(*draw(sorted(names), torch.float32, batch, rows, size, width, seed), scale=-0.2)


@pytest.mark.parametrize("how", ["mask", "bias", "index", "window"])
def test_blind_rows(how):
    query, memory, options = draw(("position", "bias"))
    options |= {
        "mask": {"key_mask": torch.zeros(2, 150, dtype=torch.bool)},
        "bias": {"bias": torch.full((2, 150), -math.inf)},
        "index": {"index": torch.full((2, 9), -1)},
        "window": {"window": torch.zeros(2, 5, 2, dtype=torch.int32)},
    }[how]
    out, lse, mass, *gradients = check(query, memory, options)
    assert (out == 0).all() and lse.isneginf().all() and (mass == 0).all()
    assert all((gradient == 0).all() for gradient in gradients)


def test_infinite_gradients_of_blind_rows_do_not_matter():
    query, memory, _ = draw(())
    leaves = [x.requires_grad_() for x in (query, memory)]
    window = torch.tensor([[0, 9], [3, 3], [0, 150], [7, 2], [1, 2]]).expand(2, -1, -1)
    _, lse = attend_memory(*leaves, window=window, scale=0.1, backend="triton")
    slopes = torch.ones_like(lse).masked_fill(lse.isneginf(), math.nan)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(lse, leaves, slopes))


def test_hidden_rows_may_hold_anything():
    query, memory, options = draw(("position", "key_mask"))
    clean = run(query, memory, options, "triton")
    hidden = ~options["key_mask"][:, :, None]
    spoilt = {"key_mask": options["key_mask"], "position": options["position"].masked_fill(hidden, math.inf)}
    found = run(query, memory.masked_fill(hidden, math.nan), spoilt, "triton")
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))


def test_an_index_far_outside_reads_nothing():
    query, memory, options = draw(("index",), size=20)
    options["index"][:, ::3] = 2**40
    options["index"][:, 1::3] = -(2**40)
    check(query, memory, options)


def test_permuted_memory_is_read_by_its_strides():
    query, memory, options = draw(NAMES)
    dense = run(query, memory, options, "triton")

    def permuted(x):
        return x.movedim(0, -1).contiguous().movedim(-1, 0)

    for name in options:
        options[name] = permuted(options[name])
    found = run(permuted(query), permuted(memory), options, "triton")
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


def test_twice_the_same_bits():
    query, memory, options = draw(NAMES)
    options["index"] = options["index"] % 7  # rows named many times
    first, second = (run(query, memory, options, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    check(query, memory, options)


def test_only_needed_gradients_are_made():
    query, memory, options = draw(("position", "bias"))
    options["bias"].requires_grad_()
    _, lse = attend_memory(query, memory, **options, scale=0.1, backend="triton")
    lse.sum().backward()
    assert query.grad is None and memory.grad is None and options["position"].grad is None
    torch.testing.assert_close(options["bias"].grad.sum(), torch.tensor(10.0))


def test_nothing_is_stashed_and_the_forward_can_run_again():
    query, memory, _ = draw(())
    out, lse, _, stashed = torch.ops.bridge_stg.attend_memory(
        query, memory, None, None, None, None, None, 0.1, False, True, "triton"
    )
    assert stashed.shape == (0,)
    backward = torch.ops.bridge_stg.attend_memory_backward
    sides = (query, memory, None, None, None, None, None, lse)
    found = [
        backward(torch.ones_like(out), None, *sides, x, 0.1, *(True, True, False, False), "triton")
        for x in (out, stashed)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [(513, torch.float32, "at most 512 numbers"), (8, torch.float64, "got torch.float64")],
)
def test_limits(width, dtype, message):
    with pytest.raises(ValueError, match=message):
        attend_memory(
            torch.zeros(1, 2, width, dtype=dtype), torch.zeros(1, 3, width, dtype=dtype), scale=1.0, backend="triton"
        )


@pytest.mark.parametrize(("programs", "keys"), [(1, 0), (1, 64), (2, 8192), (64, 100000), (500, 8192)])
def test_splits_cover_the_keys(programs, keys):
    splits, size = split_keys(programs, keys, 64, 132)
    assert size % 64 == 0 and 1 <= splits <= 128
    assert (splits - 1) * size < max(keys, 1) <= splits * size


def test_warmup_knows_the_op():
    flags = dict.fromkeys(("position", "bias", "masked", "indexed", "windowed", "return_mass"), True)
    shape = {"op": "attend_memory", "batch": 1, "rows": 3, "keys": 20, "width": 32, "dtype": torch.float16}
    assert warmup([shape, shape | flags | {"backend": "triton"}], device="cpu") == 2


@pytest.mark.parametrize("names", [(), ("position", "bias"), ("index",)])
def test_bfloat16_is_taken_in_float32(names):
    """The interpreter's `tl.dot` of bfloat16 is silently wrong by powers of ten."""
    query, memory, options = draw(names, dtype=torch.bfloat16)
    found, expected = (run(query, memory, options, backend) for backend in ("triton", "reference"))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_bfloat16_through_a_shared_memory():
    query, memory, options = draw(("position",), dtype=torch.bfloat16)
    found = []
    for backend in ("triton", "reference"):
        leaves = [x.detach().requires_grad_() for x in (memory, options["position"])]
        shared, position = share_memory(*leaves)
        outputs = [attend_memory(query, shared, position=position, scale=s, backend=backend)[0] for s in (0.1, 0.2)]
        found.append(torch.autograd.grad(sum(x.float().square().sum() for x in outputs), leaves))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=5e-2)
