"""`MemoryCrossAttention` in the place of `nn.MultiheadAttention`: the same call gives the same answer and gradients."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bridge_stg.modules import MemoryCrossAttention
from bridge_stg.modules.memory_cross_attention import Path

B, Q, M, C, H = 3, 5, 7, 16, 4
WIDTHS = {"one": (None, None), "value apart": (None, None), "widths apart": (12, 20)}
PATHS: tuple[Path, ...] = ("auto", "absorbed", "projected")


def pair(widths: str, path: Path, **options) -> tuple[nn.MultiheadAttention, MemoryCrossAttention]:
    kdim, vdim = WIDTHS[widths]
    theirs = nn.MultiheadAttention(C, H, kdim=kdim, vdim=vdim, **{"batch_first": True, **options})
    for bias in (theirs.in_proj_bias, theirs.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return theirs, MemoryCrossAttention.from_multihead_attention(theirs, path)


def masks(batched: bool, kind: str, rows: str) -> tuple[Tensor | None, Tensor | None]:
    """A padding mask and a mask per query, that leave every query a key."""
    clips = (B,) if batched else ()
    padding = torch.rand(*clips, M) > 0.6
    grid = torch.rand(*((B if batched else 1) * H,) * (rows == "heads"), Q, M) > 0.7
    padding[..., 0] = grid[..., 0] = False
    if kind == "float":
        padding, grid = (torch.randn(x.shape) for x in (padding, grid))
    return (None if rows == "none" else padding), (None if rows == "padding" else grid)


def answers(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest) -> tuple[Tensor | None, ...]:
    attention.zero_grad()
    out, weights = attention(query, key, value, *rest)
    total = out.square().sum() + (0 if weights is None else weights.square().sum())
    leaves = [query, key] if value is key else [query, key, value]
    return out, weights, *torch.autograd.grad(total, [*leaves, *attention.parameters()])


def assert_alike(ours, theirs):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-5 if i < 2 else 1e-4, atol=1e-5 if i < 2 else 1e-4)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["batch first", "length first", "one clip"])
def test_every_argument_by_position_gives_the_same(widths, path, layout):
    torch.manual_seed(0)
    theirs, ours = pair(widths, path, batch_first=layout == "batch first")

    def tensor(length: int, width: int | None) -> Tensor:
        shape = {"batch first": (B, length), "length first": (length, B), "one clip": (length,)}[layout]
        return torch.randn(*shape, width or C, requires_grad=True)

    query, key = tensor(Q, None), tensor(M, WIDTHS[widths][0])
    value = key if widths == "one" else tensor(M, WIDTHS[widths][1])
    for kind, rows in itertools.product(("bool", "float"), ("none", "padding", "queries", "heads")):
        padding, grid = masks(layout != "one clip", kind, rows)
        for need_weights, average in ((False, True), (True, True), (True, False)):
            call = (query, key, value, padding, need_weights, grid, average, False)
            assert_alike(answers(ours, *call), answers(theirs, *call))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
def test_state_dicts_go_both_ways(bias, widths):
    kdim, vdim = WIDTHS[widths]
    # By position, as nn.MultiheadAttention orders them.
    arguments = (C, H, 0.0, bias, False, False, kdim, vdim, True, "cpu", torch.float64)
    theirs, ours = nn.MultiheadAttention(*arguments), MemoryCrossAttention(*arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    nn.MultiheadAttention(*arguments).load_state_dict(ours.state_dict())
    query, key, value = (torch.randn(B, n, w or C, dtype=torch.float64) for n, w in ((Q, C), (M, kdim), (M, vdim)))
    torch.testing.assert_close(ours(query, key, value)[0], theirs(query, key, value)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_in_training_drops_the_same_weights(need_weights):
    theirs, ours = pair("one", "auto", dropout=0.4)
    query, memory = torch.randn(B, Q, C), torch.randn(B, M, C)
    drawn = []
    for attention in (theirs, ours):
        torch.manual_seed(1)
        drawn.append(attention(query, memory, memory, need_weights=need_weights))
    assert_alike(drawn[1], drawn[0])
    plain = ours.eval()(query, memory)[0]
    torch.testing.assert_close(plain, theirs.eval()(query, memory, memory)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, drawn[1][0])
    ours.train().library = "flex"
    with pytest.raises(ValueError, match="library must be 'sdpa' or None with dropout, got 'flex'"):
        ours(query, memory)


@pytest.mark.parametrize("path", ["absorbed", "projected"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(path, dtype):
    theirs, ours = pair("one", path)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    query, memory = torch.randn(B, Q, C).to(dtype), torch.randn(B, M, C).to(dtype)
    grid = torch.randn(Q, M).to(dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-2
    for mask in (None, grid):
        expected = theirs(query, memory, memory, attn_mask=mask)[0]
        torch.testing.assert_close(ours(query, memory, attn_mask=mask)[0], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("path", ["absorbed", "projected"])
@pytest.mark.parametrize("shape", [(0, Q, M), (B, 0, M), (B, Q, 0)])
@pytest.mark.parametrize("need_weights", [False, True])
def test_empty_tensors(path, shape, need_weights):
    theirs, ours = pair("one", path)
    query, memory = torch.randn(shape[0], shape[1], C), torch.randn(shape[0], shape[2], C)
    call = (query, memory, memory, None, need_weights)
    for a, b in zip(ours(*call), theirs(*call), strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_query_that_sees_no_key_gives_the_output_bias(path, need_weights):
    theirs, ours = pair("one", path)
    query, memory = torch.randn(B, Q, C, requires_grad=True), torch.randn(B, M, C, requires_grad=True)
    hidden = torch.zeros(Q, M, dtype=torch.bool)
    hidden[2] = True
    out, weights = ours(query, memory, attn_mask=hidden, need_weights=need_weights)
    torch.testing.assert_close(out[:, 2], ours.out_proj.bias.expand(B, -1))
    expected = theirs(query, memory, memory, attn_mask=hidden)[0]
    torch.testing.assert_close(out[:, [0, 1, 3, 4]], expected[:, [0, 1, 3, 4]], rtol=1e-5, atol=1e-5)
    if need_weights:
        assert (weights[:, 2] == 0).all()
    gradients = torch.autograd.grad(out.square().sum(), (query, memory))
    assert all(gradient.isfinite().all() for gradient in gradients) and (gradients[0][:, 2] == 0).all()


def test_position_and_bias_go_with_every_way():
    """A position is added to the keys, a bias to the scores, on the projected way with a mask per query too."""
    theirs, ours = pair("one", "auto")
    query, memory, position, bias = torch.randn(B, Q, C), torch.randn(B, M, C), torch.randn(B, M, C), torch.randn(B, M)
    grid = torch.randn(B * H, Q, M)
    expected = theirs(query, memory + position, memory, key_padding_mask=bias, attn_mask=grid)
    found = ours(query, memory, position=position, bias=bias, attn_mask=grid, need_weights=True)
    assert_alike(found, expected)
    for option in ({"position": position}, {}):
        keys = memory + option.get("position", 0)
        mass = ours(query, memory, **option, attn_mask=grid, need_mass=True)[1]
        torch.testing.assert_close(mass, theirs(query, keys, memory, attn_mask=grid)[1].mean(dim=1))


@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_decoder_layers_take_it(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(C, H, 32, dropout=0.0, batch_first=batch_first)
    theirs = nn.TransformerDecoder(layer, 2)
    ours = copy.deepcopy(theirs)
    for swapped in ours.layers:
        for name in ("self_attn", "multihead_attn"):
            setattr(swapped, name, MemoryCrossAttention.from_multihead_attention(getattr(swapped, name)))
    target, memory = torch.randn(B, Q, C), torch.randn(B, M, C)
    options = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(Q),
        "tgt_is_causal": True,
        "memory_mask": torch.randn(Q, M),
        "memory_key_padding_mask": torch.randn(B, M),
    }
    arranged = (target, memory) if batch_first else (target.transpose(0, 1), memory.transpose(0, 1))
    for call in ({}, options):
        torch.testing.assert_close(ours(*arranged, **call), theirs(*arranged, **call), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(target[0], memory[0]), theirs(target[0], memory[0]), rtol=1e-5, atol=1e-5)
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(again(*arranged), ours(*arranged))


def test_torch_encoder_layers_take_it_where_they_fuse():
    layer = nn.TransformerEncoderLayer(C, H, 32, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    ours = copy.deepcopy(theirs)
    for layer in ours.layers:
        layer.self_attn = MemoryCrossAttention.from_multihead_attention(layer.self_attn)
    x, padding = torch.randn(B, M, C), torch.zeros(B, M, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        for mask in (None, padding):
            expected, found = (net(x, src_key_padding_mask=mask) for net in (theirs, ours))
            seen = slice(None) if mask is None else ~mask
            torch.testing.assert_close(found[seen], expected[seen], rtol=1e-5, atol=1e-5)


def test_detr_calls_it_by_name():
    """As the decoder layers of facebookresearch/detr do: lengths first, a position on the keys, all masks None."""
    theirs, ours = pair("one", "auto", batch_first=False)
    query, memory, position = torch.randn(Q, B, C), torch.randn(M, B, C), torch.randn(M, B, C)
    call = {"query": query, "key": memory + position, "value": memory, "attn_mask": None, "key_padding_mask": None}
    expected = theirs(**call)[0]
    torch.testing.assert_close(ours(**call)[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(query, memory, position=position)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_hook_that_casts_key_and_value_apart():
    _, ours = pair("one", "absorbed")
    query, memory = torch.randn(B, Q, C), torch.randn(B, M, C)
    expected = ours(query, memory)[0]
    ours.register_forward_pre_hook(lambda module, inputs: tuple(x.double().float() for x in inputs))
    torch.testing.assert_close(ours(query, memory, memory)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_value_that_shares_storage_keeps_its_own_gradient():
    _, ours = pair("one", "absorbed")
    query, memory = torch.randn(B, Q, C), torch.randn(B, M, C, requires_grad=True)
    whole = torch.autograd.grad(ours(query, memory, memory)[0].square().sum(), memory)[0]
    keys = torch.autograd.grad(ours(query, memory, memory.detach())[0].square().sum(), memory)[0]
    assert not torch.allclose(whole, keys, atol=1e-3)


def test_functional_gradients_of_each_sample():
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    ours = MemoryCrossAttention.from_multihead_attention(theirs)
    generator = torch.Generator().manual_seed(3)
    query, memory = (torch.randn(2, length, 16, generator=generator) for length in (3, 40))
    assert ours.absorbs(3, 40)
    found = []
    for module, rest in ((theirs, 2), (ours, 1)):

        def loss(parameters, query, memory, module=module, rest=rest):
            args = (query[None], *[memory[None]] * rest)
            return functional_call(module, parameters, args, {"need_weights": False})[0].square().sum()

        found.append(vmap(grad(loss), (None, 0, 0))(dict(module.named_parameters()), query, memory))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_vmap_of_a_module_that_trains():
    attention = MemoryCrossAttention(16, 4, path="absorbed")
    query, memory = torch.randn(2, 3, 16), torch.randn(2, 9, 16)
    mapped = vmap(lambda q, m: attention(q[None], m[None])[0][0])(query, memory)
    torch.testing.assert_close(mapped, attention(query, memory)[0])
