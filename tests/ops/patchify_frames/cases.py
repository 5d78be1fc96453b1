"""Cases that reach every path of the compiled `patchify_frames`, and a check of them against the reference."""

from __future__ import annotations

import torch

from bridge_stg.ops.patchify_frames.reference import reference

OPS = torch.ops.bridge_stg
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def draw_video(frames: int, height: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    video = torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)
    return video.where(video > 127, 0) if seed % 3 == 0 else video


def strided(video: torch.Tensor, order: int, layout: str) -> torch.Tensor:
    """The same [T, 3, H, W] values in one of several memory orders, viewed as `layout`."""
    if order == 1:  # channels last
        video = video.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    elif order == 2:  # width outermost
        video = video.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    elif order == 3:  # a window of something larger
        video = torch.nn.functional.pad(video, (3, 2, 1, 0))[..., 1:, 3:-2]
    return video if layout == "TCHW" else video.permute(0, 2, 3, 1)


def check_cases() -> None:
    """Every path of the kernel against the reference; the SIMD level is that of the process."""
    shapes = [  # of source and target: (height, width)
        ((40, 50), (28, 56)),  # windows in one load
        ((20, 200), (28, 56)),  # one load a tap pair
        ((9, 2000), (28, 56)),  # filters of many taps
        ((900, 20), (28, 56)),
        ((3, 2), (56, 84)),
        ((28, 97), (28, 56)),  # one axis unchanged
        ((60, 56), (28, 56)),
        ((28, 56), (28, 56)),  # no resize
        ((1, 1), (28, 28)),
    ]
    for seed, (source, target) in enumerate(shapes):
        video = draw_video(3, source[0], source[1], seed)
        for order, dtype in ((0, torch.float32), (1, torch.bfloat16), (2, torch.float16), (3, torch.float32)):
            for interpolation in ("bicubic", "bilinear"):
                index = torch.tensor([2, 0, 0, 0, 1])
                rest = (14, 2, 2, MEAN, STD, 1 / 255, interpolation, "TCHW", dtype)
                expected = reference(video, index, target, *rest)
                ours = OPS.patchify_frames(strided(video, order, "TCHW"), index, target, *rest, "native")
                assert torch.equal(ours, expected), (source, target, order, dtype, interpolation)
