"""Run every compiled kernel once, on small odd shapes, under `compute-sanitizer python -m benchmarks.gpu.sanitize`.

Nothing is timed and nothing compared; tests do that. Sizes are no multiples of any tile, indices and offsets lie at
and beyond their ends, masks hide whole segments.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bridge_stg.ops import (
    attend_memory,
    backends,
    patchify_frames,
    patchify_videos,
    prune_tokens,
    prune_tokens_varlen,
    share_memory,
)

from .events import Event, emit

Call = Callable[[str], object]


def kernels(op: str, device: str) -> list[str]:
    """Backends of `op` that run compiled code on the device; the reference where there is none."""
    usable = [s.name for s in backends() if s.op == op and s.usable and device in (s.devices or (device,))]
    return [name for name in usable if name != "reference"] or ["reference"]


def calls(device: str) -> Iterator[tuple[str, Call]]:
    """(op, call of it on a backend), the hand-written CUDA first, then Triton in bfloat16 and in float32."""
    settings = {"size": (28, 56), "mean": [0.5] * 3, "std": [0.5] * 3}
    video = torch.randint(0, 256, (3, 3, 31, 47), dtype=torch.uint8, device=device)
    # Only on CUDA are frames outside the video clamped without a look at the values.
    beyond = torch.tensor([2, -7, 99] if device == "cuda" else [2, 0, 0], device=device)
    yield "patchify_frames", lambda backend: patchify_frames(video, beyond, **settings, backend=backend)
    yield (
        "patchify_videos",
        lambda backend: patchify_videos([video, video[:1, :, 5:, ::2]], **settings, backend=backend),
    )
    out = torch.empty(16, 3 * 2 * 14 * 14, device=device)
    yield "patchify_frames_out", lambda backend: patchify_frames(video, out=out, **settings, backend=backend)
    for dtype in (torch.bfloat16, torch.float32):
        yield from _prune_calls(device, dtype)
        yield from _attend_calls(device, dtype)


def _prune_calls(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    for segments, count, width, queries in ((2, 37, 40, 3), (1, 1, 8, 1), (3, 1030, 72, 17)):
        tokens, query = normal(segments, count, width), normal(segments, queries, width)
        mask = torch.rand(segments, count, device=device) > 0.5
        mask[0] = False
        for keep in (1, count):
            yield (
                "prune_tokens",
                lambda b, x=tokens, q=query, k=keep, m=mask: _backward(
                    prune_tokens(x, q, k, scoring="cosine", mask=m, return_scores=True, backend=b), x, q
                ),
            )
    tokens, query = normal(53, 40), normal(3, 3, 40)
    offsets = torch.tensor([0, 20, 20, 53], device=device)
    for policy, budget in (("per_segment", 7), ("per_clip", 9), ("top_p", 0.5), ("threshold", 0.0)):
        yield (
            "prune_tokens_varlen",
            lambda b, p=policy, n=budget: _backward(
                prune_tokens_varlen(tokens, offsets, query, n, policy=p, capacity=11, backend=b), tokens, query
            ),
        )


def _attend_calls(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    for rows, width in ((33, 64), (1, 128), (300, 256)):
        query, memory, position = normal(2, 19, width), normal(2, rows, width), normal(2, rows, width)
        bias = torch.randn(2, rows, device=device, requires_grad=True)
        mask = torch.rand(2, rows, device=device) > 0.3
        mask[1] = False
        index = torch.randint(-1, rows + 1, (2, 21), device=device)  # both ends lie outside
        window = torch.tensor([[-3, 5], [4, 4]], device=device)[:, None].expand(2, 19, 2).contiguous()
        yield "attend_memory", lambda b, q=query, m=memory: _two_layers(b, q, m)
        for options in ({}, {"position": position, "bias": bias, "key_mask": mask}, {"index": index, "window": window}):
            leaves = [query, memory, *(x for x in options.values() if x.requires_grad)]
            yield (
                "attend_memory",
                lambda b, q=query, m=memory, o=options, leaves=leaves: _backward(
                    attend_memory(q, m, scale=0.1, return_mass=True, backend=b, **o), *leaves
                ),
            )


def _two_layers(backend: str, query: Tensor, memory: Tensor) -> None:
    """Two layers whose gradient of the memory is deferred to one kernel."""
    shared = share_memory(memory)
    outputs = [attend_memory(scale * query, shared, scale=0.1, backend=backend)[0] for scale in (1.0, 2.0)]
    _backward(tuple(outputs), query, memory)


def _backward(outputs: tuple[Tensor, ...], *leaves: Tensor) -> None:
    reached = [x for x in outputs if x.requires_grad]
    torch.autograd.grad(reached, leaves, [torch.ones_like(x) for x in reached], allow_unused=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitize", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    for number, (op, call) in enumerate(calls(options.device)):
        for backend in kernels(op, options.device):
            call(backend)
            if options.device == "cuda":
                torch.cuda.synchronize()  # what the call did wrong is reported before the next begins
            emit(Event(f"call {number}: {op} {backend}"))


if __name__ == "__main__":
    main()
