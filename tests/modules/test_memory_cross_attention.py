"""`MemoryCrossAttention` against `nn.MultiheadAttention`, on both of its ways."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import nn

from bridge_stg.modules import MemoryCrossAttention
from bridge_stg.modules.memory_cross_attention import Path

PATHS: tuple[Path, ...] = ("absorbed", "projected")


def multihead(batch_first: bool = True, bias: bool = True, dim: int = 32) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(dim, 4, bias=bias, batch_first=batch_first)
    if bias:
        nn.init.normal_(attention.in_proj_bias)
        nn.init.normal_(attention.out_proj.bias)
    return attention


def tensors(batch: int = 3, queries: int = 5, size: int = 17, dim: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, queries, dim, generator=generator).requires_grad_(),
        torch.randn(batch, size, dim, generator=generator).requires_grad_(),
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_multihead_attention(path, batch_first, bias):
    theirs = multihead(batch_first, bias)
    ours = MemoryCrossAttention.from_multihead_attention(theirs, path)
    query, memory = tensors()
    padding = torch.rand(3, 17, generator=torch.Generator().manual_seed(2)) > 0.6
    arranged = (query, memory) if batch_first else (query.transpose(0, 1), memory.transpose(0, 1))
    results = []
    for attention in (ours, theirs):
        attention.zero_grad()
        out, weights = attention(arranged[0], arranged[1], arranged[1], key_padding_mask=padding, need_weights=False)
        assert weights is None
        gradients = torch.autograd.grad(
            out.square().sum(), (query, memory, attention.get_parameter("in_proj_weight"), attention.out_proj.weight)
        )
        results.append((out, *gradients))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_parameters_and_weights_are_those_of_multihead_attention(path):
    theirs = multihead()
    ours = MemoryCrossAttention.from_multihead_attention(theirs.eval(), path)
    assert not ours.training
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    query, memory = tensors()
    padding = torch.zeros(3, 17, dtype=torch.bool)
    padding[:, 10:] = True
    out, weights = ours(query, memory, key_padding_mask=padding, need_weights=True)
    expected, expected_weights = theirs(query, memory, memory, key_padding_mask=padding)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)


def test_both_initialise_alike():
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(16, 2)
    torch.manual_seed(3)
    ours = MemoryCrossAttention(16, 2, batch_first=False)
    assert torch.equal(ours.get_parameter("in_proj_weight"), theirs.in_proj_weight)
    for name in ("in_proj_bias", "out_proj.bias"):
        assert ours.get_parameter(name).abs().sum() == theirs.get_parameter(name).abs().sum() == 0


def test_position_and_bias_agree_between_ways_and_with_the_formula():
    attention = MemoryCrossAttention.from_multihead_attention(multihead())
    query, memory = tensors()
    position = torch.randn(3, 17, 32, requires_grad=True)
    bias = torch.randn(3, 17, requires_grad=True)
    leaves = (query, memory, position, bias)
    results = []
    for path in PATHS:
        attention.path = path
        out, _ = attention(query, memory, position=position, bias=bias)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    q, k, v = (
        (x @ w.T + b).unflatten(-1, (4, 8)).transpose(1, 2)
        for x, w, b in zip(
            (query, memory + position, memory),
            attention.get_parameter("in_proj_weight").chunk(3),
            attention.get_parameter("in_proj_bias").chunk(3),
            strict=True,
        )
    )
    weights = (q @ k.transpose(2, 3) / math.sqrt(8) + bias[:, None, None]).softmax(-1)
    expected = attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(results[0][0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", ["padding", "bias"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_clip_without_keys_gives_the_output_bias(path, how, need_weights):
    attention = MemoryCrossAttention.from_multihead_attention(multihead(), path)
    query, memory = tensors()
    padding = torch.zeros(3, 17, dtype=torch.bool)
    padding[1] = True
    options: dict[str, Any] = {"key_padding_mask": padding}
    if how == "bias":
        options = {"bias": torch.zeros(3, 17).masked_fill(padding, -math.inf)}
    out, _ = attention(query, memory, **options, need_weights=need_weights)
    torch.testing.assert_close(out[1], attention.out_proj.bias.expand(5, -1))
    alone, _ = attention(query, memory)
    torch.testing.assert_close(out[0], alone[0])
    gradients = torch.autograd.grad(out.square().sum(), (query, memory))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[1][1] == 0).all()


def test_auto_follows_the_rule(monkeypatch):
    attention = MemoryCrossAttention(256, 8)
    assert attention.uses_absorption(16, 8192) and attention.uses_absorption(4, 64)
    assert not attention.uses_absorption(48, 8192) and not attention.uses_absorption(32, 64)
    wide = MemoryCrossAttention(1024, 16)
    assert wide.uses_absorption(16, 4096) and not wide.uses_absorption(16, 4096, "cuda")
    taken = []

    def spy(name, way):
        def call(*inputs):
            taken.append(name)
            return way(*inputs)

        return call

    for name in ("_absorbed", "_projected"):
        monkeypatch.setattr(attention, name, spy(name, getattr(attention, name)))
    few, many = torch.randn(1, 4, 256), torch.randn(1, 64, 256)
    attention(few, many)
    attention(many, few)
    assert taken == ["_absorbed", "_projected"]


@pytest.mark.parametrize("path", PATHS)
def test_half_precision_and_autocast(path):
    attention = MemoryCrossAttention.from_multihead_attention(multihead(), path)
    query, memory = tensors()
    bias = torch.randn(3, 17, requires_grad=True)
    expected, _ = attention(query, memory, bias=bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = attention(query, memory, bias=bias)
    half, _ = attention.to(torch.bfloat16)(query.bfloat16(), memory.bfloat16(), bias=bias)
    for out in (cast, half):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
        gradients = torch.autograd.grad(out.float().sum(), (bias, memory))
        assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients)


def test_misuse_is_a_sentence():
    with pytest.raises(ValueError, match="num_heads must divide embed_dim=10, got 4"):
        MemoryCrossAttention(10, 4)
    with pytest.raises(ValueError, match="path must be 'auto', 'absorbed' or 'projected', got 'fast'"):
        MemoryCrossAttention(8, 4, path=cast(Path, "fast"))
    attention = MemoryCrossAttention(8, 4)
    query, memory = torch.zeros(2, 3, 8), torch.zeros(2, 5, 8)
    with pytest.raises(ValueError, match=r"query must have shape \[B, Q, 8\], got \[2, 3, 9\]"):
        attention(torch.zeros(2, 3, 9), memory)
    with pytest.raises(ValueError, match=r"value must have shape \[B, M, 8\] with M=5"):
        attention(query, memory, memory[:, 1:])
    with pytest.raises(ValueError, match=r"position must have shape \[M, B, 8\] with M=5 \(from memory\)"):
        MemoryCrossAttention(8, 4, batch_first=False)(
            torch.zeros(3, 2, 8), memory.transpose(0, 1), position=torch.zeros(4, 2, 8)
        )
    with pytest.raises(TypeError, match=r"key_padding_mask must be torch\.bool or .*, got torch\.int64"):
        attention(query, memory, key_padding_mask=torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"attn_mask must have shape \[Q, M\] or \[B\*H, Q, M\] with B\*H=8, got B\*H=4"
    ):
        attention(query, memory, attn_mask=torch.zeros(4, 3, 5))
    with pytest.raises(ValueError, match="is_causal needs an attn_mask"):
        attention(query, memory, is_causal=True)
    with pytest.raises(TypeError, match="must be given as memory or as key"):
        attention(query, memory, key=memory)
    with pytest.raises(TypeError, match="must be given as memory or as key"):
        attention(query)
    with pytest.raises(TypeError, match="memory must be a tensor, got list"):
        attention(query, [memory])
    with pytest.raises(ValueError, match="value must be given: it is 4 wide and the memory 8"):
        MemoryCrossAttention(8, 4, vdim=4)(query, memory)
    with pytest.raises(TypeError, match=r"query must have the dtype of the weights \(torch\.float32\)"):
        attention(query.half(), memory.half())
    with pytest.raises(ValueError, match=r"query must be on the device of the weights \(cpu\), got meta"):
        attention(query.to("meta"), memory.to("meta"))
    nested = torch.nested.nested_tensor([torch.zeros(3, 8), torch.zeros(4, 8)], layout=torch.jagged)
    with pytest.raises(TypeError, match="query must not be nested: pad it"):
        attention(nested, memory)


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((0, 1), {}, "embed_dim must be at least 1, got 0"),
        ((8, 0), {}, "num_heads must be at least 1, got 0"),
        ((8, True), {}, "num_heads must be an int, got bool"),
        (("8", 2), {}, "embed_dim must be an int, got str"),
        ((8, 2), {"kdim": 0}, "kdim must be at least 1, got 0"),
        ((8, 2), {"vdim": 2.0}, "vdim must be an int, got float"),
        ((8, 2), {"inner_dim": 3}, "num_heads must divide inner_dim=3, got 2"),
        ((8, 2, 1.5), {}, r"dropout must be in 0\.\.1, got 1\.5"),
        ((8, 2, math.nan), {}, "dropout must be .*, got nan"),
        ((8, 2, "0"), {}, "dropout must be a number, got str"),
        ((8, 2), {"dtype": torch.int64}, r"dtype must be floating point, got torch\.int64"),
        ((8, 2), {"add_bias_kv": True}, "add_bias_kv and add_zero_attn must be False"),
        ((8, 2), {"add_zero_attn": True}, "add_bias_kv and add_zero_attn must be False"),
    ],
)
def test_a_bad_constructor_argument_is_a_sentence(arguments, options, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        MemoryCrossAttention(*arguments, **options)
