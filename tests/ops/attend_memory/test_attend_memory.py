"""`attend_memory`: the formula, what it hides, its gradients, its messages."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from bridge_stg.triton_kernels.attend_memory.records import AttentionInputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bridge_stg.ops import attend_memory
from bridge_stg.ops.attend_memory.reference import reference


def inputs(dtype=torch.float64, seed=0, batch=2, rows=5, size=7, width=4, grad=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)

    return draw(batch, rows, width), draw(batch, size, width), draw(batch, size, width), draw(batch, size)


KEY_MASK = torch.tensor([[True, False, True, True, False, True, True], [False, True] + [False] * 5])
INDEX = torch.tensor([[6, 0, 3, 3, -1], [1, 2, -1, 9, 5]])
WINDOW = torch.tensor([[[0, 5], [1, 3], [2, 2], [-4, 1], [3, 99]]]).expand(2, -1, -1)


def naive(
    query: Tensor,
    memory: Tensor,
    position: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    index: Tensor | None,
    window: Tensor | None,
    scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The definition in float64, one product at a time: (out, lse, mass)."""
    batch, rows, width = query.shape
    size = memory.shape[1]
    out, lse, mass = (
        np.zeros((batch, rows, width)),
        np.full((batch, rows), -math.inf),
        np.zeros((batch, size)),
    )
    q, x = query.detach().double().numpy(), memory.detach().double().numpy()
    for b, i in product(range(batch), range(rows)):
        keys = range(size) if index is None else index[b].tolist()
        start, end = (0, len(keys)) if window is None else window[b, i].tolist()
        seen, scores = [], []
        for place, j in enumerate(keys):
            if not (0 <= j < size and start <= place < end) or (key_mask is not None and not key_mask[b, j]):
                continue
            key = x[b, j] + (0.0 if position is None else position[b, j].detach().double().numpy())
            seen.append(j)
            scores.append(scale * float(q[b, i] @ key) + (0.0 if bias is None else bias[b, j].item()))
        if not seen or max(scores) == -math.inf:
            continue
        top = max(scores)
        lse[b, i] = top + math.log(sum(math.exp(s - top) for s in scores))
        for j, score in zip(seen, scores, strict=True):
            weight = math.exp(score - lse[b, i])
            out[b, i] += weight * x[b, j]
            mass[b, j] += weight
    return out, lse, mass


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_matches_float64_formulation(masked, indexed, windowed, full):
    query, memory, position, bias = inputs(torch.float32)
    options: dict[str, Any] = {
        "position": position if full else None,
        "bias": bias if full else None,
        "key_mask": KEY_MASK if masked else None,
        "index": INDEX if indexed else None,
        "window": WINDOW if windowed else None,
        "scale": 0.6,
    }
    out, lse, mass = attend_memory(query, memory, **options, return_mass=True)
    expected = naive(query, memory, **options)
    assert out.dtype == lse.dtype == mass.dtype == torch.float32
    assert not mass.requires_grad
    for ours, theirs in zip((out, lse, mass), expected, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=2e-5, atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(0, 3),
    rows=st.integers(0, 5),
    size=st.integers(0, 6),
    width=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    position=st.booleans(),
    mask=st.booleans(),
    index=st.booleans(),
    window=st.booleans(),
)
def test_any_shape(batch, rows, size, width, seed, position, mask, index, window):
    query, memory, offset, bias = inputs(torch.float64, seed, batch, rows, size, width)
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {
        "position": offset if position else None,
        "bias": bias,
        "key_mask": torch.rand(batch, size, generator=generator) > 0.4 if mask else None,
        "index": torch.randint(-1, size + 1, (batch, 4), generator=generator) if index else None,
        "window": torch.randint(-1, 7, (batch, rows, 2), generator=generator) if window else None,
        "scale": -0.4,
    }
    results = attend_memory(query, memory, **options, return_mass=True)
    for ours, theirs in zip(results, naive(query, memory, **options), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-10, atol=1e-12)
    results[0].sum().backward()
    assert memory.grad is None or memory.grad.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("windowed", [False, True])
def test_gradcheck(masked, indexed, windowed):
    tensors = inputs()

    def attend(query, memory, position, bias):
        out, lse = attend_memory(
            query,
            memory,
            position=position,
            bias=bias,
            key_mask=KEY_MASK if masked else None,
            index=INDEX if indexed else None,
            window=WINDOW if windowed else None,
            scale=0.6,
        )
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    assert torch.autograd.gradcheck(attend, tensors)


def test_gradients_match_the_reference_under_autograd():
    tensors = inputs(torch.float32)
    query, memory, position, bias = tensors
    ours = attend_memory(query, memory, position=position, bias=bias, scale=0.5)
    theirs = reference(AttentionInputs(query, memory, position, bias, None, None, None, 0.5), False, False)
    gradients = [
        torch.autograd.grad(out.square().sum() + lse.square().sum(), tensors) for out, lse in (ours, theirs[:2])
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_without_the_stash_takes_the_probabilities_again():
    tensors = inputs(torch.float32)
    gradients = []
    for stash in (True, False):
        out, lse, _, probability = torch.ops.bridge_stg.attend_memory(
            *tensors, KEY_MASK, INDEX, WINDOW, 0.5, False, stash, "reference"
        )
        assert probability.shape == ((2, 5, 5) if stash else (0,))
        loss = out.square().sum() + lse.masked_fill(lse.isneginf(), 0.0).sum()
        gradients.append(torch.autograd.grad(loss, tensors))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_only_needed_gradients_are_made():
    query, memory, position, bias = inputs(torch.float32, grad=False)
    bias.requires_grad_()
    out, lse = attend_memory(query, memory, position=position, bias=bias, scale=1.0)
    lse.sum().backward()
    assert query.grad is None and memory.grad is None and position.grad is None
    torch.testing.assert_close(bias.grad.sum(), torch.tensor(10.0))
    assert out.requires_grad


def test_no_stash_without_gradients():
    query, memory, _, _ = inputs(torch.float32)
    with torch.no_grad():
        out, _ = attend_memory(query, memory, scale=1.0)
    assert out.grad_fn is None


@pytest.mark.parametrize("how", ["mask", "bias", "index", "window"])
def test_blind_rows_are_zero_with_zero_gradients(how):
    query, memory, position, bias = inputs(torch.float32)
    options: dict[str, Any] = {
        "mask": {"key_mask": torch.zeros(2, 7, dtype=torch.bool), "bias": bias},
        "bias": {"bias": bias * 0 - math.inf},
        "index": {"index": torch.full((2, 3), -1), "bias": bias},
        "window": {"window": torch.zeros(2, 5, 2, dtype=torch.int32), "bias": bias},
    }[how]
    out, lse, mass = attend_memory(query, memory, position=position, **options, scale=1.0, return_mass=True)
    assert (out == 0).all() and lse.isneginf().all() and (mass == 0).all()
    inputs_seen = (query, memory, position) if how == "bias" else (query, memory, position, bias)
    for gradient in torch.autograd.grad(out.sum() + lse.sum(), inputs_seen):
        assert (gradient == 0).all()


def test_hidden_rows_may_hold_anything():
    query, memory, position, _ = inputs(torch.float32, grad=False)
    poisoned = memory.clone()
    poisoned[:, [1, 4]] = math.nan
    mask = torch.tensor([True, False, True, True, False, True, True]).expand(2, -1)
    index = torch.tensor([0, 2, 3, 5, 6]).expand(2, -1)
    clean = attend_memory(query, memory, position=position, key_mask=mask, scale=0.5)[0]
    ways: tuple[dict[str, Any], ...] = ({"key_mask": mask}, {"index": index})
    for options in ways:
        leaves = [x.clone().requires_grad_() for x in (query, poisoned, position)]
        out, _ = attend_memory(leaves[0], leaves[1], position=leaves[2], **options, scale=0.5)
        torch.testing.assert_close(out, clean)
        for gradient in torch.autograd.grad(out.square().sum(), leaves):
            assert gradient.isfinite().all()


def test_an_index_far_outside_reads_nothing():
    query, memory, _, _ = inputs(torch.float32)
    index = torch.tensor([[2, 2**40, -(2**40)], [7, -1, 0]])
    out, _, mass = attend_memory(query, memory, index=index, scale=1.0, return_mass=True)
    torch.testing.assert_close(out[0], memory[0, 2].expand(5, -1))
    torch.testing.assert_close(mass.sum(dim=1), torch.full((2,), 5.0))
    out.sum().backward()
    assert memory.grad[0, 2].abs().sum() > 0 and memory.grad[0, 3:].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    query, memory, position, bias = (x.detach() for x in inputs(torch.float32, width=64, size=33))
    halves = [x.to(dtype).requires_grad_() for x in (query, memory, position)]
    bias = bias.requires_grad_()
    out, lse, mass = attend_memory(halves[0], halves[1], position=halves[2], bias=bias, scale=0.2, return_mass=True)
    assert out.dtype == dtype and lse.dtype == mass.dtype == torch.float32
    wide = [x.detach().double() for x in halves]
    expected = attend_memory(wide[0], wide[1], position=wide[2], bias=bias, scale=0.2)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-2, atol=1e-2)
    out.float().sum().backward()
    assert halves[0].grad.dtype == halves[1].grad.dtype == dtype and bias.grad.dtype == torch.float32


def test_deterministic_with_repeated_index():
    query, memory, position, bias = inputs(torch.float32, size=40, width=16)
    index = torch.randint(0, 40, (2, 64), generator=torch.Generator().manual_seed(3))

    def once():
        out, lse, mass = attend_memory(
            query, memory, position=position, bias=bias, index=index, scale=0.3, return_mass=True
        )
        gradients = torch.autograd.grad(out.sum() + lse.sum(), (query, memory, position, bias))
        return [out, lse, mass, *gradients]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_gradient_of_the_gradient_is_refused():
    query, memory, _, _ = inputs()
    out, _ = attend_memory(query, memory, scale=1.0)
    (gradient,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


def test_strides_do_not_matter():
    query, memory, _, _ = inputs(torch.float32, grad=False)
    permuted = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (query, memory)]
    out, _ = attend_memory(*permuted, scale=1.0)
    torch.testing.assert_close(out, attend_memory(query, memory, scale=1.0)[0])
    assert out.is_contiguous()


def call(**changes):
    arguments: dict[str, Any] = {
        "query": torch.zeros(2, 5, 4),
        "memory": torch.zeros(2, 7, 4),
        "scale": 1.0,
    } | changes
    return attend_memory(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(5, 4)}, ValueError, "query must have shape [B, R, C], got 2 axes [5, 4]."),
        ({"memory": torch.zeros(2, 7, 3)}, ValueError, "with C=4 (from query), got [2, 7, 3]."),
        (
            {"memory": torch.zeros(2, 7, 4).double()},
            TypeError,
            "memory must have the dtype of query (torch.float32), got torch.float64.",
        ),
        ({"position": torch.zeros(2, 6, 4)}, ValueError, "with M=7 (from memory), got [2, 6, 4]."),
        ({"bias": torch.zeros(2, 7).long()}, TypeError, "bias must be torch.float32 or"),
        ({"key_mask": torch.zeros(2, 7)}, TypeError, "key_mask must be torch.bool, got torch.float32."),
        ({"index": torch.zeros(2, 3).int()}, TypeError, "index must be torch.int64, got torch.int32."),
        ({"index": torch.zeros(3, 3).long()}, ValueError, "with B=2 (from query), got [3, 3]."),
        (
            {"window": torch.zeros(2, 5, 3).long()},
            ValueError,
            "window must have shape [B, R, 2], got [2, 5, 3].",
        ),
        ({"scale": None}, TypeError, "scale must be a number, got NoneType."),
        (
            {"index": torch.tensor([[0], [7]]), "validate": True},
            ValueError,
            "index must be in -1..6 (rows of the memory), got 7.",
        ),
        ({"index": torch.tensor([[-2], [7]]), "validate": True}, ValueError, "got -2."),
        (
            {"window": torch.tensor([3, 1]).expand(2, 5, 2), "validate": True},
            ValueError,
            "window must have start <= end, got [3, 1).",
        ),
        ({"backend": "magic"}, ValueError, "attend_memory has no backend 'magic'; it has "),
    ],
)
def test_misuse_is_a_sentence(changes, error, message):
    with pytest.raises(error) as caught:
        call(**changes)
    assert message in str(caught.value)
    assert str(caught.value).startswith("attend_memory")


def test_validate_accepts_padded_indices():
    call(index=torch.tensor([[0, -1], [6, -1]]), window=torch.tensor([0, 9]).expand(2, 5, 2), validate=True)
