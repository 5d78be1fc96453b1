"""Layers over one shared memory: what is done once, what falls back, and the libraries of the projected way."""

from __future__ import annotations

import importlib.machinery
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bridge_stg
from bridge_stg.modules import MemoryCrossAttention, MultiLayerQueryCrossAttention, SpatialDecoder, importance
from bridge_stg.modules import memory_cross_attention as home
from bridge_stg.modules._projected_memory import ProjectedMemory
from bridge_stg.ops import projected_attention, share_memory
from bridge_stg.ops.attend_memory import head_products as _head_products
from bridge_stg.ops.attend_memory.projected_attention import choose_library
from bridge_stg.ops.attend_memory.registration import SHARED_BACKENDS

L, B, Q, M, C, H = 3, 2, 4, 9, 16, 4
PATHS = ("absorbed", "projected")
CHOICES = sys.modules["bridge_stg.ops.attend_memory.projected_attention"]


def stack(path: home.Path, **options) -> MultiLayerQueryCrossAttention:
    torch.manual_seed(0)
    made = MultiLayerQueryCrossAttention(C, H, L, path=path, dtype=torch.float64, **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def decode(attention, query: Tensor, memory: Tensor, position: Tensor | None, call=None, **options) -> Tensor:
    state = torch.zeros_like(query)
    for i in range(L):
        arguments = (i, query + state, memory)
        options["position"] = position
        crossed = attention.layer(*arguments, **options) if call is None else call(i, query + state, memory, position)
        state = state + crossed
    return state.square().sum()


@pytest.fixture
def counts(monkeypatch) -> dict[str, int]:
    """Deferred gradients, and projections by how many layers each was for."""
    seen = {"deferred": 0}
    original = SHARED_BACKENDS["reference"]

    def memory_backward(*args):
        seen["deferred"] += 1
        return original.memory_backward(*args)

    def project_memory(layers, *args):
        name = f"projected {len(layers)}"
        seen[name] = seen.get(name, 0) + 1
        return project(layers, *args)

    project = home.project_memory
    monkeypatch.setitem(SHARED_BACKENDS, "reference", original._replace(memory_backward=memory_backward))
    monkeypatch.setattr(home, "project_memory", project_memory)
    monkeypatch.setattr(sys.modules[MultiLayerQueryCrossAttention.__module__], "project_memory", project_memory)
    return seen


def tensors() -> list[Tensor]:
    return [torch.randn(B, n, C, dtype=torch.float64, requires_grad=True) for n in (Q, M, M)]


@pytest.fixture(autouse=True)
def _on_the_reference(monkeypatch):
    """Whatever else is installed."""
    attend = _head_products.attend_memory

    def on_reference(*args, **options):
        return attend(*args, **options, backend="reference")

    monkeypatch.setattr(_head_products, "attend_memory", on_reference)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("positioned", [False, True])
def test_sharing_changes_nothing_but_the_work(path, positioned, counts):
    attention = stack(path)
    query, memory, position = tensors()
    options = {"bias": torch.randn(B, M, dtype=torch.float64), "key_padding_mask": torch.rand(B, M) > 0.7}
    leaves = [query, memory, *([position] if positioned else []), *attention.parameters()]
    offset = position if positioned else None
    expected = torch.autograd.grad(decode(attention, query, memory, offset, **options), leaves)
    before = dict(counts)
    shared = attention.share(memory, queries=Q, position=offset, fuse=True)
    pair = shared if isinstance(shared, tuple) else (shared, None)
    gradients = torch.autograd.grad(decode(attention, query, *pair, **options), leaves)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    done = {name: counts[name] - before.get(name, 0) for name in counts if counts[name] != before.get(name, 0)}
    assert done == ({"deferred": 1} if path == "absorbed" else {"projected 3": 1})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(path, reentrant):
    attention = stack(path)
    query, memory, position = tensors()
    leaves = [query, memory, position, *attention.parameters()]

    def run(i, state, x, p):
        return attention.layer(i, state, x, position=p)

    def call(*arguments):
        return checkpoint(run, *arguments, use_reentrant=reentrant)

    decode(attention, query, memory.sin(), position).backward()
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    decode(attention, query, *attention.share(memory.sin(), queries=Q, position=position, fuse=True), call).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_lengths_first_and_compiled_share_nothing(path, counts):
    attention = stack(path, batch_first=False)
    memory = torch.randn(M, B, C, dtype=torch.float64)
    assert attention.share(memory, queries=Q) is memory
    torch._dynamo.reset()
    attention = stack(path)
    query, memory, _ = tensors()
    compiled = torch.compile(lambda q, x: torch.stack(attention([q] * L, x)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, memory), torch.stack(attention([query] * L, memory)))


def test_a_stack_projects_for_its_own_layers_alone(counts):
    ours, theirs = stack("projected"), stack("projected")
    torch.nn.init.normal_(theirs.get_parameter("layers.0.in_proj_weight"))
    query, memory, _ = tensors()
    assert ours.share(memory, queries=Q) is memory
    shared = ours.share(memory, queries=Q, fuse=True)
    torch.testing.assert_close(theirs.layer(0, query, shared), theirs.layer(0, query, memory))
    assert counts == {"deferred": 0, "projected 3": 1, "projected 1": 2}


def test_what_was_projected_is_not_kept_alive():
    attention = stack("projected")
    query, memory, _ = tensors()
    shared = attention.share(memory, queries=Q, fuse=True)
    attention.layer(1, query, shared).sum().backward()
    handle = ProjectedMemory.of(shared)
    assert handle is not None
    gone = weakref.ref(handle)
    del handle, shared
    assert gone() is None


def test_a_layer_takes_a_shared_memory_like_any_other(counts):
    attention = MemoryCrossAttention(C, H, path="absorbed", dtype=torch.float64)
    query, memory, _ = tensors()
    results = []
    for x in (share_memory(memory), memory):
        out = attention(attention(query, x, x)[0], x)[0]
        results.append(torch.autograd.grad(out.sum(), memory)[0])
    torch.testing.assert_close(*results)
    assert counts["deferred"] == 1


def test_the_spatial_decoder_shares_its_memory(counts):
    decoder = SpatialDecoder(16, 4, 32, L)
    memory = torch.randn(2, 3, 20, 16, requires_grad=True)
    options = {"times": torch.zeros(2, 3), "reference": torch.rand(2, 3, 2), "bias": torch.randn(2, 3, 20)}
    tubes = decoder(torch.randn(L, 2, 2, 16), memory, **options)
    tubes.presence.sum().backward()
    assert counts == {"deferred": 1}
    assert memory.grad is not None and memory.grad.abs().sum() > 0


def fake(monkeypatch, name: str, **functions) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for key, value in functions.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def _forget():
    CHOICES._import.cache_clear()
    yield
    CHOICES._import.cache_clear()


@pytest.mark.usefixtures("_forget")
def test_the_library_is_the_first_installed_that_takes_the_call(monkeypatch):
    call = ("cuda", torch.bfloat16, 64, False)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert choose_library(*call) == "sdpa"
    with pytest.raises(ValueError, match="cannot use flash_attn: flash_attn is not installed"):
        choose_library(*call, "flash_attn")
    CHOICES._import.cache_clear()
    fake(monkeypatch, "xformers")
    fake(monkeypatch, "xformers.ops", memory_efficient_attention=None)
    assert choose_library(*call) == "xformers"
    CHOICES._import.cache_clear()
    fake(monkeypatch, "flash_attn", flash_attn_func=None)
    assert choose_library(*call) == "flash_attn"
    assert choose_library("cuda", torch.float32, 64, False) == "xformers"
    assert (
        choose_library("cuda", torch.bfloat16, 64, True) == choose_library("cpu", torch.bfloat16, 64, False) == "sdpa"
    )
    assert choose_library("cuda", torch.bfloat16, 60, False) == "sdpa"
    with pytest.raises(ValueError, match=r"flash_attn: it takes torch\.float16 and torch\.bfloat16, got"):
        choose_library("cuda", torch.float32, 64, False, "flash_attn")
    with pytest.raises(ValueError, match="library must be one of 'flash_attn', 'xformers', 'sdpa', 'flex', got 'fast'"):
        MemoryCrossAttention(8, 2, library="fast")


@pytest.mark.usefixtures("_forget")
@pytest.mark.parametrize("name", ["flash_attn", "xformers", "flex"])
def test_each_library_is_called_as_it_wants(name, monkeypatch):
    """Against stand-ins with the signatures of the libraries."""

    def attend(q, k, v):
        weights = (torch.einsum("bqhd,bmhd->bhqm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        return torch.einsum("bhqm,bmhd->bqhd", weights, v)

    def flex(q, k, v, *, score_mod):
        score = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        place = torch.meshgrid(*map(torch.arange, score.shape), indexing="ij")
        return score_mod(score, *place).softmax(-1) @ v

    fake(monkeypatch, "flash_attn", flash_attn_func=attend)
    fake(monkeypatch, "xformers")
    fake(monkeypatch, "xformers.ops", memory_efficient_attention=attend)
    monkeypatch.setattr(CHOICES, "_compiled_flex", lambda: flex)
    q, k, v = (torch.randn(2, n, 4, 8) for n in (3, 7, 7))
    bias = torch.randn(2, 1, 1, 7) if name == "flex" else None
    found = CHOICES.LIBRARIES[name].attend(q, k, v, bias)
    torch.testing.assert_close(found, projected_attention(q, k, v, bias, library="sdpa"), rtol=1e-5, atol=1e-5)


def test_importance_is_the_mean_weight():
    attention = stack("auto")
    query, memory, position = (x.detach() for x in tensors())
    bias, padding = torch.randn(B, M, dtype=torch.float64), torch.zeros(B, M, dtype=torch.bool)
    padding[1, 5:] = True
    options = {"position": position, "bias": bias, "key_padding_mask": padding}
    queries = torch.stack([query, query * 2, query - 1])
    maps = [
        layer(q, memory, **options, need_weights=True)[1] for layer, q in zip(attention.layers, queries, strict=True)
    ]
    expected = torch.stack(maps).mean(dim=(0, 2))
    torch.testing.assert_close(importance(attention, queries, memory, **options), expected)
    first = attention.layers[0]
    assert isinstance(first, MemoryCrossAttention)
    one = importance(first, query, memory, **options)
    torch.testing.assert_close(one, maps[0].mean(dim=1))
    torch.testing.assert_close(one.sum(dim=1), torch.ones(B, dtype=torch.float64))
    out, mass = attention.layers[0](query, memory, **options, need_mass=True)
    assert torch.equal(mass, one)
    torch.testing.assert_close(out, attention.layers[0](query, memory, **options)[0])
    with pytest.raises(ValueError, match="one tensor for each of 3 layers, got 2"):
        importance(attention, [query, query], memory)
    with pytest.raises(ValueError, match="need_weights and need_mass cannot both be set"):
        attention.layers[0](query, memory, need_weights=True, need_mass=True)


@pytest.mark.parametrize(
    ("page", "shown"), [("attend_memory", "need_mass"), ("compatibility_attention", "from_linears")]
)
def test_the_documented_example_runs(page, shown):
    text = (Path(__file__).parents[2] / "docs" / f"{page}.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert any(shown in block for block in blocks)
    scope: dict = {"bridge_stg": bridge_stg}
    for block in blocks:
        exec(block, scope)
