"""`share_memory`: one gradient for all layers, equal to the sum of theirs, wherever autograd is taken."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bridge_stg.ops import attend_memory, share_memory
from bridge_stg.ops.attend_memory.registration import SHARED_BACKENDS
from bridge_stg.ops.attend_memory.share_memory import SharedMemory

B, R, M, C = 2, 5, 9, 4
MASK = torch.rand(B, M, generator=torch.Generator().manual_seed(5)) > 0.3


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many layers each deferred computation summed."""
    counted = []
    original = SHARED_BACKENDS["reference"]

    def memory_backward(rows, *args):
        counted.append(len(rows))
        return original.memory_backward(rows, *args)

    monkeypatch.setitem(SHARED_BACKENDS, "reference", original._replace(memory_backward=memory_backward))
    return counted


def attend(query: Tensor, memory: Tensor, **options: Any) -> tuple[Tensor, ...]:
    arguments: dict[str, Any] = {"scale": 1.0, "backend": "reference"} | options
    return attend_memory(query, memory, **arguments)


class Decoder:
    """Layers that feed each other, over what an encoder makes of the leaves."""

    def __init__(self, layers: int = 3, dtype: torch.dtype = torch.float64) -> None:
        self.queries = [draw(B, R, C, seed=i, dtype=dtype) for i in range(layers)]
        self.memory, self.position = draw(B, M, C, seed=50, dtype=dtype), draw(B, M, C, seed=51, dtype=dtype)
        self.bias = draw(B, M, seed=52, dtype=dtype)
        self.leaves = [*self.queries, self.memory, self.position, self.bias]

    def encode(self) -> tuple[Tensor, Tensor]:
        return self.memory.sin() * 2, self.position.tanh()

    def layer(self, i: int, state: Tensor, memory: Tensor, position: Tensor | None, **options: Any) -> Tensor:
        arguments: dict[str, Any] = {"bias": self.bias, "key_mask": MASK, "scale": 0.3 + 0.1 * i, **options}
        out, lse = attend(self.queries[i] + state, memory, position=position, **arguments)
        return out + 0.1 * lse[..., None]

    def __call__(self, share: bool, *, call: Callable[..., Any] | None = None, **options: Any) -> Tensor:
        memory, position = self.encode()
        if share:
            memory, position = share_memory(memory, position)
        state = torch.zeros_like(self.queries[0])
        for i in range(len(self.queries)):
            arguments = (i, state, memory, position)
            state = self.layer(*arguments, **options) if call is None else call(self.layer, *arguments)
        return state.square().sum()

    def gradients(self, *args: Any, **options: Any) -> list[Tensor]:
        return list(torch.autograd.grad(self(*args, **options), self.leaves))


def assert_equal(ours: Any, theirs: Any, **tolerance: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("layers", range(1, 9))
def test_gradients_are_the_sums_over_layers_and_made_once(layers, calls):
    decoder = Decoder(layers)
    assert_equal(decoder.gradients(True), decoder.gradients(False), rtol=1e-12, atol=1e-13)
    assert calls == [layers]


@pytest.mark.parametrize("wanted", ["memory", "position", "neither"])
def test_only_what_needs_a_gradient_gets_one(wanted, calls):
    memory, position, query = draw(B, M, C, seed=1), draw(B, M, C, seed=2), draw(B, R, C, seed=3)
    leaves = {"memory": memory, "position": position}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    shared = share_memory(memory, position)
    for pair in (shared, (memory, position)):
        attended = [attend(query, pair[0], position=pair[1], scale=s)[0] for s in (0.5, 0.8)]
        torch.stack(attended).square().sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name == wanted)
        if leaf.grad is not None:
            once = leaf.grad / 2
            leaf.grad = None
            attended = [attend(query, memory, position=position, scale=s)[0] for s in (0.5, 0.8)]
            torch.stack(attended).square().sum().backward()
            torch.testing.assert_close(once, leaf.grad)
    assert calls == ([] if wanted == "neither" else [2])
    assert (shared[0] is memory) == (wanted == "neither")


def test_without_position():
    memory, query = draw(B, M, C, seed=1), draw(B, R, C, seed=3)
    shared = share_memory(memory)
    assert isinstance(shared, Tensor) and torch.equal(shared, memory)
    gradients = [torch.autograd.grad(attend(attend(query, x)[0], x)[0].sum(), memory) for x in (shared, memory)]
    assert_equal(*gradients)


def test_unused_layers_and_a_layer_used_twice(calls):
    decoder = Decoder(4)

    def loss(share: bool) -> Tensor:
        pair = share_memory(*decoder.encode()) if share else decoder.encode()
        state = torch.zeros(B, R, C, dtype=torch.float64)
        outputs = [decoder.layer(i, state, *pair) for i in (0, 1, 1, 2, 3)]
        return (outputs[0] * outputs[1] + outputs[2]).square().sum() + 0.0 * outputs[4].sum().detach()

    gradients = [torch.autograd.grad(loss(share), decoder.leaves, allow_unused=True) for share in (True, False)]
    assert [g is None for g in gradients[0]] == [g is None for g in gradients[1]]
    used = [[g for g in side if g is not None] for side in gradients]
    assert_equal(*used, rtol=1e-12, atol=1e-13)
    assert calls == [3]


def test_other_uses_of_the_shared_memory_are_added(calls):
    decoder = Decoder(2)

    def loss(share: bool) -> Tensor:
        memory, position = share_memory(*decoder.encode()) if share else decoder.encode()
        first = decoder.layer(0, torch.zeros(()), memory, position)
        second = decoder.layer(1, first, memory, None)
        by_index, _ = attend(first, memory, position=position, index=torch.tensor([[0, 3]] * B))
        return (second + by_index).square().sum() + (memory * position).cos().sum()

    gradients = [torch.autograd.grad(loss(share), decoder.leaves) for share in (True, False)]
    assert_equal(*gradients, rtol=1e-12, atol=1e-13)
    assert calls == [1]


def test_the_gradient_of_the_shared_memory_itself_is_whole():
    decoder = Decoder(2)
    memory = share_memory(decoder.encode()[0])
    seen: list[Tensor] = []
    memory.register_hook(seen.append)
    memory.retain_grad()
    loss = decoder.layer(1, decoder.layer(0, torch.zeros(()), memory, None), memory, None).square().sum()
    loss.backward(retain_graph=True)
    retained = memory.grad
    (asked,) = torch.autograd.grad(loss, memory)
    plain = decoder.encode()[0].detach().requires_grad_()
    decoder.layer(1, decoder.layer(0, torch.zeros(()), plain, None), plain, None).square().sum().backward()
    for gradient in (asked, retained, *seen):
        torch.testing.assert_close(gradient, plain.grad)


def test_runs_that_leave_the_memory_out_leave_nothing_behind(calls):
    decoder = Decoder(3)
    loss = decoder(True)
    queries = torch.autograd.grad(loss, decoder.queries, retain_graph=True)
    assert calls == []
    again = torch.autograd.grad(loss, decoder.leaves, retain_graph=True)
    whole = torch.autograd.grad(loss, decoder.leaves)
    assert calls == [3, 3]
    assert_equal(queries, whole[:3])
    assert_equal(again, whole)
    assert_equal(whole, decoder.gradients(False), rtol=1e-12, atol=1e-13)


def test_gradients_accumulate():
    decoder = Decoder(2)
    for _ in range(3):
        decoder(True).backward()
    gradients = [leaf.grad for leaf in decoder.leaves if leaf.grad is not None]
    assert_equal([g / 3 for g in gradients], decoder.gradients(False), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant, calls):
    decoder = Decoder(3)

    def call(layer: Callable[..., Tensor], *arguments: Any) -> Tensor:
        out = checkpoint(layer, *arguments, use_reentrant=reentrant)
        assert isinstance(out, Tensor)
        return out

    expected = decoder.gradients(False)
    decoder(True, call=call).backward()
    assert_equal([leaf.grad for leaf in decoder.leaves], expected, rtol=1e-12, atol=1e-13)
    # Reentrant checkpointing hands the layers a detached copy, so that each makes its own gradient.
    assert calls == ([] if reentrant else [3])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_decoder(reentrant, calls):
    decoder = Decoder(3)

    def run(first: Tensor) -> Tensor:
        decoder.queries[0] = first
        return decoder(True)

    expected = decoder.gradients(False)
    first = decoder.queries[0]
    checkpoint(run, first, use_reentrant=reentrant).backward()
    assert_equal([leaf.grad for leaf in [first, *decoder.leaves[1:]]], expected, rtol=1e-12, atol=1e-13)
    assert calls == [3]


def test_create_graph_gives_the_gradient_and_refuses_the_next(calls):
    decoder = Decoder(2)
    gradients = torch.autograd.grad(decoder(True), decoder.leaves, create_graph=True)
    assert_equal([g.detach() for g in gradients], decoder.gradients(False), rtol=1e-12, atol=1e-13)
    assert calls == []
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradients[2].sum().backward()


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_compile(where, calls):
    torch._dynamo.reset()
    queries, memory = [draw(B, R, C, seed=i, dtype=torch.float32) for i in range(2)], draw(B, M, C, seed=9).float()
    memory = memory.detach().requires_grad_()

    def layers(shared: Tensor) -> Tensor:
        shared = share_memory(shared) if where == "inside" else shared
        state = torch.zeros(())
        for query in queries:
            state = attend(query + state, shared)[0]
        return state.square().sum()

    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    leaves = [*queries, memory]
    ours = compiled(memory if where == "inside" else share_memory(memory))
    assert_equal(torch.autograd.grad(ours, leaves), torch.autograd.grad(layers(memory.clone()), leaves))


def test_compiled_autograd(calls):
    torch._dynamo.reset()
    decoder = Decoder(2)
    expected = decoder.gradients(False)
    loss = decoder(True)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    assert_equal([leaf.grad for leaf in decoder.leaves], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside, calls):
    decoder = Decoder(3, torch.float32)
    expected = decoder.gradients(False)
    pair = decoder.encode()
    shared = None if inside else share_memory(*pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shared = shared or share_memory(*pair)
        assert shared[0].dtype == (torch.bfloat16 if inside else torch.float32)
        state = torch.zeros(())
        for i in range(3):
            state = decoder.layer(i, state, *shared)
            assert state.dtype == torch.float32  # lse is, out is bfloat16
        gradients = torch.autograd.grad(state.square().sum(), decoder.leaves)
    assert calls == [3]
    assert all(g.dtype == torch.float32 for g in gradients)
    assert_equal(gradients, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    decoder = Decoder(6, dtype)
    memory = draw(B, M, C, seed=50, dtype=dtype)
    decoder.bias = decoder.bias.detach()
    outputs: dict[Any, Tensor] = {}
    wide = memory.detach().double().requires_grad_()
    for name, x in {"shared": share_memory(memory), "layers": memory, "exact": wide}.items():
        loss = torch.zeros((), dtype=torch.float64)
        for i, query in enumerate(decoder.queries):
            q = query.detach().to(x.dtype)
            loss = loss + attend(q, x, scale=0.3 + i)[0].double().square().sum()
        outputs[name] = torch.autograd.grad(loss, wide if name == "exact" else memory)[0].double()
    errors = {name: (outputs[name] - outputs["exact"]).norm() for name in ("shared", "layers")}
    assert errors["shared"] <= errors["layers"] <= 0.1 * outputs["exact"].norm()


def test_deterministic():
    decoder = Decoder(4, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(decoder.gradients(True), decoder.gradients(True), strict=True))


def test_a_change_in_place_is_noticed():
    memory, query = draw(B, M, C, seed=1).clone(), draw(B, R, C, seed=3)
    out, _ = attend(query, share_memory(memory))
    with torch.no_grad():
        memory.add_(1.0)
    with pytest.raises(RuntimeError, match="modified inplace"):
        out.sum().backward()


def test_nothing_is_kept_alive():
    decoder = Decoder(2)
    memory, position = share_memory(*decoder.encode())
    handle = SharedMemory.of(memory)
    assert handle is not None
    gone = weakref.ref(handle)
    del handle
    loss = decoder.layer(1, decoder.layer(0, torch.zeros(()), memory, position), memory, position).square().sum()
    loss.backward()
    del loss
    assert gone() is not None
    del memory
    assert gone() is None


def test_only_the_tensor_that_was_returned_carries_the_handle():
    shared = share_memory(draw(B, M, C, seed=1).sin())
    assert SharedMemory.of(shared) is not None
    file = io.BytesIO()
    torch.save(shared, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded, shared)
    for other in (loaded, copy.copy(shared), shared.detach(), shared.view_as(shared), shared[:]):
        assert SharedMemory.of(other) is None


def test_a_shared_memory_that_is_changed_in_place_is_a_memory_like_any_other(calls):
    decoder = Decoder(2)
    state = torch.zeros(())

    def loss(memory: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        memory = change(memory)
        return decoder.layer(1, decoder.layer(0, state, memory, None), memory, None).square().sum()

    ours = loss(share_memory(decoder.memory.sin()), lambda x: x.mul_(2.0))
    theirs = loss(decoder.memory.sin(), lambda x: x * 2.0)
    leaves = [*decoder.queries, decoder.memory]
    assert_equal(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), rtol=1e-12, atol=1e-13)
    assert calls == []


def test_not_shared_where_no_gradient_is_taken():
    memory = draw(B, M, C, seed=1)
    with torch.no_grad():
        assert share_memory(memory) is memory
    assert share_memory(memory.detach()).grad_fn is None


def test_misuse_is_a_sentence():
    with pytest.raises(ValueError, match=r"share_memory: memory must have shape \[B, M, C\], got 2 axes \[3, 4\]"):
        share_memory(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"position must have shape \[B, M, C\] with M=3 \(from memory\)"):
        share_memory(torch.zeros(2, 3, 4), torch.zeros(2, 4, 4))
    with pytest.raises(TypeError, match=r"position must have the dtype of memory \(torch.float32\), got torch.float64"):
        share_memory(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).double())


INTERPRETED = """
import torch
from bridge_stg.ops import attend_memory, share_memory
torch.manual_seed(0)
B, R, M, C = 2, 20, 37, 16
queries = [torch.randn(B, R, C, requires_grad=True) for _ in range(3)]
memory, position = (torch.randn(B, M, C, requires_grad=True) for _ in range(2))
bias, mask = torch.randn(B, M, requires_grad=True), torch.rand(B, M) > 0.3
leaves = [*queries, memory, position, bias]
results = []
for backend, share in (("triton", True), ("triton", False), ("reference", False)):
    x, p = share_memory(memory, position) if share else (memory, position)
    state = 0.0
    for i, query in enumerate(queries):
        state, lse = attend_memory(query + state, x, position=p, bias=bias, key_mask=mask if i else None,
                                   scale=0.2 + 0.1 * i, backend=backend)
    results.append(torch.autograd.grad(state.square().sum() + lse.sum(), leaves))
for other in results[1:]:
    for a, b in zip(results[0], other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
print("equal")
"""


def test_triton_in_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("positioned", [False, True])
def test_triton_on_a_gpu(dtype, positioned):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype).requires_grad_()

    queries, memory, position = [normal(2, 128, 256) for _ in range(6)], normal(2, 1000, 256), normal(2, 1000, 256)
    results = {}
    for name in ("shared", "layers", "exact"):
        kind = torch.float64 if name == "exact" else dtype
        x, p = (t.detach().to(kind).requires_grad_() for t in (memory, position))
        pair = (x, p if positioned else None)
        if name == "shared":
            pair = share_memory(x, p) if positioned else (share_memory(x), None)
        backend = "reference" if name == "exact" else "triton"
        loss = torch.zeros((), dtype=torch.float64, device="cuda")
        for query in queries:
            q = query.detach().to(kind)
            out, _ = attend_memory(q, pair[0], position=pair[1], scale=1 / 16, backend=backend)
            loss = loss + out.double().square().sum()
        results[name] = torch.autograd.grad(loss, (x, p) if positioned else (x,))
    for shared, layers, exact in zip(*results.values(), strict=True):
        error, theirs = (float((g.double() - exact).norm() / exact.norm()) for g in (shared, layers))
        assert error <= max(2 * theirs, 1e-5)


@pytest.mark.gpu
def test_layers_on_several_streams():
    query, memory = torch.randn(2, 128, 256, device="cuda"), torch.randn(2, 8000, 256, device="cuda")
    memory.requires_grad_()
    alone = [attend_memory(query, memory, scale=s)[0] for s in (0.1, 0.2)]
    expected = torch.autograd.grad(torch.stack(alone).sum(), memory)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(5):
        shared, outputs = share_memory(memory), []
        for stream, scale in zip(streams, (0.1, 0.2), strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs.append(attend_memory(query, shared, scale=scale)[0].sum())
            torch.cuda.current_stream().wait_stream(stream)
        found = torch.autograd.grad(torch.stack(outputs).sum(), memory)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
