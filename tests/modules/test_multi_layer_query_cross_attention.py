"""`MultiLayerQueryCrossAttention`: L attentions over one memory."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from bridge_stg.modules import MemoryCrossAttention, MultiLayerQueryCrossAttention, importance


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
    query, memory = torch.zeros(2, 4, 16), torch.zeros(2, 9, 16)
    with pytest.raises(TypeError, match="num_layers must be an int, got str"):
        MultiLayerQueryCrossAttention(16, 4, cast(Any, "3"))
    with pytest.raises(TypeError, match="queries must be a tensor or a list of tensors, got NoneType"):
        stack(cast(Any, None), memory)
    for wrong in (3, -4):
        with pytest.raises(ValueError, match=rf"i must be in -3\.\.2 \(layers\), got {wrong}"):
            stack.layer(wrong, query, memory)
    with pytest.raises(TypeError, match="i must be an int, got str"):
        stack.layer(cast(Any, "0"), query, memory)
    with pytest.raises(ValueError, match=r"share: memory must have shape \[B, M, 16\], got 2 axes \[9, 16\]"):
        stack.share(memory[0], queries=4)
    with pytest.raises(ValueError, match=r"share: memory must have shape \[M, B, 8\], got \[9, 2, 16\]"):
        MultiLayerQueryCrossAttention(8, 4, 3, batch_first=False).share(memory.transpose(0, 1), queries=4)
    with pytest.raises(ValueError, match=r"position must have shape \[B, M, 16\] with M=9"):
        stack.share(memory, queries=4, position=memory[:, 1:])
    with pytest.raises(ValueError, match="queries must be at least 0, got -1"):
        stack.share(memory, queries=-1)
    with pytest.raises(
        TypeError, match="attention must be a MemoryCrossAttention or a MultiLayerQueryCrossAttention, got Mult"
    ):
        importance(cast(Any, torch.nn.MultiheadAttention(16, 4)), query, memory)


def test_one_clip_without_its_axis():
    stack = MultiLayerQueryCrossAttention(16, 4, 2)
    queries, memory = torch.randn(2, 3, 16), torch.randn(9, 16)
    expected = stack(queries[:, None], memory[None])
    for a, b in zip(stack(queries, memory), expected, strict=True):
        torch.testing.assert_close(a, b[0])


def test_layers_that_differ_are_not_projected_at_once():
    stack = MultiLayerQueryCrossAttention(16, 4, 2, path="projected")
    stack.layers[1] = MemoryCrossAttention(16, 2, bias=False, path="projected")
    query, memory = torch.randn(2, 3, 16), torch.randn(2, 9, 16)
    shared = stack.share(memory, queries=3, fuse=True)
    for i in range(2):
        torch.testing.assert_close(stack.layer(i, query, shared), stack.layer(i, query, memory.clone()))
