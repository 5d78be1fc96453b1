"""Modules without data: `torch.export` with dynamic sizes, `torch.compile`, and tensors on meta."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bridge_stg.modules import (
    FrameContrast,
    MemoryCrossAttention,
    MultiLayerQueryCrossAttention,
    QueryGuidedTokenPruner,
    SemanticBridge,
    SpatialDecoder,
    importance,
)
from bridge_stg.modules.memory_cross_attention import Path

C, H = 16, 4
PATHS: tuple[Path, ...] = ("auto", "absorbed", "projected")
B, N = torch.export.Dim("B", min=2, max=64), torch.export.Dim("N", min=8, max=512)


class Call(nn.Module):
    """A module and a method of calling it that gives a tuple of tensors."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__()
        self.module, self.options = module.eval(), options

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x for x in self.module(*inputs, **self.options) if x is not None)


def check_export(call: Call, sizes: Any, dynamic: Any, strict: bool) -> None:
    """Export at one size and compare at another; `sizes` gives the inputs at 0 and 1."""
    torch._dynamo.reset()
    program = torch.export.export(call, sizes(0), dynamic_shapes=(dynamic,), strict=strict).module()
    inputs = sizes(1)
    for a, b in zip(program(*inputs), call(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def tokens_and_queries(i: int, clips: bool = False) -> tuple[Tensor, Tensor]:
    batch = (3, 5)[i]
    return torch.randn(batch * (3 if clips else 1), (120, 33)[i], C), torch.randn(batch, 4, C)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("keep", [0.5, 1.0, 16, 100])
def test_pruner_with_dynamic_batch_and_tokens(keep, strict):
    call = Call(QueryGuidedTokenPruner(C, C, 8, keep=keep))
    check_export(call, tokens_and_queries, ({0: B, 1: N}, {0: B}), strict)


@pytest.mark.parametrize(
    "options", [{"budget": "clip"}, {"scoring": "cosine"}, {"reduce": "mean"}, {"gate": "straight_through"}]
)
def test_options_of_the_pruner(options):
    clips = "budget" in options
    call = Call(QueryGuidedTokenPruner(C, C, 8, keep=0.25, **options))
    batch = torch.export.Dim("b", min=2, max=20)
    sizes = lambda i: tokens_and_queries(i, clips)  # noqa: E731
    check_export(call, sizes, ({0: 3 * batch if clips else batch, 1: N}, {0: batch}), strict=False)


def test_a_pruner_with_hooks_is_exported_through_its_projection():
    pruner = QueryGuidedTokenPruner(C, C, 8, keep=0.5)
    pruner.token_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    check_export(Call(pruner), tokens_and_queries, ({0: B, 1: N}, {0: B}), strict=False)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_with_dynamic_batch_and_rows(path, need_weights, strict):
    call = Call(MemoryCrossAttention(C, H, path=path), need_weights=need_weights)
    check_export(call, lambda i: tokens_and_queries(i)[::-1], ({0: B}, {0: B, 1: N}), strict)


def test_attention_with_both_masks():
    def sizes(i: int) -> tuple[Tensor, ...]:
        memory, query = tokens_and_queries(i)
        padding = torch.zeros(memory.shape[:2], dtype=torch.bool)
        return query, memory, memory + 1, padding, torch.randn(4, memory.shape[1])

    class Masked(Call):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return self.module(*inputs[:4], attn_mask=inputs[4])[:1]

    check_export(
        Masked(MemoryCrossAttention(C, H)), sizes, ({0: B}, {0: B, 1: N}, {0: B, 1: N}, {0: B, 1: N}, {1: N}), False
    )


def test_decoder_and_bridge():
    clips, frames, kept = (torch.export.Dim(name, min=2, max=40) for name in ("b", "s", "k"))

    def sizes(i: int) -> tuple[Tensor, ...]:
        b, s, k = ((3, 5, 9), (2, 7, 19))[i]
        return torch.randn(2, b, 4, C), torch.randn(b, s, k, C), torch.rand(b, s)

    decoder = Call(SpatialDecoder(C, H, 32, 2, learned_reference=True))
    nn.init.normal_(decoder.get_parameter("module.box_heads.0.4.weight"))
    check_export(decoder, sizes, ({1: clips}, {0: clips, 1: frames, 2: kept}, {0: clips, 1: frames}), False)

    class Bridge(Call):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.module(inputs))

    states = lambda i: tuple(torch.randn((3, 5)[i], 4, C) for _ in range(2))  # noqa: E731
    check_export(Bridge(SemanticBridge(C, 8, 2)), states, ({0: B}, {0: B}), False)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"need_weights": True},
        {"need_mass": True},
        {"attn_mask": torch.randn(4, 9)},
        {"key_padding_mask": torch.randn(3, 9)},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_attention_compiles_as_one_graph(path, options):
    attention = MemoryCrossAttention(C, H, path=path)
    query, memory = torch.randn(3, 4, C), torch.randn(3, 9, C, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    results = []
    for module in (compiled, attention):
        out, shown = module(query, memory, **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), memory), *([] if shown is None else [shown])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=True)


MODULES: dict[str, Any] = {
    "attention": lambda: MemoryCrossAttention(C, H)(on_meta(3, 4, C), on_meta(3, 9, C)),
    "absorbed": lambda: MemoryCrossAttention(C, H, path="absorbed")(on_meta(3, 4, C), on_meta(3, 9, C)),
    "weights": lambda: MemoryCrossAttention(C, H)(on_meta(3, 4, C), on_meta(3, 9, C), need_weights=True),
    "mass": lambda: MemoryCrossAttention(C, H)(on_meta(3, 4, C), on_meta(3, 9, C), need_mass=True),
    "stack": lambda: MultiLayerQueryCrossAttention(C, H, 2)([on_meta(3, 4, C)] * 2, on_meta(3, 9, C)),
    "importance": lambda: importance(MemoryCrossAttention(C, H), on_meta(3, 4, C), on_meta(3, 9, C)),
    "pruner": lambda: QueryGuidedTokenPruner(C, C, 8)(on_meta(3, 9, C), on_meta(3, 4, C), return_scores=True),
    "pruner, cosine": lambda: QueryGuidedTokenPruner(C, C, 8, scoring="cosine")(on_meta(3, 9, C), on_meta(3, 4, C)),
    "pruner, noise": lambda: QueryGuidedTokenPruner(C, C, 8, noise=1.0)(on_meta(3, 9, C), on_meta(3, 4, C)),
    "decoder": lambda: SpatialDecoder(C, H, 32, 2, learned_reference=True)(
        on_meta(2, 3, 4, C), on_meta(3, 5, 9, C), on_meta(3, 5)
    ),
    "bridge": lambda: SemanticBridge(C, 8, 2)([on_meta(3, 4, C)] * 2),
    "contrast": lambda: FrameContrast(C, C)(on_meta(3, 4, C), on_meta(3, 9, C)),
}


@pytest.mark.parametrize("name", MODULES)
def test_meta_tensors(name):
    with torch.device("meta"):
        leaves = [x for x in torch.utils._pytree.tree_leaves(MODULES[name]()) if isinstance(x, Tensor)]
    assert leaves and all(x.is_meta for x in leaves)
    if name != "importance":
        sum(x.sum() for x in leaves if x.requires_grad).backward()


@pytest.mark.parametrize("path", PATHS)
def test_fake_tensors(path):
    with FakeTensorMode():
        memory = torch.randn(3, 9, C, requires_grad=True)
        stack = MultiLayerQueryCrossAttention(C, H, 2, path=path)
        sum(x.sum() for x in stack([torch.randn(3, 4, C)] * 2, memory)).backward()
        QueryGuidedTokenPruner(C, C, 8)(memory, torch.randn(3, 4, C)).score.sum().backward()
        assert memory.grad is not None and memory.grad.shape == (3, 9, C)
