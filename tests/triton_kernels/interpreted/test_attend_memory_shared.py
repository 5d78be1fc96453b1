"""The gradient of a shared memory in the interpreter: the sum of what each layer gives alone."""

from __future__ import annotations

import math

import pytest
import torch
from bridge_stg.triton_kernels.attend_memory.records import AttentionBackward, AttentionInputs
from bridge_stg.triton_kernels.attend_memory.shared_backward import LayerRows, memory_gradients

from bridge_stg.ops.attend_memory.reference import reference, reference_backward

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, at infinities
]


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def layer_and_gradients(memory, position, bias, key_mask, rows, scale):
    """What a layer adds to the gradient, and its d memory and d position from the float64 reference."""
    batch, _, width = memory.shape
    query, d_out = normal(batch, rows, width, dtype=memory.dtype), normal(batch, rows, width, dtype=memory.dtype)
    d_lse = normal(batch, rows).double()
    wide = [None if x is None else x.double() for x in (query, memory, position, bias)]
    inputs = AttentionInputs(*wide, key_mask, None, None, scale)
    out, lse, _, saved = reference(inputs, False, True)
    delta = (d_out.double() * out).sum(-1) - d_lse
    call = AttentionBackward(inputs, d_out.double(), d_lse, lse, saved, False, True, position is not None, False)
    _, d_memory, d_position, _ = reference_backward(call)
    layer = LayerRows(query, d_out, lse.float(), delta.float(), bias, key_mask, scale)
    return layer, d_memory, d_position


def check(memory, position, parts, need_position=True, tolerance=2e-4):
    need_position = need_position and position is not None
    d_memory, d_position = memory_gradients([part[0] for part in parts], memory, position, need_position)
    torch.testing.assert_close(d_memory.double(), sum(part[1] for part in parts), rtol=tolerance, atol=tolerance)
    if not need_position:
        assert d_position is None
    else:
        torch.testing.assert_close(d_position.double(), sum(p[2] for p in parts), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layers", range(1, 9))
def test_sum_over_layers(layers):
    memory, position = normal(2, 37, 64), normal(2, 37, 64)
    parts = [layer_and_gradients(memory, position, None, None, 6, 0.2) for _ in range(layers)]
    check(memory, position, parts)


@pytest.mark.parametrize("has_position", [False, True])
def test_layers_that_differ(has_position):
    """In rows, scale, bias and mask: some without, a mask that hides every key, a bias of -inf."""
    memory = normal(2, 37, 40)
    position = normal(2, 37, 40) if has_position else None
    bias = normal(2, 37)
    bias[:, 5] = -math.inf
    some, none = torch.rand(2, 37) > 0.4, torch.zeros(2, 37, dtype=torch.bool)
    settings = [(4, 0.2, None, None), (21, 0.1, bias, some), (1, -0.3, None, none), (5, 0.2, bias, None)]
    parts = [layer_and_gradients(memory, position, b, m, rows, scale) for rows, scale, b, m in settings]
    check(memory, position, parts)
    check(memory, position, parts, need_position=False)


@pytest.mark.parametrize("width", [256, 512])
def test_half_precision_and_strides(width):
    memory = normal(33, 1, width, dtype=torch.float16).transpose(0, 1)
    mask = torch.rand(1, 33) > 0.2
    parts = [layer_and_gradients(memory, None, normal(1, 33), mask, 9, width**-0.5) for _ in range(2)]
    check(memory, None, parts, tolerance=1e-2)


def test_one_mask_of_all_layers_hides_what_rows_hold():
    memory, position = normal(1, 20, 64), normal(1, 20, 64)
    mask = torch.rand(1, 20) > 0.4
    parts = [layer_and_gradients(memory, position, None, mask, 3, 0.2) for _ in range(2)]
    spoilt = memory.masked_fill(~mask[:, :, None], math.nan)
    check(spoilt, position, parts)


def test_twice_the_same_bits():
    memory = normal(2, 70, 64)
    layers = [layer_and_gradients(memory, None, normal(2, 70), None, 20, 0.2)[0] for _ in range(3)]
    first, second = (memory_gradients(layers, memory, None, False)[0] for _ in range(2))
    assert torch.equal(first, second)
