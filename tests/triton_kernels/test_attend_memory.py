"""The Triton kernels of `attend_memory`: that all the heuristics choose compiles, and results on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from bridge_stg.triton_kernels.attend_memory.backward import backward, forward
from bridge_stg.triton_kernels.attend_memory.records import AttentionBackward, AttentionInputs
from bridge_stg.triton_kernels.attend_memory.shared_backward import LayerRows, memory_gradients

from benchmarks.gpu.ahead_of_time import ARCHITECTURES, compile_variant, distinct, record
from bridge_stg.ops import attend_memory
from bridge_stg.ops.attend_memory.reference import reference, reference_backward
from bridge_stg.ops.core.backends import choose_backend

from .resource_tables import gate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EVERYTHING = ("position", "bias", "key_mask", "index", "window")
PLAIN = ("bias", "key_mask")


def launch(width, dtype, names, *, batch=1, rows=128, size=8192, mass=True):
    """Forward and backward on meta tensors, with all gradients."""

    def run():
        with torch.device("meta"):
            query, memory = torch.empty(batch, rows, width, dtype=dtype), torch.empty(batch, size, width, dtype=dtype)
            options = {
                "position": torch.empty_like(memory),
                "bias": torch.empty(batch, size),
                "key_mask": torch.empty(batch, size, dtype=torch.bool),
                "index": torch.empty(batch, size // 2, dtype=torch.int64),
                "window": torch.empty(batch, rows, 2, dtype=torch.int64),
            }
        sides = [options[name] if name in names else None for name in EVERYTHING]
        inputs = AttentionInputs(query, memory, *sides, 0.1)
        out, lse, _, _ = forward(inputs, mass)
        backward(AttentionBackward(inputs, out, lse, lse, out, *(x is not None for x in inputs[:4])))

    return run


def launch_shared(width, dtype, position):
    """Three layers with a bias each."""

    def run():
        with torch.device("meta"):
            memory, query = torch.empty(1, 8192, width, dtype=dtype), torch.empty(1, 128, width, dtype=dtype)
            lse, bias = torch.empty(1, 128), torch.empty(1, 8192)
        layers = [LayerRows(query, query, lse, lse, bias, None, 0.1)] * 3
        memory_gradients(layers, memory, memory if position else None, position)

    return run


# 96 is padded; 250 is read without the hint of alignment. float32, and the mass, are cut into chunks of columns: their
# wider widths differ in the number of chunks alone. Kernels without products are compiled at the ends of the range.
LAUNCHES = (
    {f"bf16-{width}": launch(width, BF16, EVERYTHING) for width in (64, 96, 128, 256, 512)}
    | {f"bf16-{width}-plain": launch(width, BF16, PLAIN, mass=False) for width in (256, 512)}
    | {f"fp32-{width}": launch(width, FP32, EVERYTHING) for width in (64, 256)}
    | {"bf16-250": launch(250, BF16, EVERYTHING), "fp32-250": launch(250, FP32, EVERYTHING)}
    | {"bf16-256-shared": launch_shared(256, BF16, True)}
)


def numbered(variants):
    """A kernel that one launch compiles twice gets a number."""
    seen = {}
    for variant in variants:
        seen[variant.name] = count = seen.get(variant.name, 0) + 1
        yield variant if count == 1 else replace(variant, name=f"{variant.name}-{count}")


LIGHT = ("merge", "delta", "mass", "sum_places")
VARIANTS = [
    variant
    for variant in numbered(distinct([variant for name, run in LAUNCHES.items() for variant in record(run, name)]))
    if not variant.kernel.__name__.endswith(LIGHT) or variant.name.startswith(("bf16-512/", "fp32-250/"))
]


@pytest.mark.parametrize("cc", ARCHITECTURES)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_compiles_within_its_resources(variant, cc):
    gate("attend_memory", variant.name, cc, compile_variant(variant, cc))


def launched(run):
    return [variant.kernel.__name__.removeprefix("attend_memory_") for variant in record(run)]


def test_launches():
    """Splits are merged where there are several; places are summed only where an index names rows."""
    split = ["forward", "merge", "delta", "query_gradient", "merge", "memory_gradient"]
    assert launched(launch(256, BF16, (), mass=False)) == split
    whole = ["forward", "mass", "delta", "query_gradient", "memory_gradient"]
    assert launched(launch(256, BF16, PLAIN, batch=200)) == whole
    indexed = ["forward", "delta", "query_gradient", "memory_gradient", "sum_places"]
    assert launched(launch(256, BF16, ("index",), batch=200, mass=False)) == indexed


def test_sizes_do_not_specialise():
    """One compilation serves every M, K and R of a width."""
    found = [
        record(launch(256, BF16, PLAIN, rows=rows, size=size)) for rows, size in ((128, 8192), (33, 801), (64, 999))
    ]
    for variants in zip(*found, strict=True):
        signatures = [
            {name: kind[1:] if name.endswith("_stride") else kind for name, kind in variant.signature.items()}
            for variant in variants
        ]
        assert all(signature == signatures[0] for signature in signatures)


def test_layers_of_a_shared_memory_are_one_launch():
    assert launched(launch_shared(256, BF16, False)) == ["memory_gradient"]


def test_a_gpu_picks_the_kernels_but_not_for_what_they_cannot_do():
    def chosen(width, dtype):
        tensor = torch.empty(1, 4, width, dtype=dtype, device="meta")
        inputs = AttentionInputs(tensor, tensor, None, None, None, None, None, 1.0)
        return choose_backend("attend_memory", None, "cuda", inputs=inputs)

    assert chosen(512, BF16) == chosen(1, FP32) == "triton"
    assert chosen(513, BF16) == chosen(64, torch.float64) == "reference"


def draw(names, dtype, batch, rows, size, width):
    query = torch.randn(batch, rows, width, device="cuda").to(dtype)
    memory = torch.randn(batch, size, width, device="cuda").to(dtype)
    keys = max(size // 3, 1) if "index" in names else size
    start = torch.randint(0, max(keys // 2, 1), (batch, rows, 1), device="cuda")
    options = {
        "position": torch.randn_like(memory),
        "bias": torch.randn(batch, size, device="cuda"),
        "key_mask": torch.rand(batch, size, device="cuda") > 0.3,
        "index": torch.randint(-1, size, (batch, keys), device="cuda"),
        "window": torch.cat([start, start + keys // 2 + 1], dim=2),
    }
    return query, memory, {name: options[name] for name in names}


def eager(query, memory, options, scale):
    """The formula in the dtype of the query."""
    position, bias, mask, index, window = (options.get(name) for name in EVERYTHING)
    keys = memory if position is None else memory + position
    visible = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device) if mask is None else mask
    bias = memory.new_zeros(memory.shape[:2]) if bias is None else bias.to(query.dtype)
    if index is not None:
        safe = index.clamp(min=0)
        rows = safe[:, :, None].expand(-1, -1, memory.shape[2])
        keys, memory, bias = keys.gather(1, rows), memory.gather(1, rows), bias.gather(1, safe)
        visible = visible.gather(1, safe) & (index >= 0)
    visible = visible[:, None]
    if window is not None:
        place = torch.arange(keys.shape[1], device=keys.device)
        visible = visible & (place >= window[..., :1]) & (place < window[..., 1:])
    score = (query @ keys.mT * scale + bias[:, None]).masked_fill(~visible, -math.inf)
    return score.softmax(-1).nan_to_num(0.0) @ memory, score.logsumexp(-1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    ("batch", "rows", "size", "width"),
    [(1, 128, 8192, 256), (64, 32, 64, 256), (3, 70, 1000, 64), (2, 16, 777, 96), (2, 40, 500, 512), (1, 1, 1, 128)],
)
@pytest.mark.parametrize("names", [(), PLAIN, EVERYTHING], ids="+".join)
def test_on_a_gpu(dtype, batch, rows, size, width, names):
    query, memory, options = draw(names, dtype, batch, rows, size, width)
    scale = width**-0.5
    slopes = torch.randn(batch, rows, width, device="cuda")

    def run(call, wide):
        leaves = {"query": query, "memory": memory} | {k: v for k, v in options.items() if k in ("position", "bias")}
        leaves = {k: v.detach().to(torch.float64 if wide else v.dtype).requires_grad_() for k, v in leaves.items()}
        rest = options | {k: v for k, v in leaves.items() if k in options}
        out, lse = call(leaves["query"], leaves["memory"], rest)
        total = (out.float() * slopes).sum() + lse.float().masked_fill(lse.isneginf(), 0.0).sum()
        return [out, lse, *torch.autograd.grad(total, list(leaves.values()))]

    found = run(lambda q, x, rest: attend_memory(q, x, **rest, scale=scale, backend="triton"), False)
    truth = run(lambda q, x, rest: attend_memory(q, x, **rest, scale=scale, backend="reference"), True)
    peers = run(lambda q, x, rest: eager(q, x, rest, scale), False)
    assert torch.equal(found[1].isneginf(), truth[1].isneginf())
    for got, peer, want in zip(found, peers, truth, strict=True):
        want = want.double().masked_fill(want.isinf(), 0.0)
        error, allowed = (
            (x.double().masked_fill(x.isinf(), 0.0) - want).nan_to_num(0.0).abs().max().item() for x in (got, peer)
        )
        assert got.isnan().sum() == 0
        assert error <= 2 * allowed + torch.finfo(dtype).eps * want.abs().max().item()


@pytest.mark.gpu
@pytest.mark.parametrize("names", [PLAIN, EVERYTHING], ids="+".join)
def test_no_sync_captured_and_reproducible(names):
    query, memory, options = draw(names, BF16, 2, 64, 3000, 256)
    leaves = [query.requires_grad_(), memory.requires_grad_(), options["bias"].requires_grad_()]

    def step():
        out, lse, mass = attend_memory(query, memory, **options, scale=0.1, return_mass=True, backend="triton")
        grads = torch.autograd.grad(out.float().sum() + lse.masked_fill(lse.isneginf(), 0.0).sum(), leaves)
        return [x.detach() for x in (out, lse, mass, *grads)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, again = step(), step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("has_position", [False, True])
def test_a_shared_gradient_is_the_sum_over_layers_on_a_gpu(dtype, has_position):
    batch, size, width, scale = 2, 1000, 256, 0.06
    memory = torch.randn(batch, size, width, device="cuda").to(dtype)
    position = torch.randn_like(memory) if has_position else None
    mask = torch.rand(batch, size, device="cuda") > 0.3
    layers, sums = [], [0.0, 0.0]
    for rows in (128, 30, 128):
        query, d_out = (torch.randn(batch, rows, width, device="cuda").to(dtype) for _ in range(2))
        bias = torch.randn(batch, size, device="cuda")
        inputs = AttentionInputs(query, memory, position, bias, mask, None, None, scale)
        out, lse, _, _ = forward(inputs)
        layers.append(LayerRows(query, d_out, lse, (d_out.float() * out.float()).sum(-1), bias, mask, scale))
        wide = AttentionInputs(*(None if x is None else x.double() for x in inputs[:4]), *inputs[4:])
        _, true_lse, _, saved = reference(wide, False, True)
        call = AttentionBackward(wide, d_out.double(), None, true_lse, saved, False, True, has_position, False)
        _, *alone, _ = reference_backward(call)
        sums = [total if part is None else total + part for total, part in zip(sums, alone, strict=True)]
    found = memory_gradients(layers, memory, position, has_position)
    tolerance = 2e-2 if dtype == BF16 else 1e-4
    for got, want in zip(found, sums, strict=True):
        if got is not None:
            assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.gpu
def test_more_than_two_billion_elements():
    memory = torch.randn(5, 2**20, 512, device="cuda", dtype=BF16)
    query = torch.randn(5, 8, 512, device="cuda", dtype=BF16)
    leaf = memory.requires_grad_()
    out, lse = attend_memory(query, leaf, scale=0.04, backend="triton")
    (gradient,) = torch.autograd.grad(out.float().sum(), leaf)
    last = memory[-1:].detach().requires_grad_()
    alone, alone_lse = attend_memory(query[-1:], last, scale=0.04, backend="triton")
    (alone_gradient,) = torch.autograd.grad(alone.float().sum(), last)
    torch.testing.assert_close(out[-1:], alone, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(lse[-1:], alone_lse)
    torch.testing.assert_close(gradient[-1:], alone_gradient, rtol=2e-2, atol=1e-6)
