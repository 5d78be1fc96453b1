"""The compiled CPU kernel of `patchify_frames`: bit for bit the Hugging Face processors, at every SIMD level."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv
from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

from bridge_stg.ops import patchify_frames, patchify_videos
from bridge_stg.ops.core.native import library_obstacle
from bridge_stg.ops.patchify_frames.reference import reference

from .cases import MEAN, STD, check_cases, draw_video, strided

pytestmark = pytest.mark.skipif(library_obstacle("cpu") is not None, reason=str(library_obstacle("cpu")))

OPS = torch.ops.bridge_stg
NO_TOTAL_BUDGET = {"cap_pixels_per_frame": False} if hasattr(Qwen2VLVideoProcessor, "cap_pixels_per_frame") else {}
PROCESSORS = {2: Qwen2VLVideoProcessor(), 3: Qwen3VLVideoProcessor(do_sample_frames=False)}
SIDE = st.one_of(st.just(1), st.integers(1, 48), st.integers(40, 160))


def hugging_face(family: int, frames: torch.Tensor, pixels: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel values and grid for a budget of about `pixels` pixels a frame."""
    unit = options["patch_size"] * options["merge_size"]
    low = max(pixels, unit * unit) * (frames.shape[0] if family == 3 else 1)
    size = {"shortest_edge": low, "longest_edge": 2 * low}
    output = PROCESSORS[family](videos=[frames], size=size, return_tensors="pt", **NO_TOTAL_BUDGET, **options)
    return output["pixel_values_videos"], output["video_grid_thw"]


@settings(max_examples=200, deadline=None)
@given(
    family=st.sampled_from([2, 3]),
    shape=st.tuples(st.integers(1, 5), SIDE, SIDE),
    picks=st.none() | st.lists(st.integers(0, 4), min_size=1, max_size=6),
    pixels=st.integers(400, 9000),
    patches=st.sampled_from([(14, 2, 2), (16, 2, 2), (8, 3, 1), (7, 1, 3), (20, 2, 1)]),
    order=st.integers(0, 3),
    layout=st.sampled_from(["TCHW", "THWC"]),
    seed=st.integers(0, 2**16),
)
def test_equals_hugging_face(family, shape, picks, pixels, patches, order, layout, seed):
    video = draw_video(shape[0], shape[1], shape[2], seed)
    index = None if picks is None else torch.tensor(picks) % shape[0]
    frames = video if index is None else video[index]
    if family == 3 and frames.shape[0] < patches[1]:  # which that processor refuses
        family = 2
    patch_size, temporal_patch_size, merge_size = patches
    options: dict[str, Any] = {
        "patch_size": patch_size,
        "temporal_patch_size": temporal_patch_size,
        "merge_size": merge_size,
    }
    if seed % 2:
        options |= {"image_mean": MEAN, "image_std": STD}
    try:
        expected, grid = hugging_face(family, frames, pixels, **options)
    except ValueError as refused:  # older Qwen3 processors refuse sides below a patch
        if family == 2 or "must be larger than factor" not in str(refused):
            raise
        family = 2
        expected, grid = hugging_face(family, frames, pixels, **options)
    mean = options.pop("image_mean", PROCESSORS[family].image_mean)
    std = options.pop("image_std", PROCESSORS[family].image_std)
    size = (int(grid[0, 1]) * patch_size, int(grid[0, 2]) * patch_size)
    source = strided(video, order, layout)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours, our_grid = patchify_frames(
            source, index, size=size, mean=mean, std=std, layout=layout, dtype=dtype, backend="native", **options
        )
        assert torch.equal(ours, expected.to(dtype)) and torch.equal(our_grid, grid)


def test_equals_the_reference_on_every_path():
    check_cases()


@pytest.mark.parametrize("level", ["scalar", "avx2"])
def test_every_simd_level_gives_the_same_bits(level):
    done = subprocess.run(
        [sys.executable, "-c", "from tests.ops.patchify_frames.cases import check_cases; check_cases()"],
        env=os.environ | {"BRIDGE_STG_SIMD": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_matter(threads):
    videos = [draw_video(5, 90, 60, 1), draw_video(1, 30, 80, 2), draw_video(4, 33, 47, 4)]
    options: dict[str, Any] = {"size": (84, 56), "mean": MEAN, "std": STD}
    expected, _ = patchify_videos(videos, backend="reference", **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(patchify_videos(videos, backend="native", **options)[0], expected)
    finally:
        torch.set_num_threads(before)


def test_large_outputs_are_the_same():
    """Beyond 32 MiB they are written past the cache; `out` need not be aligned for that."""
    video = draw_video(2, 1100, 1000, 1)
    options: dict[str, Any] = {"size": (1680, 1680), "mean": MEAN, "std": STD}
    expected, _ = patchify_frames(video, backend="reference", **options)
    assert torch.equal(patchify_frames(video, backend="native", **options)[0], expected)
    buffer = torch.empty(expected.numel() + 3)[3:].view(expected.shape)
    assert torch.equal(patchify_frames(video, backend="native", out=buffer, **options)[0], expected)


def test_offsets_beyond_32_bits():
    memory = torch.empty(2**31 + 4096, dtype=torch.uint8)  # of which only what is touched is ever backed by pages
    video = memory.as_strided((2, 3, 20, 30), (2**31, 600, 30, 1))
    video.copy_(draw_video(2, 20, 30, 1))
    options: dict[str, Any] = {"size": (28, 28), "mean": MEAN, "std": STD}
    index = torch.tensor([1, 0, 1])
    expected = patchify_frames(video.contiguous(), index, backend="reference", **options)[0]
    assert torch.equal(patchify_frames(video, index, backend="native", **options)[0], expected)


@pytest.mark.parametrize(("mean", "std"), [([300.0, -5.0, 0.0], [1e-38, 1e30, 7.0]), ([float("nan")] * 3, [1.0] * 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_division_is_exact_or_not_replaced(mean, std, dtype):
    """Where multiplying by a reciprocal would not give the quotient, the kernel divides."""
    arguments = (draw_video(1, 28, 56, 1), None, [28, 56], 14, 2, 2, mean, std, 1 / 255, "bicubic", "TCHW", dtype)
    expected = reference(*arguments)
    torch.testing.assert_close(OPS.patchify_frames(*arguments, "native"), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["TCHW", "THWC"])
def test_opcheck(layout):
    video = strided(draw_video(5, 20, 31, 1), 1, layout)
    options = (14, 2, 2, MEAN, STD, 1 / 255, "bicubic", layout)
    index = torch.tensor([0, 4, 4])
    opcheck(OPS.patchify_frames.default, (video, index, [28, 56], *options, torch.float16, "native"))
    opcheck(OPS.patchify_frames_out.default, (video, index, [28, 56], *options, torch.empty(16, 1176), "native"))
    opcheck(
        OPS.patchify_videos.default,
        ([video, video], [None, index], [28, 28, 28, 56], *options, torch.float32, "native"),
    )


def test_compiles_without_graph_breaks():
    def pipeline(video, index, buffer):
        rows, grid = patchify_videos([video, video], [index, None], size=[(28, 28), (28, 56)], mean=MEAN, std=STD)
        patchify_frames(video, index, size=(28, 56), mean=MEAN, std=STD, out=buffer)
        return rows, grid, buffer * 2

    arguments = draw_video(4, 20, 31, 1), torch.tensor([3, 0, 0])
    compiled = torch.compile(pipeline, fullgraph=True, backend="aot_eager")
    expected = pipeline(*arguments, torch.empty(16, 1176))
    assert all(torch.equal(a, b) for a, b in zip(compiled(*arguments, torch.empty(16, 1176)), expected, strict=True))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("size", "target"), [(97, 56), (20, 84), (1, 28), (640, 28), (56, 56)])
def test_the_resize_table_gives_the_pixels_of_torchvision(size, target, interpolation):
    from bridge_stg._native import resize_table

    table = resize_table(size, target, interpolation)
    row = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(size))
    resized = []
    for start, weights in zip(table["start"], table["weights"], strict=True):
        total = sum(w * int(row[start + j]) for j, w in enumerate(weights)) + (1 << (table["precision"] - 1))
        resized.append(min(max(total >> table["precision"], 0), 255))
    frame = row.to(torch.uint8).expand(1, 3, 1, -1).contiguous()
    expected = tv.resize(frame, [1, target], InterpolationMode[interpolation.upper()], antialias=True)
    assert resized == expected[0, 0, 0].tolist()


def test_the_resize_table_refuses_what_is_no_size():
    from bridge_stg._native import resize_table

    with pytest.raises(ValueError, match=r"sizes must be in 1\.\.2147483647, got 0 and 28"):
        resize_table(0, 28, "bicubic")
    with pytest.raises(ValueError, match="interpolation must be 'bilinear' or 'bicubic', got 'nearest'"):
        resize_table(28, 28, "nearest")
