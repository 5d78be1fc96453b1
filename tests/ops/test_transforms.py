"""The ops under transforms of torch: forward mode, twice backward, vmap, meta and fake tensors, export; threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, linearize, vmap

from bridge_stg.ops import (
    attend_memory,
    patchify_frames,
    patchify_videos,
    prune_tokens,
    prune_tokens_varlen,
    score_tokens,
    share_memory,
)
from bridge_stg.ops.attend_memory.head_products import HeadWeights, attend_heads, contract_heads, expand_heads

X = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
Q = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
OFFSETS = torch.tensor([0, 4, 9])
NORM: dict[str, Any] = {"size": (28, 28), "mean": (0.5,) * 3, "std": (0.5,) * 3}


def attend_twice(memory):
    shared = share_memory(memory)
    return sum(attend_memory(Q * layer, shared, scale=0.3)[0] for layer in (1, 2))


DIFFERENTIABLE = {
    "attend_memory": lambda x: attend_memory(Q, x, scale=0.3)[0],
    "attend_memory-reference": lambda x: attend_memory(Q, x, scale=0.3, backend="reference")[1],
    "attend_heads": lambda x: attend_heads(Q, HeadWeights(torch.eye(8), torch.eye(8), 2), x, scale=0.3)[0],
    "share_memory": attend_twice,
    "prune_tokens": lambda x: prune_tokens(x, Q, 4).score,
    "prune_tokens-tokens": lambda x: prune_tokens(x, Q, 4, backend="reference").tokens,
    "prune_tokens-scores": lambda x: prune_tokens(x, Q, 4, return_scores=True).scores,
    "prune_tokens_varlen": lambda x: prune_tokens_varlen(x[0], OFFSETS, Q, 2, capacity=5).score,
}
each_op = pytest.mark.parametrize("function", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)


def dual_tangent(function):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(X, torch.ones_like(X)))).tangent


FORWARD = {
    "jvp": lambda f: jvp(f, (X,), (torch.ones_like(X),)),
    "jvp-leaf": lambda f: jvp(f, (X.clone().requires_grad_(),), (torch.ones_like(X),)),
    "dual": dual_tangent,
    "jacfwd": lambda f: jacfwd(f)(X),
    "linearize": lambda f: linearize(f, X),
}


@each_op
@pytest.mark.parametrize("transform", FORWARD.values(), ids=FORWARD)
def test_forward_mode_is_refused(function, transform):
    with pytest.raises(
        NotImplementedError, match=r"has no forward-mode derivative .* must be differentiated in reverse"
    ):
        transform(function)


def test_forward_mode_past_the_public_functions_is_refused_too():
    op = torch.ops.bridge_stg.prune_tokens.default
    with pytest.raises(NotImplementedError, match="prune_tokens has no forward-mode derivative"):
        dual_tangent(lambda x: op(x, Q, 4, "dot", "max", 1.0, None, False, "reference")[2])


def test_a_call_without_a_tangent_may_stand_in_forward_mode():
    value, tangent = jvp(lambda x: x * attend_memory(Q, X, scale=0.3)[0].sum(), (X,), (torch.ones_like(X),))
    assert torch.equal(value, X * tangent)


FUNCTIONAL = {
    "grad": lambda f: grad(lambda x: f(x).sum())(X),
    "jacrev": lambda f: jacrev(f)(X),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x).sum()))(X[None]),
    "grad of vmap": lambda f: grad(lambda x: vmap(f)(x).sum())(X[None]),
}


@each_op
@pytest.mark.parametrize("transform", FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_functional_gradients_are_refused(function, transform):
    with pytest.raises(NotImplementedError, match=r"has no functional derivative .* must be differentiated with back"):
        transform(function)


def test_a_constant_call_may_stand_in_a_functional_gradient():
    value = attend_memory(Q, X, scale=0.3)[0].sum()
    assert torch.equal(grad(lambda x: (x * attend_memory(Q, X, scale=0.3)[0].sum()).sum())(X), value.expand_as(X))


def test_plain_scores_have_every_derivative():
    tangent = jvp(lambda x: score_tokens(x, Q, scoring="cosine"), (X.double(),), (torch.ones_like(X).double(),))[1]
    step = 1e-6
    low, high = (score_tokens(X.double() + d, Q, scoring="cosine") for d in (-step, step))
    torch.testing.assert_close(tangent, (high - low) / (2 * step), rtol=1e-6, atol=1e-6)


@each_op
def test_twice_backward_is_refused(function):
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    assert grad.requires_grad
    with pytest.raises((NotImplementedError, RuntimeError), match=r"differentiable once|once_differentiable"):
        torch.autograd.grad(grad.square().sum(), x)


def test_no_second_derivative_is_left_out_beside_a_residual():
    """A gradient with a differentiable part and one that is not must not keep the first alone."""
    query = Q.clone().requires_grad_()
    out, _ = attend_heads(query, HeadWeights(torch.eye(8), torch.eye(8), 2), X, scale=0.3)
    (grad,) = torch.autograd.grad((query + out).square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(grad.square().sum(), query)


def test_products_of_heads_have_a_second_derivative():
    generator = torch.Generator().manual_seed(2)
    narrow, wide, weight = (
        torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((5, 8), (5, 2, 6), (8, 6))
    )
    found = []
    for dtype in (torch.float32, torch.float64):  # the compiled products, and those of torch
        leaves = [x.detach().to(dtype).requires_grad_() for x in (narrow, wide, weight)]
        value = expand_heads(leaves[0], leaves[2], 2).square().sum() + contract_heads(*leaves[1:]).square().sum()
        first = torch.autograd.grad(value, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-3)


@each_op
def test_vmap_is_a_loop_over_calls(function):
    batch = torch.stack([X, 2 * X])
    assert torch.equal(vmap(function)(batch), torch.stack([function(x) for x in batch]))


def backward_on(device):
    """Every op on uninitialised tensors of a device: shapes and dtypes of outputs and gradients."""

    def leaf(*shape):
        return torch.empty(*shape, device=device, requires_grad=True)

    def run(function, *leaves):
        outputs = function(*leaves)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        wanted = [x for x in outputs if x.requires_grad]
        grads = torch.autograd.grad(wanted, leaves, [torch.empty_like(x) for x in wanted])
        assert [g.shape for g in grads] == [x.shape for x in leaves]
        return [(tuple(x.shape), x.dtype, x.device.type) for x in (*outputs, *grads)]

    mask = torch.empty(2, 9, dtype=torch.bool, device=device)
    index = torch.empty(2, 5, dtype=torch.int64, device=device)
    window = torch.empty(2, 3, 2, dtype=torch.int32, device=device)
    video = torch.empty(3, 3, 56, 84, dtype=torch.uint8, device=device)
    found = [
        run(lambda q, x, p, b: attend_memory(q, x, position=p, bias=b, key_mask=mask, scale=0.3, return_mass=True),
            leaf(2, 3, 8), leaf(2, 9, 8), leaf(2, 9, 8), leaf(2, 9)),
        run(lambda q, x: attend_memory(q, x, index=index, window=window, scale=0.3), leaf(2, 3, 8), leaf(2, 9, 8)),
        run(lambda q, *m: sum(attend_memory(q, s, position=p, scale=0.3)[0] for s, p in [share_memory(*m)] * 3),
            leaf(2, 3, 8), leaf(2, 9, 8), leaf(2, 9, 8)),
        run(lambda q, x: score_tokens(x, q, scoring="cosine"), leaf(2, 3, 8), leaf(2, 9, 8)),
        run(lambda q, x: prune_tokens_varlen(x, torch.empty(3, dtype=torch.int32, device=device), q, 2, capacity=6),
            leaf(2, 3, 8), leaf(9, 8)),
    ]  # fmt: skip
    for scoring in ("dot", "cosine"):
        for reduce in ("max", "mean", "logsumexp"):
            options: dict[str, Any] = {"scoring": scoring, "reduce": reduce, "mask": mask, "return_scores": True}
            found.append(run(lambda q, x, o=options: prune_tokens(x, q, 4, **o), leaf(2, 3, 8), leaf(2, 9, 8)))
    for values in (patchify_frames(video, **NORM)[0], patchify_videos([video, video[:1]], **NORM)[0]):
        found.append([(tuple(values.shape), values.dtype, values.device.type)])
    return found


def test_meta_and_fake_tensors_have_the_shapes_of_real_ones():
    with FakeTensorMode():
        fake = backward_on("cpu")
    meta = backward_on("meta")
    assert [[(*x[:2], "cpu") for x in call] for call in meta] == fake
    assert [x[0] for x in fake[0]] == [(2, 3, 8), (2, 3), (2, 9), (2, 3, 8), (2, 9, 8), (2, 9, 8), (2, 9)]


def test_validation_has_nothing_to_look_at_on_meta():
    q, x = Q.to("meta"), X.to("meta")
    index = torch.empty(2, 5, dtype=torch.int64, device="meta")
    attend_memory(q, x, index=index, scale=0.3, validate=True)
    prune_tokens(x, q, 2, mask=torch.empty(2, 9, dtype=torch.bool, device="meta"), validate=True)
    prune_tokens_varlen(x[0], OFFSETS.to("meta"), q, 2, capacity=9, validate=True)
    patchify_frames(torch.empty(3, 3, 28, 28, dtype=torch.uint8, device="meta"), index[0], **NORM, validate=True)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, q):
        return self.function(x, q)


DYNAMIC = {
    "attend_memory": lambda x, q: attend_memory(q, x, scale=0.3, return_mass=True),
    "prune_tokens": lambda x, q: tuple(prune_tokens(x, q, max(1, (x.shape[1] + 1) // 2), return_scores=True)),
    "prune_tokens-five": lambda x, q: tuple(prune_tokens(x, q, 5, scoring="cosine")),
    "score_tokens": lambda x, q: (score_tokens(x, q),),
    "prune_tokens_varlen": lambda x, q: tuple(
        prune_tokens_varlen(x[0], OFFSETS, q[:2], 3, capacity=x.shape[1], backend="reference")
    ),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("function", DYNAMIC.values(), ids=DYNAMIC)
def test_batch_and_tokens_stay_dynamic_in_an_export(function, strict):
    dim = torch.export.Dim
    batch, tokens = dim("batch", min=2, max=64), dim("tokens", min=8, max=512)
    dynamic = ({0: batch, 1: tokens}, {0: batch})
    program = torch.export.export(Call(function), (X, Q), dynamic_shapes=dynamic, strict=strict)
    x, q = torch.randn(5, 40, 8), torch.randn(5, 3, 8)
    assert all(torch.equal(a, b) for a, b in zip(program.module()(x, q), function(x, q), strict=True))


def work(seed):
    """Forward and backward of every op from one seed."""
    generator = torch.Generator().manual_seed(seed)
    x, q = (torch.randn(2, n, 24, generator=generator).requires_grad_() for n in (70, 5))
    shared = share_memory(x)
    outputs = [attend_memory(q * layer, shared, scale=0.2)[0] for layer in (1, 2, 3)]
    for scoring, reduce in (("dot", "max"), ("cosine", "logsumexp"), ("cosine", "mean")):
        kept = prune_tokens(x, q, 20, scoring=scoring, reduce=reduce, return_scores=True)
        outputs += [kept.tokens, kept.score, kept.scores]
    packed = prune_tokens_varlen(x[0], torch.tensor([0, 30, 70]), q, 10, capacity=30)
    outputs += [packed.tokens, packed.score]
    grads = torch.autograd.grad([y.square().sum() for y in outputs], (x, q))
    video = torch.randint(0, 256, (3, 3, 50, 70), generator=generator, dtype=torch.uint8)
    return [*(y.detach() for y in outputs), *grads, patchify_frames(video, **NORM)[0]]


def test_eight_threads_give_the_bits_of_one():
    expected = [work(seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = list(pool.map(work, range(16)))
            assert all(
                torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)
            )


def test_eight_threads_share_one_memory():
    """Layers of several threads, each with its own backward pass over one shared memory."""
    x = torch.randn(2, 70, 24, requires_grad=True)
    shared = share_memory(x)

    def grad(seed):
        query = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(seed))
        outputs = [attend_memory(query * layer, shared, scale=0.2)[0].square().sum() for layer in (1, 2)]
        return torch.autograd.grad(sum(outputs), x, retain_graph=True)[0]

    expected = [grad(seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(grad, range(16)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
