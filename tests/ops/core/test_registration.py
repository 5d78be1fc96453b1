"""Every op as a citizen of `torch.library`: opcheck, compile, export, autocast, FLOPs, and a lean import."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from bridge_stg.ops import attend_memory, patchify_frames, prune_tokens, prune_tokens_varlen

OPS = torch.ops.bridge_stg
MASK = torch.tensor([[True, False, True, True, False, True, True], [False, True] + [False] * 5])
OFFSETS = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
INDEX = torch.tensor([[0, 3, 3, -1, 6], [1, 2, 5, 6, -1]])
WINDOW = torch.tensor([[0, 5], [1, 3], [2, 2], [0, 1], [-3, 9], [4, 5]]).expand(2, -1, -1)
NORM: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}


def draw(*shape: int, permuted: bool = False, grad: bool = True) -> torch.Tensor:
    value = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    if permuted:
        value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    return value.requires_grad_(grad)


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck_prune_tokens(permuted):
    tokens, queries = draw(2, 7, 5, permuted=permuted), draw(2, 3, 5, permuted=permuted)
    opcheck(OPS.prune_tokens.default, (tokens, queries, 3, "cosine", "max", 0.5, None, permuted, "reference"))
    opcheck(OPS.prune_tokens.default, (tokens.detach(), queries, 3, "dot", "mean", 0.5, MASK, False, "reference"))


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck_prune_tokens_varlen(permuted):
    policy, budget = ("top_p", torch.tensor(0.5)) if permuted else ("per_segment", torch.tensor([1, 2, 3]))
    tokens, queries = draw(11, 5, permuted=permuted), draw(3, 2, 5, permuted=permuted)
    opcheck(
        OPS.prune_tokens_varlen.default,
        (tokens, OFFSETS, queries, budget, policy, 6, "cosine", "logsumexp", 1.0, "reference"),
    )


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck_attend_memory(permuted):
    query, memory = draw(2, 6, 5, permuted=permuted), draw(2, 7, 5, permuted=permuted)
    position, bias = draw(2, 7, 5, permuted=permuted), draw(2, 7)
    opcheck(
        OPS.attend_memory.default,
        (query, memory, position, bias, MASK, INDEX, WINDOW, 0.5, True, permuted, "reference"),
    )
    opcheck(
        OPS.attend_memory.default,
        (query, memory, None, None, None, None, None, 0.5, False, permuted, "reference"),
    )


@pytest.mark.parametrize("layout", ["TCHW", "THWC"])
def test_opcheck_patchify_frames(layout):
    video = torch.randint(0, 256, (5, 20, 31, 3), dtype=torch.uint8)
    video = video.permute(0, 3, 1, 2) if layout == "TCHW" else video
    options = (14, 2, 2, [0.5] * 3, [0.2] * 3, 1 / 255, "bicubic", layout, torch.float32, "reference")
    opcheck(OPS.patchify_frames.default, (video, torch.tensor([0, 4, 4]), [28, 56], *options))
    opcheck(OPS.patchify_frames.default, (video, None, [28, 28], *options))


def pipeline(tokens, queries):
    """Prune, then attend to what was kept: once compacted with its gate, once by index."""
    kept = prune_tokens(tokens, queries, 3, scale=0.3, return_scores=True)
    gate = torch.nn.functional.logsigmoid(kept.score)
    out, _ = attend_memory(queries, kept.tokens, bias=gate, scale=0.5)
    by_index, lse, mass = attend_memory(queries, tokens, index=kept.index, scale=0.5, return_mass=True)
    return out, by_index, lse, mass, kept.scores


def varlen(tokens, queries):
    return prune_tokens_varlen(tokens, OFFSETS, queries, 2, policy="per_segment", capacity=5)


def patchify(video, index):
    return patchify_frames(video, index, size=(28, 56), **NORM)


def loss_and_gradients(function, *inputs):
    outputs = function(*inputs)
    loss = sum(out.square().sum() for out in outputs if out.requires_grad)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(pipeline, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (7, 9) if dynamic else (7,):
        inputs = draw(2, size, 5), draw(2, 4, 5)
        for ours, theirs in zip(
            loss_and_gradients(compiled, *inputs), loss_and_gradients(pipeline, *inputs), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


def test_compile_fullgraph_without_gradients():
    torch._dynamo.reset()
    tokens, queries = draw(11, 5, grad=False), draw(3, 2, 5, grad=False)
    compiled = torch.compile(varlen, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(tokens, queries), varlen(tokens, queries), strict=True))
    video, index = torch.randint(0, 256, (5, 3, 20, 31), dtype=torch.uint8), torch.tensor([0, 4, 4])
    compiled = torch.compile(patchify, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(video, index), patchify(video, index), strict=True))


def test_compile_inductor():
    """Only ops of this package, so that nothing but the call to them is generated."""
    torch._dynamo.reset()

    def prune(tokens, queries):
        return prune_tokens(tokens, queries, 3, return_scores=True)

    inputs = draw(2, 7, 5, grad=False), draw(2, 4, 5, grad=False)
    compiled = torch.compile(prune, fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), prune(*inputs), strict=True))


class Wrapped(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def test_export():
    size = torch.export.Dim("size", min=4, max=64)
    inputs = draw(2, 7, 5, grad=False), draw(2, 4, 5, grad=False)
    program = torch.export.export(Wrapped(pipeline), inputs, dynamic_shapes=(({1: size}, None),))
    longer = draw(2, 12, 5, grad=False), inputs[1]
    for a, b in zip(program.module()(*longer), pipeline(*longer), strict=True):
        torch.testing.assert_close(a, b)
    frames = torch.export.Dim("frames", min=2, max=64)
    video = torch.randint(0, 256, (5, 3, 20, 31), dtype=torch.uint8)
    program = torch.export.export(
        Wrapped(patchify), (video, torch.tensor([0, 4, 4])), dynamic_shapes=((None, {0: frames}),)
    )
    index = torch.tensor([1, 3])
    assert torch.equal(program.module()(video, index)[0], patchify(video, index)[0])
    rows = draw(11, 5, grad=False), draw(3, 2, 5, grad=False)
    program = torch.export.export(Wrapped(varlen), rows)
    assert all(torch.equal(a, b) for a, b in zip(program.module()(*rows), varlen(*rows), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_attention_and_leaves_scores_alone(dtype):
    tokens, queries = draw(2, 7, 64), draw(2, 4, 64)
    plain = prune_tokens(tokens, queries, 3)
    with torch.autocast("cpu", dtype=dtype):
        pruned = prune_tokens(tokens, queries, 3)
        out, lse = attend_memory(queries.to(dtype), tokens, bias=tokens[..., 0], scale=0.1)
        (pruned.score.sum() + pruned.tokens.sum() + out.float().sum() + lse.sum()).backward()
    assert torch.equal(pruned.score, plain.score) and torch.equal(pruned.tokens, plain.tokens)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert tokens.grad is not None and tokens.grad.dtype == torch.float32
    cast = attend_memory(queries.to(dtype), tokens.to(dtype), bias=tokens[..., 0], scale=0.1)
    assert torch.equal(out, cast[0]) and torch.equal(lse, cast[1])


def test_autocast_mixed_dtypes_are_refused_without_it():
    with pytest.raises(TypeError, match=r"memory must have the dtype of query \(torch.bfloat16\), got torch.float32"):
        attend_memory(draw(2, 4, 8).to(torch.bfloat16), draw(2, 7, 8), scale=1.0)


def counted(function) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(op).rsplit(".", 1)[-1]: flops for op, flops in counter.get_flop_counts()["Global"].items()}


def test_flops_of_prune_tokens():
    tokens, queries = draw(2, 7, 5), draw(2, 4, 5)
    kept = counted(lambda: prune_tokens(tokens, queries, 3).score.sum().backward())
    assert kept == {"prune_tokens": 2 * 2 * 7 * 4 * 5, "prune_tokens_backward": 6 * 2 * 3 * 4 * 5}
    dense = counted(lambda: prune_tokens(tokens, queries, 3, return_scores=True).scores.sum().backward())
    assert dense["prune_tokens_backward"] == 6 * 2 * 7 * 4 * 5
    copy = counted(lambda: prune_tokens(tokens, queries, 3).tokens.sum().backward())
    assert copy["prune_tokens_backward"] == 0


def test_flops_of_prune_tokens_varlen():
    tokens, queries = draw(11, 5), draw(3, 2, 5)
    flops = counted(lambda: varlen(tokens, queries).score.sum().backward())
    assert flops == {"prune_tokens_varlen": 2 * 11 * 2 * 5, "prune_tokens_varlen_backward": 6 * 5 * 2 * 5}


def test_flops_of_attend_memory():
    query, memory = draw(2, 6, 5), draw(2, 7, 5)
    flops = counted(lambda: attend_memory(query, memory, scale=1.0)[0].sum().backward())
    assert flops == {"attend_memory": 4 * 2 * 6 * 7 * 5, "attend_memory_backward": 8 * 2 * 6 * 7 * 5}
    picked = counted(lambda: attend_memory(query, memory, index=INDEX, scale=1.0))
    assert picked == {"attend_memory": 4 * 2 * 6 * 5 * 5}


def test_flops_of_patchify_frames():
    video = torch.zeros(4, 3, 28, 112, dtype=torch.uint8)
    index = torch.tensor([0, 1])
    # Width 112 -> 56 takes 8 taps of a bicubic filter, the height stays; normalisation is 2 a value.
    flops = counted(lambda: patchify_frames(video, index, size=(28, 56), **NORM))
    assert flops == {"patchify_frames": 2 * 3 * (2 * 28 * 56 * 8 + 2 * 28 * 56)}
    both = counted(lambda: patchify_frames(video, size=(56, 56), interpolation="bilinear", **NORM))
    assert both == {"patchify_frames": 4 * 3 * (2 * 28 * 56 * 4 + 2 * 56 * 56 * 2 + 2 * 56 * 56)}


def test_import_is_lean():
    heavy = ("transformers", "torchvision", "torch._dynamo", "av", "matplotlib")
    code = (
        f"import sys, torch; before = set(sys.modules); import bridge_stg.ops; "
        f"assert not torch.cuda.is_initialized(); print(*set({heavy}) & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
