"""`patchify_frames`: bit for bit the Hugging Face video processors on the CPU, and the documented layout."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from bridge_stg.ops import backends, patchify_frames, patchify_videos
from bridge_stg.ops.patchify_frames.settings import Layout

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROCESSOR = Qwen2VLVideoProcessor()
# A budget for each frame, which older releases of transformers know alone.
NO_TOTAL_BUDGET = {"cap_pixels_per_frame": False} if hasattr(PROCESSOR, "cap_pixels_per_frame") else {}
ON_CPU = [row.name for row in backends() if row.op == "patchify_frames" and row.usable and row.name != "cuda"]


def random_video(frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)


def hugging_face(video, low, high, patch_size, temporal_patch_size, merge_size, mean=MEAN, std=STD):
    """Pixel values, grid and size of the Hugging Face processor for a pixel budget low..high a frame."""
    output = PROCESSOR(
        videos=[video],
        size={"shortest_edge": low, "longest_edge": high},
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        merge_size=merge_size,
        image_mean=list(mean),
        image_std=list(std),
        **NO_TOTAL_BUDGET,
        return_tensors="pt",
    )
    size = smart_resize(video.shape[2], video.shape[3], patch_size * merge_size, low, high)
    return output["pixel_values_videos"], output["video_grid_thw"], size


def assert_same_as_hugging_face(video, index, low, high, patch_size=14, temporal_patch_size=2, merge_size=2, **norm):
    frames = video if index is None else video[index]
    expected, grid, size = hugging_face(frames, low, high, patch_size, temporal_patch_size, merge_size, **norm)
    options: dict[str, Any] = {
        "size": size,
        "patch_size": patch_size,
        "temporal_patch_size": temporal_patch_size,
        "merge_size": merge_size,
        "mean": MEAN,
        "std": STD,
    } | norm
    sources: dict[Layout, torch.Tensor] = {"TCHW": video, "THWC": video.permute(0, 2, 3, 1).contiguous()}
    for (layout, source), backend in product(sources.items(), ON_CPU):
        ours, our_grid = patchify_frames(source, index, layout=layout, backend=backend, **options)
        assert torch.equal(ours, expected)
        assert torch.equal(our_grid, grid) and our_grid.dtype == torch.int64


@pytest.mark.parametrize(
    ("frames", "height", "width", "low", "high"),
    [
        (2, 96, 130, 28 * 28, 56 * 84),  # smaller
        (3, 30, 41, 112 * 112, 140 * 140),  # larger, an odd number of frames
        (1, 56, 84, 28 * 28, 56 * 84),  # the same size
        (2, 56, 97, 28 * 28, 56 * 97),  # one axis unchanged
        (2, 1, 60, 28 * 28, 56 * 56),  # one pixel high
        (2, 60, 1, 28 * 28, 56 * 56),  # one pixel wide
        (1, 1, 1, 28 * 28, 28 * 28),
        (1, 480, 270, 28 * 28, 28 * 56),  # wide filters
    ],
)
def test_equals_hugging_face(frames, height, width, low, high):
    assert_same_as_hugging_face(random_video(frames, height, width), None, low, high)


@settings(max_examples=20, deadline=None)
@given(
    frames=st.integers(1, 5),
    height=st.integers(8, 80),
    width=st.integers(8, 80),
    pixels=st.integers(28 * 28, 90 * 90),
    layout=st.sampled_from([(14, 2, 2), (16, 2, 2), (8, 2, 2), (4, 3, 1), (7, 1, 4)]),
    seed=st.integers(0, 2**16),
)
def test_equals_hugging_face_on_random_cases(frames, height, width, pixels, layout, seed):
    low = max(pixels // 2, (layout[0] * layout[2]) ** 2)
    index = torch.randint(0, frames, (frames + 1,), generator=torch.Generator().manual_seed(seed))
    norm: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)} if seed % 2 else {}
    assert_same_as_hugging_face(random_video(frames, height, width, seed), index, low, 2 * low, *layout, **norm)


def test_extreme_pixels_are_clamped_like_hugging_face():
    checkerboard = (torch.arange(40)[:, None] // 3 + torch.arange(52) // 3) % 2 * 255
    video = checkerboard.to(torch.uint8).expand(2, 3, -1, -1).contiguous()
    assert_same_as_hugging_face(video, None, 28 * 28, 56 * 84)
    assert_same_as_hugging_face(video, None, 112 * 112, 168 * 168)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_layout_follows_the_documented_index_map(interpolation, backend):
    """Pixels by the formulas of the docstring, from a resize that leaves the size alone."""
    patch, group, merge, height, width = 2, 3, 2, 8, 12
    video = random_video(4, height, width)
    index = torch.tensor([3, 0, 0, 2])
    rows, grid = patchify_frames(
        video,
        index,
        size=(height, width),
        patch_size=patch,
        temporal_patch_size=group,
        merge_size=merge,
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        interpolation=interpolation,
        backend=backend,
    )
    gt, gh, gw = grid[0].tolist()
    assert (gt, gh, gw) == (2, 4, 6)
    frames = [*index.tolist(), 2, 2]
    pixels = video.double().numpy() / 255
    expected = np.empty((gt * gh * gw, 3 * group * patch * patch))
    for t, hb, wb, mh, mw in product(range(gt), range(gh // merge), range(gw // merge), range(merge), range(merge)):
        row = (((t * gh // merge + hb) * gw // merge + wb) * merge + mh) * merge + mw
        for c, dt, py, px in product(range(3), range(group), range(patch), range(patch)):
            column = ((c * group + dt) * patch + py) * patch + px
            value = pixels[frames[group * t + dt], c, (hb * merge + mh) * patch + py, (wb * merge + mw) * patch + px]
            expected[row, column] = (value - (0.1, 0.2, 0.3)[c]) / (0.4, 0.5, 0.6)[c]
    np.testing.assert_allclose(rows.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast_at_the_end(dtype):
    video = random_video(2, 40, 50)
    options: dict[str, Any] = {"size": (28, 56), "mean": MEAN, "std": STD}
    wide, _ = patchify_frames(video, **options)
    half, _ = patchify_frames(video, **options, dtype=dtype)
    assert torch.equal(half, wide.to(dtype))


@pytest.mark.parametrize("backend", ON_CPU)
def test_out_is_written_in_place(backend):
    video = random_video(3, 40, 50)
    options: dict[str, Any] = {"size": (28, 56), "mean": MEAN, "std": STD, "dtype": torch.bfloat16, "backend": backend}
    expected, grid = patchify_frames(video, **options)
    buffer = torch.full((3, *expected.shape), torch.nan, dtype=torch.bfloat16)
    written, our_grid = patchify_frames(video, out=buffer[1], **options)
    assert written.data_ptr() == buffer[1].data_ptr() and torch.equal(our_grid, grid)
    assert torch.equal(buffer[1], expected) and buffer[::2].isnan().all()


def test_strides_do_not_matter():
    video = random_video(3, 30, 40)
    options: dict[str, Any] = {"size": (28, 28), "mean": MEAN, "std": STD}
    strided = video.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert torch.equal(patchify_frames(strided, **options)[0], patchify_frames(video, **options)[0])


def test_videos_are_concatenated():
    videos = [random_video(3, 30, 40), random_video(2, 50, 20, seed=1)]
    options: dict[str, Any] = {"mean": MEAN, "std": STD}
    index = [torch.tensor([2, 0]), None]
    sizes = [(28, 56), (56, 28)]
    parts = [
        patchify_frames(video, i, size=size, **options) for video, i, size in zip(videos, index, sizes, strict=True)
    ]
    for backend in ON_CPU:
        rows, grid = patchify_videos(videos, index, size=sizes, backend=backend, **options)
        assert torch.equal(rows, torch.cat([part[0] for part in parts]))
        assert grid.tolist() == [[1, 2, 4], [1, 4, 2]]
    shared, _ = patchify_videos(videos, size=(28, 28), **options)
    assert shared.shape == ((2 + 1) * 4, 1176)


def call(**changes):
    arguments: dict[str, Any] = {
        "video": torch.zeros(4, 3, 20, 30, dtype=torch.uint8),
        "size": (28, 56),
        "mean": MEAN,
        "std": STD,
    }
    return patchify_frames(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"video": torch.zeros(4, 3, 20, 30)}, TypeError, "video must be torch.uint8, got torch.float32."),
        (
            {"video": torch.zeros(4, 20, 30, 3, dtype=torch.uint8)},
            ValueError,
            "video must have shape [T, 3, H, W], got [4, 20, 30, 3].",
        ),
        (
            {"video": torch.zeros(0, 3, 20, 30, dtype=torch.uint8)},
            ValueError,
            "axis T of video must be at least 1",
        ),
        ({"layout": "CTHW"}, ValueError, "layout must be one of 'TCHW', 'THWC', got 'CTHW'."),
        (
            {"frame_index": torch.zeros(0).long()},
            ValueError,
            "frames in frame_index must be at least 1, got 0.",
        ),
        (
            {"frame_index": torch.tensor([0, 4])},
            ValueError,
            "frame_index must be in 0..3 (frames of the video), got 4.",
        ),
        ({"frame_index": torch.tensor([-1])}, ValueError, "got -1."),
        ({"frame_index": torch.tensor([-1]), "validate": True}, ValueError, "got -1."),
        (
            {"frame_index": torch.tensor([0.0])},
            TypeError,
            "frame_index must be torch.int64, got torch.float32.",
        ),
        (
            {"size": (28, 57)},
            ValueError,
            "width of size must be a multiple of patch_size * merge_size = 28, got 57.",
        ),
        ({"size": (0, 28)}, ValueError, "height of size must be at least 1, got 0."),
        ({"size": (28,)}, ValueError, "size must be (height, width), got (28,)."),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1, got 0."),
        ({"interpolation": "nearest"}, ValueError, "interpolation must be one of 'bicubic', 'bilinear'"),
        ({"mean": (0.5, 0.5)}, ValueError, "mean must have 3 values (one a channel), got 2."),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "std must be positive, got [0.5, 0.0, 0.5]."),
        ({"rescale_factor": 0}, ValueError, "rescale_factor must be positive, got 0."),
        ({"dtype": torch.int32}, TypeError, "dtype must be torch.float32 or torch.bfloat16 or torch.float16"),
        ({"backend": "cuda"}, ValueError, "cannot run on backend 'cuda': it runs on cuda tensors, got cpu."),
        (
            {"frame_index": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "frame_index must be on the device of video (cpu), got meta.",
        ),
        ({"out": torch.zeros(15, 1176)}, ValueError, "out must have shape [16, 1176], got [15, 1176]."),
        ({"out": torch.zeros(16, 1176).bfloat16()}, TypeError, "out must be torch.float32, got torch.bfloat16."),
        ({"out": torch.zeros(1176, 16).t()}, ValueError, "out must be contiguous, got strides [1, 16]."),
    ],
)
def test_misuse_is_a_sentence(changes, error, message):
    with pytest.raises(error) as caught:
        call(**changes)
    assert message in str(caught.value)
    assert str(caught.value).startswith("patchify_frames")


def test_misuse_of_lists_is_a_sentence():
    video = torch.zeros(4, 3, 20, 30, dtype=torch.uint8)
    with pytest.raises(ValueError, match="must name at least one video"):
        patchify_videos([], size=(28, 28), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="frame_index must have one entry for each of 2 videos, got 1"):
        patchify_videos([video, video], [None], size=(28, 28), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="size must have one entry for each of 1 videos, got 2"):
        patchify_videos([video], size=[(28, 28), (28, 28)], mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r"videos\[1\] must be on the device of videos\[0\] \(cpu\), got meta"):
        patchify_videos([video, video.to("meta")], size=(28, 28), mean=MEAN, std=STD)
    with pytest.raises(TypeError, match=r"videos\[1\] must be torch.uint8, got torch.float32"):
        patchify_videos([video, video.float()], size=(28, 28), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r"frame_index must be in 0\.\.3 \(frames of the video\), got 7"):
        patchify_videos([video, video], [None, torch.tensor([7])], size=(28, 28), mean=MEAN, std=STD)
