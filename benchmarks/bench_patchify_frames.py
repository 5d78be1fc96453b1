"""`patchify_frames` against the Hugging Face processor, end to end, and torchvision written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bridge_stg.ops import patchify_frames
from bridge_stg.ops.patchify_frames.settings import PatchSettings

from .harness import Benchmark, Case, Inputs, Prepared, Provider, Unavailable, Work, own_providers

# Of the CLIP image encoder, as the Qwen2-VL and Qwen2.5-VL processors normalise.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PATCH, MERGE, TEMPORAL = 14, 2, 2
# Pixels a frame that the processor resizes into; the targets below are what it makes of each source.
BUDGET = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}


def _case(frames: int, source: tuple[int, int], target: tuple[int, int], dtype: torch.dtype = torch.float32) -> Case:
    shape = f"T{frames} {source[0]}x{source[1]} to {target[0]}x{target[1]}"
    return Case(shape, dtype, {"frames": frames, "source": source, "target": target})


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [_case(4, (240, 320), (280, 392))]
    full = [
        _case(32, (720, 1280), (560, 1008)),
        _case(64, (360, 640), (364, 644)),
        _case(16, (1080, 1920), (560, 1008)),
    ]
    if device == "cpu":
        return full
    long = [_case(64, (1080, 1920), (560, 1008), dtype) for dtype in (torch.bfloat16, torch.float32)]
    return [*long, full[0]]


def inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    shape = (case.sizes["frames"], 3, *case.sizes["source"])
    return {"video": torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)}


def reference(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    return (_patchify(case, inputs["video"], "reference"),)


def disagreement(case: Case, inputs: Inputs, outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    """On the CPU every pixel is the same and only the normalisation may round; on CUDA one step of uint8 is allowed."""
    step = 1 / 255 / min(STD)
    allowed = 1e-5 if outputs[0].device.type == "cpu" else 1.01 * step
    if case.dtype != torch.float32:
        allowed += 2.7 * torch.finfo(case.dtype).eps
    worst = float((outputs[0].float() - expected[0].float()).abs().max())
    return None if worst <= allowed else f"a pixel value is off by {worst:.2g}, {worst / step:.1f} steps of uint8"


def work(case: Case, mode: str) -> Work:
    """Read the frames, write the patches; two operations a tap of each resize pass, two a value to normalise."""
    frames, (height, width), (h, w) = case.sizes["frames"], case.sizes["source"], case.sizes["target"]
    operations = 2 * h * w + sum(
        2 * lines * size * int(4 * max(1.0, source / size))
        for lines, source, size in ((height, width, w), (w, height, h))
        if source != size
    )
    return Work(3 * frames * (height * width + h * w * case.dtype.itemsize), 3 * frames * operations)


def _patchify(case: Case, video: Tensor, backend: str | None, out: Tensor | None = None) -> Tensor:
    pixels, _ = patchify_frames(
        video, size=case.sizes["target"], mean=MEAN, std=STD, dtype=case.dtype, out=out, backend=backend
    )
    return pixels


def _ours(backend: str | None) -> Callable[[Case, torch.device], Prepared]:
    def prepare(case: Case, device: torch.device) -> Prepared:
        return Prepared(lambda inputs: (_patchify(case, inputs["video"], backend),))

    return prepare


def _ours_into_a_buffer(case: Case, device: torch.device) -> Prepared:
    h, w = case.sizes["target"]
    rows = -(-case.sizes["frames"] // TEMPORAL) * (h // PATCH) * (w // PATCH)
    buffer = torch.empty(rows, 3 * TEMPORAL * PATCH**2, dtype=case.dtype, device=device)
    return Prepared(lambda inputs: (_patchify(case, inputs["video"], None, buffer),))


def _hugging_face(case: Case, device: torch.device) -> Prepared:
    try:
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    except ImportError as error:
        raise Unavailable(f"transformers or torchvision is not installed: {error}") from error
    processor = Qwen2VLVideoProcessor(size=dict(BUDGET), do_sample_frames=False)

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        found = processor(videos=[inputs["video"]], return_tensors="pt")["pixel_values_videos"]
        return (found.to(case.dtype),)

    return Prepared(call)


def _torchvision(compiled: bool) -> Callable[[Case, torch.device], Prepared]:
    def prepare(case: Case, device: torch.device) -> Prepared:
        try:
            from torchvision.transforms.v2 import InterpolationMode
            from torchvision.transforms.v2 import functional as tv
        except ImportError as error:
            raise Unavailable(f"torchvision is not installed: {error}") from error
        h, w = case.sizes["target"]
        mean, std = (255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))

        def pipeline(video: Tensor) -> Tensor:
            video = tv.resize(video, [h, w], interpolation=InterpolationMode.BICUBIC, antialias=True)
            pixels = (video.float() - mean) / std
            grid = (PATCH, w // PATCH // MERGE, MERGE)
            split = pixels.view(-1, TEMPORAL, 3, h // PATCH // MERGE, MERGE, PATCH, grid[1], MERGE, PATCH)
            patches = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
            return patches.reshape(-1, 3 * TEMPORAL * PATCH**2).to(case.dtype)

        run = torch.compile(pipeline, dynamic=False) if compiled else pipeline
        return Prepared(lambda inputs: (run(inputs["video"]),))

    return prepare


def providers(case: Case, device: torch.device) -> Sequence[Provider]:
    call = {
        "sizes": [(case.sizes["source"], case.sizes["target"])],
        "settings": PatchSettings(PATCH, TEMPORAL, MERGE, MEAN, STD, 1 / 255, "bicubic", "TCHW"),
    }
    return [
        *own_providers("patchify_frames", device, _ours, **call),
        Provider("bridge_stg (out=)", _ours_into_a_buffer, ours=True, reuses_output=True),
        Provider("HF Qwen2VLVideoProcessor", _hugging_face),
        Provider("torchvision", _torchvision(compiled=False)),
        Provider("torchvision, torch.compile", _torchvision(compiled=True), slow_start=True),
    ]


BENCHMARK = Benchmark("patchify_frames", cases, inputs, providers, reference, disagreement, work)
