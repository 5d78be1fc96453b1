"""`BridgeSTGVideoProcessor`: the same calls give the same bits as the Hugging Face processors."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor
from transformers.models.qwen2_vl import video_processing_qwen2_vl

from bridge_stg.models import BridgeSTGProcessor, BridgeSTGVideoProcessor

HUGGING_FACE = {"qwen2_vl": Qwen2VLVideoProcessor, "qwen3_vl": Qwen3VLVideoProcessor}
SMALL = {"shortest_edge": 56 * 56, "longest_edge": 84 * 112}
CAPS = "cap_pixels_per_frame" in inspect.getsource(video_processing_qwen2_vl)


def clip(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def assert_same(family: str, videos: Any, settings: dict[str, Any] | None = None, **call: Any) -> None:
    settings = {"do_sample_frames": False, "size": dict(SMALL), **(settings or {})}
    theirs = HUGGING_FACE[family](**settings)(videos=videos, return_tensors="pt", **call)
    ours = BridgeSTGVideoProcessor(family=family, **settings)(videos=videos, return_tensors="pt", **call)
    assert set(ours) == set(theirs)
    assert torch.equal(ours["video_grid_thw"], theirs["video_grid_thw"])
    assert ours["video_grid_thw"].dtype == theirs["video_grid_thw"].dtype
    assert torch.equal(ours["pixel_values_videos"], theirs["pixel_values_videos"])
    for mine, other in zip(ours.get("video_metadata", []), theirs.get("video_metadata", []), strict=True):
        assert list(mine.frames_indices) == list(other.frames_indices) and mine.fps == other.fps


@pytest.mark.parametrize("family", HUGGING_FACE)
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"resample": 2},
        {"patch_size": 8, "merge_size": 1, "temporal_patch_size": 3},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 1 / 127},
        {"do_rescale": False},
        {"do_normalize": False},
        {"resample": 1},
        {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 10_000}},
    ],
)
def test_equals_hugging_face(family, call):
    ragged = [clip(5, 3, 60, 90), clip(4, 3, 33, 47, seed=1), clip(5, 3, 60, 90, seed=2)]
    assert_same(family, ragged, **call)
    assert_same(family, ragged[0], **call)
    assert_same(family, [ragged[1].permute(0, 2, 3, 1).numpy()], **call)


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_default_settings_equal_hugging_face(family):
    theirs = HUGGING_FACE[family]().to_dict()
    ours = BridgeSTGVideoProcessor(family=family).to_dict()
    assert ours.pop("video_processor_type") != theirs.pop("video_processor_type")
    assert ours == theirs
    assert_same(family, clip(4, 3, 40, 50), {"size": None} if family == "qwen2_vl" else None, do_resize=True)


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_without_a_resize(family):
    size = (64, 96) if family == "qwen3_vl" else (56, 84)
    assert_same(family, clip(4, 3, *size), do_resize=False)
    with pytest.raises(ValueError, match="height of size must be a multiple of patch_size"):
        BridgeSTGVideoProcessor(family=family, do_sample_frames=False)(videos=clip(4, 3, 50, 84), do_resize=False)


@pytest.mark.parametrize("family", HUGGING_FACE)
@pytest.mark.parametrize("sampling", [{"num_frames": 6}, {"fps": 2.0}, {"fps": 7.5}])
def test_sampling_rules(family, sampling):
    if "num_frames" in sampling and family == "qwen3_vl":
        sampling = {**sampling, "fps": None}  # which that family has by default
        HUGGING_FACE[family].fps, before = None, HUGGING_FACE[family].fps
    else:
        before = None
    try:
        metadata = [{"fps": 10.0, "total_num_frames": 31, "duration": 3.1}]
        options: dict[str, Any] = {"do_sample_frames": True, "video_metadata": metadata, "return_metadata": True}
        assert_same(family, [clip(31, 3, 40, 50)], **options, **sampling)
        assert_same(family, [clip(31, 40, 50, 3).numpy()], **options, **sampling)
    finally:
        if before is not None:
            HUGGING_FACE[family].fps = before


@pytest.mark.skipif(not CAPS, reason="this transformers has no cap_pixels_per_frame")
@pytest.mark.parametrize("family", HUGGING_FACE)
@pytest.mark.parametrize("cap", [None, False, True])
def test_cap_pixels_per_frame(family, cap):
    settings = {
        "cap_pixels_per_frame": cap,
        "max_video_tokens": 20,
        "size": {"shortest_edge": 32 * 32, "longest_edge": 9**7},
    }
    assert_same(family, clip(12, 3, 130, 170), settings)
    assert_same(family, clip(2, 3, 300, 200), settings)


def test_one_frame_videos():
    assert_same("qwen2_vl", clip(1, 3, 40, 50))
    try:
        Qwen3VLVideoProcessor(do_sample_frames=False)(videos=clip(1, 3, 40, 50))
    except ValueError as refused:  # the newer ones do
        with pytest.raises(ValueError, match=re.escape(str(refused))):
            BridgeSTGVideoProcessor(family="qwen3_vl", do_sample_frames=False)(videos=clip(1, 3, 40, 50))
    else:
        assert_same("qwen3_vl", clip(1, 3, 40, 50))


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_loads_and_saves_like_hugging_face(family, tmp_path):
    theirs = HUGGING_FACE[family](size=dict(SMALL), do_sample_frames=False, temporal_patch_size=1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = BridgeSTGVideoProcessor.from_pretrained(tmp_path / "theirs")
    assert isinstance(ours, HUGGING_FACE[family])
    ours.save_pretrained(tmp_path / "ours")
    again = BridgeSTGVideoProcessor.from_pretrained(tmp_path / "ours", merge_size=1)
    video = clip(3, 3, 61, 45)
    expected = theirs(videos=video, merge_size=1, return_tensors="pt")
    assert torch.equal(again(videos=video, return_tensors="pt")["pixel_values_videos"], expected["pixel_values_videos"])
    if hasattr(theirs, "get_num_of_video_patches"):
        patches = theirs.get_num_of_video_patches(3, 61, 45, {"merge_size": 1})
        assert again.get_num_of_video_patches(3, 61, 45, {}) == patches


@pytest.mark.parametrize(
    ("video", "options", "error", "message"),
    [
        (torch.zeros(4, 3, 40, 50), {}, TypeError, "videos must be torch.uint8, got torch.float32."),
        (
            clip(4, 1, 40, 50),
            {},
            ValueError,
            "videos must have 3 channels, got 1.",
        ),
        (clip(0, 3, 40, 50), {}, ValueError, "videos must have at least one frame"),
    ],
)
def test_misuse_is_a_sentence(video, options, error, message):
    with pytest.raises(error) as caught:
        BridgeSTGVideoProcessor(do_convert_rgb=False)(videos=[video], **options)
    assert message in str(caught.value)


def test_an_unknown_family_is_a_sentence():
    with pytest.raises(ValueError, match="family must be one of 'qwen2_vl', 'qwen3_vl', got 'llava'"):
        BridgeSTGVideoProcessor(family="llava")


def test_the_grounding_processor_uses_it(processor):
    videos = [clip(5, 64, 64, 3), clip(4, 64, 96, 3, seed=1)]
    pixels, grids = processor.pixel_values(videos)
    alone = [processor.pixel_values([video]) for video in videos]
    assert torch.equal(pixels, torch.cat([part[0] for part in alone]))
    assert torch.equal(grids, torch.cat([part[1] for part in alone]))
    assert isinstance(processor, BridgeSTGProcessor) and np.prod(grids.numpy(), axis=1).sum() == len(pixels)
