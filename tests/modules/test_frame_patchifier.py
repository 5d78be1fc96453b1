"""`FramePatchifier`: the op with a vision tower's settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bridge_stg.modules import FramePatchifier
from bridge_stg.modules.frame_patchifier import CLIP_MEAN, CLIP_STD
from bridge_stg.ops import patchify_frames


def test_equals_the_op():
    video = torch.randint(0, 256, (4, 30, 40, 3), dtype=torch.uint8)
    index = torch.tensor([3, 1, 1])
    settings: dict[str, Any] = {"patch_size": 8, "temporal_patch_size": 1, "layout": "THWC"}
    module = FramePatchifier((32, 48), **settings)
    rows, grid = module(video, index)
    expected, expected_grid = patchify_frames(video, index, size=(32, 48), mean=CLIP_MEAN, std=CLIP_STD, **settings)
    assert torch.equal(rows, expected) and torch.equal(grid, expected_grid)
    assert not list(module.parameters()) and not module.state_dict()


def test_lists_and_a_size_of_the_call():
    videos = [torch.zeros(2, 3, 30, 40, dtype=torch.uint8), torch.zeros(3, 3, 20, 20, dtype=torch.uint8)]
    module = FramePatchifier()
    _, grid = module(videos, size=(28, 56))
    assert grid.tolist() == [[1, 2, 4], [2, 2, 4]]
    _, grid = module(videos, [None, torch.tensor([0])], size=(28, 28))
    assert grid.tolist() == [[1, 2, 2], [1, 2, 2]]


def test_no_size_is_an_error():
    with pytest.raises(ValueError, match="size must be given to FramePatchifier or to its call"):
        FramePatchifier()(torch.zeros(2, 3, 30, 40, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 0}, "patch_size must be .*got 0"),
        ({"patch_size": True}, "patch_size must be an int, got bool"),
        ({"merge_size": 2.0}, "merge_size must be an int, got float"),
        ({"temporal_patch_size": -1}, "temporal_patch_size must be .*got -1"),
        ({"size": (27, 28)}, "height of size must be a multiple of patch_size \\* merge_size = 28, got 27"),
        ({"size": (28, 0)}, "width of size must be .*got 0"),
        ({"mean": (0.5, 0.5)}, "mean must have 3 values"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive"),
        ({"std": (0.5, None, 0.5)}, "std must be a number, got NoneType"),
        ({"rescale_factor": 0.0}, "rescale_factor must be positive, got 0.0"),
        ({"rescale_factor": "a"}, "rescale_factor must be a number, got str"),
        ({"interpolation": "nearest"}, "interpolation must be one of 'bicubic', 'bilinear', got 'nearest'"),
        ({"layout": "CTHW"}, "layout must be one of 'TCHW', 'THWC', got 'CTHW'"),
        ({"dtype": torch.float64}, "dtype must be .*got torch.float64"),
    ],
)
def test_the_constructor_refuses_what_the_op_would(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        FramePatchifier(**settings)
