"""The CUDA kernel of `patchify_frames`: against the reference, which does what the Hugging Face processors do there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen2VLVideoProcessor

from bridge_stg.ops import patchify_frames, patchify_videos
from bridge_stg.ops.core.native import library_obstacle
from bridge_stg.ops.patchify_frames.registration import _cuda_limits
from bridge_stg.ops.patchify_frames.settings import PatchSettings

from .cases import MEAN, STD, draw_video, strided

OBSTACLE = library_obstacle("cuda") or (None if torch.cuda.is_available() else "there is no CUDA device")
gpu = [pytest.mark.gpu, pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))]
BYTES: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "rescale_factor": 1.0}  # values are pixels
SHAPES = [
    ((40, 50), (28, 56)),
    ((720, 1280), (280, 504)),
    ((60, 80), (168, 196)),
    ((28, 97), (28, 56)),
    ((28, 56), (28, 56)),
    ((1, 1), (28, 28)),
    ((9, 2000), (28, 56)),
    ((1500, 20), (28, 56)),
]


def assert_equal_pixels(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for sums that fall on either side of a half: at most one step, in less than one value of 10,000."""
    steps = (ours.float() - expected.float()).abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() < 1e-4, (steps.max(), (steps > 0).float().mean())


@pytest.mark.parametrize(("source", "target"), SHAPES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("layout", ["TCHW", "THWC"])
class TestOnCuda:
    pytestmark = gpu

    @pytest.mark.parametrize("patches", [(14, 2, 2), (28, 3, 1), (7, 1, 2)])
    def test_equals_the_reference(self, source, target, interpolation, layout, patches):
        video = strided(draw_video(3, source[0], source[1], 1), 1, layout).cuda()
        options: dict[str, Any] = {"size": target, "interpolation": interpolation, "layout": layout, **BYTES}
        options |= dict(zip(("patch_size", "temporal_patch_size", "merge_size"), patches, strict=True))
        index = torch.tensor([2, 0, 0, 0, 1], device="cuda")
        expected, grid = patchify_frames(video, index, backend="reference", **options)
        ours, our_grid = patchify_frames(video, index, backend="cuda", **options)
        assert torch.equal(our_grid, grid)
        assert_equal_pixels(ours, expected)


class TestCalls:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_values_and_dtypes(self, dtype):
        """Without a resize nothing can differ."""
        video = draw_video(3, 64, 96, 1).cuda()
        options: dict[str, Any] = {"size": (64, 96), "patch_size": 16, "mean": MEAN, "std": STD, "dtype": dtype}
        expected = patchify_frames(video, backend="reference", **options)[0]
        assert torch.equal(patchify_frames(video, backend="cuda", **options)[0], expected)
        buffer = torch.full_like(expected, torch.nan)
        assert torch.equal(patchify_frames(video, out=buffer, backend="cuda", **options)[0], expected)

    def test_equals_hugging_face_on_the_device(self):
        video = draw_video(4, 360, 640, 1).cuda()
        output = Qwen2VLVideoProcessor(do_sample_frames=False)(videos=[video], return_tensors="pt")
        _, gh, gw = output["video_grid_thw"][0].tolist()
        ours, _ = patchify_frames(video, size=(14 * gh, 14 * gw), mean=MEAN, std=STD, backend="cuda")
        different = (ours != output["pixel_values_videos"].cuda()).float().mean()
        assert different < 1e-4

    def test_many_videos_in_one_call(self):
        videos = [draw_video(1 + i % 4, 20 + i, 50 - i, i).cuda() for i in range(40)]
        index = [torch.tensor([0, 0, len(video) - 1], device="cuda") if len(video) > 1 else None for video in videos]
        sizes = [(28, 28) if i % 3 else (56, 84) for i in range(40)]
        expected, grid = patchify_videos(videos, index, size=sizes, backend="reference", **BYTES)
        ours, our_grid = patchify_videos(videos, index, size=sizes, backend="cuda", **BYTES)
        assert torch.equal(our_grid, grid)
        assert_equal_pixels(ours, expected)

    def test_frames_outside_are_clamped_and_can_be_validated(self):
        video, index = draw_video(3, 28, 28, 1).cuda(), torch.tensor([-5, 1, 99], device="cuda")
        options: dict[str, Any] = {"size": (28, 28), "mean": MEAN, "std": STD, "backend": "cuda"}
        clamped = patchify_frames(video, index.clamp(0, 2), **options)[0]
        assert torch.equal(patchify_frames(video, index, **options)[0], clamped)
        with pytest.raises(ValueError, match=r"frame_index must be in 0\.\.2"):
            patchify_frames(video, index, validate=True, **options)

    def test_strides_and_offsets_beyond_32_bits(self):
        memory = torch.zeros(2**31 + 4096, dtype=torch.uint8, device="cuda")
        video = memory.as_strided((2, 3, 20, 30), (2**31, 600, 30, 1))
        video.copy_(draw_video(2, 20, 30, 1))
        index = torch.tensor([1, 0, 1], device="cuda")
        expected = patchify_frames(video.contiguous(), index, size=(28, 28), backend="cuda", **BYTES)[0]
        assert torch.equal(patchify_frames(video, index, size=(28, 28), backend="cuda", **BYTES)[0], expected)

    def test_outputs_beyond_2_to_the_31_elements(self):
        if torch.cuda.mem_get_info()[0] < 12 * 2**30:
            pytest.skip("needs 12 GiB of free GPU memory")
        frame = draw_video(2, 28, 28, 1).cuda()
        index = torch.arange(2, device="cuda").repeat(460_000)
        ours, _ = patchify_frames(frame, index, size=(28, 28), dtype=torch.float16, backend="cuda", **BYTES)
        assert ours.numel() > 2**31
        expected = patchify_frames(frame, size=(28, 28), dtype=torch.float16, backend="cuda", **BYTES)[0]
        assert torch.equal(ours[-4:], expected) and torch.equal(ours[: 4 * 1000].view(1000, 4, -1)[777], expected)

    def test_graph_capture(self):
        video, index = draw_video(4, 60, 80, 1).cuda(), torch.tensor([3, 1], device="cuda")
        options: dict[str, Any] = {"size": (56, 84), "mean": MEAN, "std": STD, "backend": "cuda"}
        buffer = torch.empty(24, 1176, device="cuda")
        patchify_frames(video, index, out=buffer, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            patchify_frames(video, index, out=buffer, **options)
        video.copy_(draw_video(4, 60, 80, 2))
        index.copy_(torch.tensor([0, 2]))
        graph.replay()
        assert torch.equal(buffer, patchify_frames(video, index, **options)[0])


def test_filters_too_wide_for_a_tile_are_refused():
    settings = PatchSettings(14, 2, 2, MEAN, STD, 1 / 255, "bicubic", "TCHW")
    fits = [((1080, 1920), (560, 1008)), ((1080, 1920), (28, 56))]
    assert _cuda_limits(sizes=fits, settings=settings) is None
    refusal = _cuda_limits(sizes=[((56, 56), (56, 56)), ((720, 7000), (28, 28))], settings=settings)
    assert refusal is not None and "a resize from 720 x 7000 to 28 x 28 in patches of 14 needs" in refusal
