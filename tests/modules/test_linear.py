"""Modules whose projections are more than a weight: offloaded, adapted, parametrized, quantised, hooked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from bridge_stg.modules import (
    FrameContrast,
    MemoryCrossAttention,
    MultiLayerQueryCrossAttention,
    QueryGuidedTokenPruner,
    SemanticBridge,
    SpatialDecoder,
    importance,
)
from bridge_stg.modules._linear import weight_obstacle

C, H = 32, 4


def tensors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, C, generator=generator), torch.randn(2, 20, C, generator=generator)


def decode_by_layer(stack: MultiLayerQueryCrossAttention) -> list[Tensor]:
    query, memory = tensors()
    shared, position = stack.share(memory, queries=3, position=memory.cos(), fuse=True)
    return [stack.layer(i, query, shared, position=position) for i in range(len(stack))]


def decode_tubes(decoder: SpatialDecoder) -> Any:
    query, memory = tensors()
    frames = memory.unflatten(1, (4, 5))
    times = torch.arange(4.0).expand(2, 4)
    return decoder(query.expand(2, 2, 3, C), frames, times, reference=torch.full((2, 4, 2), 0.4))


def prune(pruner: QueryGuidedTokenPruner) -> Any:
    query, memory = tensors()
    return pruner(memory.repeat(2, 1, 1), query, return_scores=True)


Case = tuple[Callable[[], nn.Module], Callable[[Any], Any]]
CASES: dict[str, Case] = {
    "pruner": (lambda: QueryGuidedTokenPruner(C, C, 16), prune),
    "pruner, cosine": (lambda: QueryGuidedTokenPruner(C, C, 16, scoring="cosine"), prune),
    "pruner, budget of a clip": (lambda: QueryGuidedTokenPruner(C, C, 16, budget="clip"), prune),
    "pruner, all scores": (lambda: QueryGuidedTokenPruner(C, C, 16), lambda p: p.scores(*tensors()[::-1])),
    "attention, absorbed": (lambda: MemoryCrossAttention(C, H, path="absorbed"), lambda a: a(*tensors())),
    "attention, projected": (lambda: MemoryCrossAttention(C, H, path="projected"), lambda a: a(*tensors())),
    "attention, weights": (lambda: MemoryCrossAttention(C, H), lambda a: a(*tensors(), need_weights=True)),
    "stack, absorbed": (lambda: MultiLayerQueryCrossAttention(C, H, 3, path="absorbed"), decode_by_layer),
    "stack, projected at once": (lambda: MultiLayerQueryCrossAttention(C, H, 3, path="projected"), decode_by_layer),
    "importance": (
        lambda: MultiLayerQueryCrossAttention(C, H, 2),
        lambda stack: importance(stack, [tensors()[0]] * 2, tensors()[1]),
    ),
    "decoder": (lambda: SpatialDecoder(C, H, 64, 2), decode_tubes),
    "bridge": (lambda: SemanticBridge(C, 16, 2), lambda bridge: bridge([tensors()[0]] * 2)),
    "contrast": (lambda: FrameContrast(C, C), lambda contrast: contrast(*tensors())),
}


def floats(result: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(result)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def assert_same(found: Any, expected: Any):
    for a, b in zip(floats(found), floats(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_offloaded_modules_give_the_same(case, to, tmp_path):
    make, call = CASES[case]
    torch.manual_seed(0)
    module = make()
    with torch.no_grad():
        expected = call(module)
        if to == "cpu":
            accelerate.cpu_offload(module, execution_device="cpu")
        else:
            accelerate.disk_offload(module, str(tmp_path), execution_device="cpu")
        assert all(x.is_meta for x in module.parameters())
        assert_same(call(module), expected)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", [name for name in CASES if name not in ("importance", "pruner, all scores")])
def test_adapters_on_every_linear_layer_take_part(case, dora):
    make, call = CASES[case]
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, use_dora=dora)
    torch.manual_seed(0)
    adapted: Any = peft.get_peft_model(make(), config).base_model.model
    result = call(adapted)
    sum(x.square().sum() for x in floats(result)).backward()
    # Boxes start at their references: in front of a zero layer there is no gradient, though a layer takes part.
    adapters = {name: x for name, x in adapted.named_parameters() if "lora" in name}
    assert adapters and all(x.grad is not None for x in adapters.values())
    for module in list(adapted.modules()):
        if isinstance(module, peft.tuners.lora.Linear):
            module.merge()
    assert_same(call(adapted), result)


def test_an_adapter_on_the_packed_projection_takes_part_in_what_is_projected_at_once():
    plain = MultiLayerQueryCrossAttention(C, H, 2, path="projected")
    config = peft.LoraConfig(target_modules=[], target_parameters=["in_proj_weight"], init_lora_weights=False)
    adapted: Any = peft.get_peft_model(copy.deepcopy(plain), config).base_model.model
    query, memory = tensors()
    shared = adapted.share(memory, queries=3, fuse=True)
    out = [adapted.layer(i, query, shared) for i in range(2)]
    sum(x.sum() for x in out).backward()
    assert all(x.grad is not None for name, x in adapted.named_parameters() if "lora" in name)
    assert not torch.allclose(out[0], plain.layer(0, query, memory), atol=1e-3)
    assert_same(importance(adapted, [query] * 2, memory), importance(adapted, [query] * 2, memory.clone()))


def test_importance_of_a_wrapped_attention():
    query, memory = tensors()
    attention = MemoryCrossAttention(C, H)
    wrapped: Any = peft.get_peft_model(copy.deepcopy(attention), peft.LoraConfig(target_modules=["out_proj"]))
    assert_same(importance(wrapped, query, memory), importance(attention, query, memory))


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("projection", ["query_proj", "token_proj"])
def test_a_parametrized_projection_of_the_pruner(projection):
    pruner = QueryGuidedTokenPruner(C, C, 16)
    doubled = copy.deepcopy(pruner)
    with torch.no_grad():
        doubled.get_parameter(f"{projection}.weight").mul_(2)
    parametrize.register_parametrization(pruner.get_submodule(projection), "weight", Double())
    assert_same(prune(pruner), prune(doubled))


@pytest.mark.parametrize("normalise", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm_is_taken_anew_at_every_call(normalise):
    """The old form, by a hook, leaves the weight of the last call on the module, where a step does not change it."""
    query, memory = tensors()
    pruner, stack = QueryGuidedTokenPruner(C, C, 16), MultiLayerQueryCrossAttention(C, H, 2, path="projected")
    normalise(pruner.token_proj)
    for layer in stack.layers:
        normalise(layer, "in_proj_weight")
    optimizer = torch.optim.SGD([*pruner.parameters(), *stack.parameters()], 0.5)
    loss = prune(pruner).scores.square().sum() + torch.stack(stack([query, query], memory)).square().sum()
    loss.backward()
    optimizer.step()
    shared = stack.share(memory, queries=3, fuse=True)
    for i in range(2):
        torch.testing.assert_close(stack.layer(i, query, shared), stack.layer(i, query, memory.clone()))
    projected = pruner.token_proj(memory)
    expected = (pruner.query_proj(query) @ projected.transpose(1, 2) / 4).amax(dim=1)
    torch.testing.assert_close(pruner.scores(memory, query), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["absorbed", "projected"])
def test_a_call_reads_a_parametrized_weight_once(path):
    """Spectral norm takes a step of its power method at every reading."""
    reads = []

    class Counting(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            reads.append(weight)
            return weight.clone()

    attention = MemoryCrossAttention(C, H, path=path)
    parametrize.register_parametrization(attention, "in_proj_weight", Counting())
    query, memory = tensors()
    reads.clear()
    attention(query, memory, position=memory)
    assert len(reads) == 1


def test_a_quantised_projection_is_called():
    pruner = QueryGuidedTokenPruner(C, C, 16)

    class Stored(nn.Module):
        """A layer as 4-bit ones keep it: `weight` is a buffer of bytes."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear
            self.register_buffer("weight", torch.zeros(4, dtype=torch.uint8))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    expected = prune(pruner)
    for name in ("query_proj", "token_proj"):
        setattr(pruner, name, Stored(getattr(pruner, name)))
    assert_same(prune(pruner), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(prune(pruner), expected)  # not under autocast either


def test_a_projection_with_a_bias_takes_its_bias():
    query, memory = tensors()
    pruner = QueryGuidedTokenPruner(C, C, 16)
    pruner.token_proj = nn.Linear(C, 16)
    expected = (pruner.query_proj(query) @ pruner.token_proj(memory).transpose(1, 2) / 4).amax(dim=1)
    torch.testing.assert_close(pruner.scores(memory, query), expected, rtol=1e-5, atol=1e-5)


def test_hooks_see_the_tokens_and_change_the_scores():
    query, memory = tensors()
    pruner, seen = QueryGuidedTokenPruner(C, C, 16), []
    pruner.token_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    pruner(memory, query)
    assert len(seen) == 1 and torch.equal(seen[0], memory)
    pruner.token_proj.register_forward_hook(lambda module, inputs, output: output * 0)
    assert (pruner.scores(memory, query) == 0).all()


def test_a_called_projection_gives_gradients_and_tokens_of_the_absorbed_one():
    query, memory = tensors()
    results = []
    for hooked in (False, True):
        torch.manual_seed(0)
        pruner = QueryGuidedTokenPruner(C, C, 16, scoring="cosine")
        handle = pruner.token_proj.register_forward_hook(lambda *_: None) if hooked else None
        leaves = [memory.clone().requires_grad_(), query.clone().requires_grad_()]
        out = pruner(*leaves, return_scores=True)
        loss = out.tokens.square().sum() + out.log_gate.sum() + out.scores.square().sum()
        results.append((*out, *torch.autograd.grad(loss, [*leaves, *pruner.parameters()])))
        assert (handle is None) == (weight_obstacle(pruner.token_proj) is None)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_projection_that_is_called_compiles():
    query, memory = tensors()
    pruner: Any = peft.get_peft_model(
        QueryGuidedTokenPruner(C, C, 16), peft.LoraConfig(target_modules=["token_proj"], init_lora_weights=False)
    ).base_model.model
    torch._dynamo.reset()
    compiled = torch.compile(pruner, fullgraph=True, backend="aot_eager")
    assert_same(compiled(memory, query), pruner(memory, query))


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1e-25), (torch.float32, 1e20), (torch.float32, 1e30), (torch.float16, 300.0)]
)
def test_cosine_of_hooked_projections_at_the_ends_of_the_dtype(dtype, factor):
    """The square of a norm over- and underflows long before the norm does."""
    query, tokens = tensors()
    pruner = QueryGuidedTokenPruner(C, C, 16, scoring="cosine").to(dtype)
    ordinary = pruner.scores(tokens.to(dtype), query.to(dtype))
    pruner.token_proj.register_forward_hook(lambda *_: None)
    far = pruner.scores(tokens.to(dtype) * factor, query.to(dtype))
    torch.testing.assert_close(far, ordinary, rtol=0, atol=1e-6 if dtype == torch.float32 else 3e-3)
