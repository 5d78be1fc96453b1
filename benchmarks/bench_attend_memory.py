"""The cross-attentions of six decoder layers to one memory: absorbed, against everything that projects keys and values.

Every provider runs the layers as a decoder does: the queries of a layer are its own plus the output of the one before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge_stg.modules import MemoryCrossAttention, MultiLayerQueryCrossAttention
from bridge_stg.ops import attend_memory, share_memory

from .harness import Benchmark, Case, Inputs, Prepared, Provider, Unavailable, Work, relative_error
from .harness.cases import FORWARD, FORWARD_BACKWARD

LAYERS = 6
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
BOTH = (FORWARD, FORWARD_BACKWARD)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, length, H, hd] -> [B, Q, H, hd]


def _case(
    clips: int, rows: int, width: int, heads: int, queries: int, dtype: torch.dtype, series: str | None = None
) -> Case:
    sizes = {"B": clips, "M": rows, "C": width, "H": heads, "Q": queries}
    shape = f"L{LAYERS} " + " ".join(f"{name}{size}" for name, size in sizes.items())
    modes = BOTH if series is None else (FORWARD,)
    return Case(shape, dtype, sizes, modes, ("query", "memory"), series, float(queries))


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [_case(2, 64, 64, 4, 2, torch.float32)]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    grid = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    return [
        _case(1, 8192, 256, 8, 16, dtype),
        *([_case(16, 8192, 256, 8, 16, dtype)] if device == "cuda" else []),
        _case(64, 64, 256, 8, 4, dtype),
        _case(1, 4096, 1024, 16, 16, dtype),
        *(_case(1, 8192, 256, 8, queries, dtype, "Q at B1 M8192 C256 H8") for queries in grid),
        *(_case(64, 64, 256, 8, queries, dtype, "Q at B64 M64 C256 H8") for queries in grid),
    ]


def inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    clips, rows, width, queries = (case.sizes[name] for name in "BMCQ")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    return {"query": normal(LAYERS, clips, queries, width), "memory": normal(clips, rows, width)}


@functools.lru_cache(maxsize=1)
def _attentions(width: int, heads: int, device: torch.device, dtype: torch.dtype) -> list[nn.MultiheadAttention]:
    """The six layers whose parameters everybody takes, biases included."""
    generator = torch.Generator().manual_seed(0)
    layers = [nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(LAYERS)]
    for parameter in (p for layer in layers for p in layer.parameters()):
        scale = 0.02 if parameter.dim() == 1 else width**-0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return [layer.to(device, dtype) for layer in layers]


def _layers(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> list[nn.MultiheadAttention]:
    return _attentions(case.sizes["C"], case.sizes["H"], device, dtype or case.dtype)


def _decode(query: Tensor, layer: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, ...]:
    outputs: list[Tensor] = []
    for i in range(LAYERS):
        outputs.append(layer(i, query[i] + outputs[-1] if outputs else query[i]))
    return tuple(outputs)


def reference(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """In float32, by the textbook formula."""
    query, memory = inputs["query"].float(), inputs["memory"].float()
    layers = _layers(case, query.device)
    heads = case.sizes["H"]

    def layer(i: int, q: Tensor) -> Tensor:
        weight, bias = (p.detach().float().chunk(3) for p in (layers[i].in_proj_weight, layers[i].in_proj_bias))
        parts = [F.linear(x, w, b) for x, w, b in zip((q, memory, memory), weight, bias, strict=True)]
        q_, k_, v_ = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        out = (q_ @ k_.transpose(2, 3) / q_.shape[-1] ** 0.5).softmax(dim=-1) @ v_
        last = layers[i].out_proj
        return F.linear(out.transpose(1, 2).flatten(2), last.weight.detach().float(), last.bias.detach().float())

    return _decode(query, layer)


def disagreement(case: Case, inputs: Inputs, outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    for i, (found, wanted) in enumerate(zip(outputs, expected, strict=True)):
        error = relative_error(found, wanted)
        if not error <= TOLERANCE[case.dtype]:
            return f"layer {i} has relative error {error:.1e}, allowed {TOLERANCE[case.dtype]:.0e}"
    return None


def work(case: Case, mode: str) -> Work:
    """One pass over the memory, and the cheaper of projecting keys and values or absorbing the projections.

    With backward: the memory again, its gradient, and twice the operations.
    """
    clips, rows, width, heads, queries = (case.sizes[name] for name in "BMCHQ")
    absorbed = 4 * queries * heads * rows * width
    projected = 4 * rows * width**2 + 4 * queries * rows * width
    flops = LAYERS * clips * (min(absorbed, projected) + 8 * queries * width**2)
    moved = case.dtype.itemsize * (clips * (rows + 2 * LAYERS * queries) * width + 4 * LAYERS * width**2)
    return Work(moved, flops) if mode == FORWARD else Work(3 * moved, 3 * flops)


def _with_shared_memory(case: Case, device: torch.device) -> Prepared:
    module = MultiLayerQueryCrossAttention(case.sizes["C"], case.sizes["H"], LAYERS, device=device, dtype=case.dtype)
    for ours, theirs in zip(module.layers, _layers(case, device), strict=True):
        ours.load_state_dict(theirs.state_dict())

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        memory = module.share(inputs["memory"], queries=case.sizes["Q"])
        return _decode(inputs["query"], lambda i, q: module.layer(i, q, memory))

    return Prepared(call, tuple(module.parameters()))


def _layer_by_layer(path: Any) -> Callable[[Case, torch.device], Prepared]:
    def prepare(case: Case, device: torch.device) -> Prepared:
        layers = [MemoryCrossAttention.from_multihead_attention(x, path) for x in _layers(case, device)]

        def call(inputs: Inputs) -> tuple[Tensor, ...]:
            return _decode(inputs["query"], lambda i, q: layers[i](q, inputs["memory"])[0])

        return Prepared(call, tuple(p for layer in layers for p in layer.parameters()))

    return prepare


def _plain_products(case: Case, device: torch.device) -> Prepared:
    """Absorbed and over one shared memory, with nothing but products of torch."""
    layers = _layers(case, device)
    heads = case.sizes["H"]

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        memory = share_memory(inputs["memory"])

        def layer(i: int, x: Tensor) -> Tensor:
            w_q, w_k, w_v = (w.unflatten(0, (heads, -1)) for w in layers[i].in_proj_weight.chunk(3))
            b_q, _, b_v = layers[i].in_proj_bias.chunk(3)
            q = F.linear(x, w_q.flatten(0, 1), b_q).view(-1, *w_q.shape[:2])
            rows = torch.bmm(q.transpose(0, 1), w_k).transpose(0, 1)  # [B Q, H, C]
            scale = w_q.shape[1] ** -0.5
            out, _ = attend_memory(rows.reshape(x.shape[0], -1, x.shape[2]), memory, scale=scale, backend="reference")
            values = torch.bmm(out.view(rows.shape).transpose(0, 1), w_v.transpose(1, 2)).transpose(0, 1)
            return layers[i].out_proj(values.reshape(x.shape) + b_v)

        return _decode(inputs["query"], layer)

    return Prepared(call, tuple(p for layer in layers for p in layer.parameters()))


def _multihead_attention(case: Case, device: torch.device) -> Prepared:
    layers = _layers(case, device)

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        memory = inputs["memory"]
        return _decode(inputs["query"], lambda i, q: layers[i](q, memory, memory, need_weights=False)[0])

    return Prepared(call, tuple(p for layer in layers for p in layer.parameters()))


class _FusedProjection(nn.Module):
    """Keys and values of all layers by one product, then `attend` layer by layer."""

    def __init__(self, layers: Sequence[nn.MultiheadAttention], attend: Attend) -> None:
        super().__init__()
        weights = [layer.in_proj_weight.detach().chunk(3) for layer in layers]
        biases = [layer.in_proj_bias.detach().chunk(3) for layer in layers]
        self.heads, self.attend = layers[0].num_heads, attend
        self.w_q = nn.ParameterList(w[0].clone() for w in weights)
        self.b_q = nn.ParameterList(b[0].clone() for b in biases)
        self.w_kv = nn.Parameter(torch.cat([part for w in weights for part in w[1:]]))
        self.b_kv = nn.Parameter(torch.cat([part for b in biases for part in b[1:]]))
        self.w_out = nn.ParameterList(layer.out_proj.weight.detach().clone() for layer in layers)
        self.b_out = nn.ParameterList(layer.out_proj.bias.detach().clone() for layer in layers)

    def forward(self, query: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        # [B, M, 2 L, H, hd]: key and value of layer 0, of layer 1, ...
        parts = F.linear(memory, self.w_kv, self.b_kv).unflatten(-1, (2 * LAYERS, self.heads, -1)).unbind(2)

        def layer(i: int, q: Tensor) -> Tensor:
            rows = F.linear(q, self.w_q[i], self.b_q[i]).unflatten(-1, (self.heads, -1))
            out = self.attend(rows, parts[2 * i], parts[2 * i + 1])
            return F.linear(out.flatten(2), self.w_out[i], self.b_out[i])

        return _decode(query, layer)


def _fused(make: Callable[[Case, torch.device], Attend]) -> Callable[[Case, torch.device], Prepared]:
    def prepare(case: Case, device: torch.device) -> Prepared:
        module = _FusedProjection(_layers(case, device), make(case, device))
        return Prepared(lambda inputs: module(inputs["query"], inputs["memory"]), tuple(module.parameters()))

    return prepare


def _sdpa(backend: str) -> Callable[[Case, torch.device], Attend]:
    def make(case: Case, device: torch.device) -> Attend:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        return attend

    return make


def _flex(case: Case, device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _xformers(case: Case, device: torch.device) -> Attend:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise Unavailable(f"xformers is not installed: {error}") from error
    return memory_efficient_attention


def _flash_attn(case: Case, device: torch.device) -> Attend:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise Unavailable(f"flash-attn is not installed: {error}") from error
    return flash_attn_func


def providers(case: Case, device: torch.device) -> Sequence[Provider]:
    kernels = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    return [
        Provider("bridge_stg", _with_shared_memory, ours=True, subject=True),
        Provider("bridge_stg, absorbed, layer by layer", _layer_by_layer("absorbed"), ours=True),
        Provider("bridge_stg, projected, layer by layer", _layer_by_layer("projected"), ours=True),
        Provider("bridge_stg, absorbed, products of torch", _plain_products, ours=True),
        Provider("nn.MultiheadAttention", _multihead_attention),
        *(
            Provider(f"fused GEMM + SDPA {name.removesuffix('_ATTENTION').lower()}", _fused(_sdpa(name)))
            for name in (kernels if device.type == "cuda" else (kernels[0], kernels[-1]))
        ),
        *([Provider("fused GEMM + FlexAttention", _fused(_flex), slow_start=True)] if case.series is None else []),
        Provider("fused GEMM + xformers", _fused(_xformers)),
        Provider("fused GEMM + flash-attn", _fused(_flash_attn)),
    ]


BENCHMARK = Benchmark(
    "attend_memory", cases, inputs, providers, reference, disagreement, work, gradient_tolerance=TOLERANCE
)
