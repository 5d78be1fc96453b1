"""`MultiLayerQueryCrossAttention`: L attentions over one memory."""

from __future__ import annotations

import pytest
import torch

from bridge_stg.modules import MultiLayerQueryCrossAttention


def test_all_at_once_equals_layer_by_layer():
    stack = MultiLayerQueryCrossAttention(16, 4, 3)
    queries, memory = torch.randn(3, 2, 4, 16), torch.randn(2, 9, 16, requires_grad=True)
    bias = torch.randn(2, 9)
    outputs = stack(queries, memory, bias=bias)
    assert len(stack) == len(outputs) == 3
    for i, out in enumerate(outputs):
        assert torch.equal(out, stack.layer(i, queries[i], memory, bias=bias))
        torch.testing.assert_close(out, stack.layers[i](queries[i], memory, bias=bias)[0])
    leaves = (memory, *stack.parameters())
    gradients = torch.autograd.grad(torch.stack(outputs).square().sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients) and gradients[0].abs().sum() > 0


def test_layers_differ():
    stack = MultiLayerQueryCrossAttention(16, 4, 2, bias=False, path="absorbed")
    query, memory = torch.randn(2, 4, 16), torch.randn(2, 9, 16)
    first, second = stack([query, query], memory)
    assert not torch.allclose(first, second)


def test_misuse_is_a_sentence():
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        MultiLayerQueryCrossAttention(16, 4, 0)
    stack = MultiLayerQueryCrossAttention(16, 4, 3)
    with pytest.raises(ValueError, match="one tensor for each of 3 layers, got 2"):
        stack(torch.zeros(2, 1, 4, 16), torch.zeros(1, 5, 16))
