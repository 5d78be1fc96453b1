"""`BridgeSTGVideoProcessor`: the same calls give the same bits as the Hugging Face processors.

docs/compatibility_processor.md says what is the same and what is refused; each row stands here.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor
from transformers.image_utils import ChannelDimension, SizeDict
from transformers.models.qwen2_vl import video_processing_qwen2_vl
from transformers.video_utils import VideoMetadata

from bridge_stg.models import BridgeSTGProcessor, BridgeSTGVideoProcessor

HUGGING_FACE = {"qwen2_vl": Qwen2VLVideoProcessor, "qwen3_vl": Qwen3VLVideoProcessor}
SMALL = {"shortest_edge": 56 * 56, "longest_edge": 84 * 112}
CAPS = "cap_pixels_per_frame" in inspect.getsource(video_processing_qwen2_vl)
families = pytest.mark.parametrize("family", HUGGING_FACE)


def clip(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def frames(*shape: int) -> np.ndarray:
    return clip(*shape).numpy()


def same(mine: Any, theirs: Any) -> bool:
    """Equal in type, dtype and every bit, through lists, metadata and features."""
    if type(mine) is not type(theirs):
        return False
    if isinstance(mine, torch.Tensor):
        return mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    if isinstance(mine, np.ndarray):
        return mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    if isinstance(mine, (list, tuple)):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    if hasattr(mine, "keys"):
        return set(mine) == set(theirs) and all(same(mine[key], theirs[key]) for key in theirs)
    return bool(mine == theirs)


def both(family: str, videos: Any, settings: dict[str, Any] | None = None, **call: Any) -> tuple[Any, Any]:
    settings = {"do_sample_frames": False, "size": dict(SMALL), **(settings or {})}
    theirs = HUGGING_FACE[family](**copy.deepcopy(settings))(videos=videos, **copy.deepcopy(call))
    ours = BridgeSTGVideoProcessor(family=family, **settings)(videos=videos, **call)
    return ours, theirs


def assert_same(family: str, videos: Any, settings: dict[str, Any] | None = None, **call: Any) -> None:
    ours, theirs = both(family, videos, settings, **call)
    assert same(ours, theirs)


@families
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"resample": 2},
        {"patch_size": 8, "merge_size": 1, "temporal_patch_size": 3},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 1 / 127},
        {"image_mean": 0.5, "image_std": 0.25},
        {"image_mean": [0.5], "image_std": (0.25,)},
        {"image_mean": [1e-60, 0.0, 0.5], "image_std": [-0.5, 0.5, 0.5]},
        {"rescale_factor": -1 / 255},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
        {"resample": 0},
        {"resample": 1},
        {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 10_000}},
        {"size": {"shortest_edge": 9000, "longest_edge": 56 * 56}},
        {"do_convert_rgb": False},
        {"return_tensors": "np"},
        {"return_tensors": "pt"},
        {"return_metadata": True},
        {"data_format": "channels_last"},
        {"device": "cpu"},
        {"do_center_crop": True, "crop_size": {"height": 28, "width": 28}},
    ],
)
def test_settings_of_a_call(family, call):
    ragged = [clip(5, 3, 60, 90), clip(4, 3, 33, 47, seed=1), clip(5, 3, 60, 90, seed=2)]
    assert_same(family, ragged, **call)
    assert_same(family, ragged[0], **call)
    assert_same(family, [ragged[1].permute(0, 2, 3, 1).numpy()], **call)


@families
@pytest.mark.parametrize(
    "settings",
    [
        {"size": SizeDict(shortest_edge=56 * 56, longest_edge=9000)},
        {"patch_size": np.int64(8)},
        {"image_mean": (0.1, 0.2, 0.3), "image_std": 0.5},
        {"do_resize": 1, "do_normalize": 0},
        {"max_frames": 4, "a_field_of_others": {"kept": True}},
    ],
)
def test_settings_of_the_constructor(family, settings):
    assert_same(family, clip(5, 3, 60, 90), settings)
    kept = BridgeSTGVideoProcessor(family=family, **settings)
    assert kept.to_dict() == HUGGING_FACE[family](**settings).to_dict()


RGB = frames(6, 60, 84, 3)
TENSOR = torch.from_numpy(RGB).permute(0, 3, 1, 2)
INPUTS: dict[str, Any] = {
    "array of frames": RGB,
    "channels first": RGB.transpose(0, 3, 1, 2),
    "tensor": TENSOR,
    "tensor, channels last": torch.from_numpy(RGB),
    "batch of 5 axes": np.stack([RGB, RGB[::-1]]),
    "tensor of 5 axes": torch.stack([TENSOR, TENSOR.flip(0)]),
    "list of videos": [RGB, RGB[:4]],
    "tuple of tensors": (TENSOR, TENSOR[:4]),
    "nested lists": [[RGB], [RGB[:4], RGB]],
    "arrays and tensors": [TENSOR, RGB.transpose(0, 3, 1, 2)],
    "list of frames": list(RGB),
    "list of lists of tensors": [list(TENSOR), list(TENSOR[:4])],
    "PIL images": [Image.fromarray(frame) for frame in RGB],
    "PIL images of two videos": [[Image.fromarray(frame) for frame in RGB]] * 2,
    "PIL images with alpha": [Image.fromarray(frame).convert("RGBA") for frame in RGB],
    "one frame a video": RGB[0],
    "strided": TENSOR[:, :, ::2, ::3],
    "expanded": TENSOR[:1].expand(4, -1, -1, -1),
    "read-only": np.frombuffer(RGB.tobytes(), np.uint8).reshape(RGB.shape),
    "Fortran order": np.asfortranarray(RGB),
    "float32, as qwen_vl_utils gives": TENSOR.float(),
    "float32 in [0, 1]": TENSOR.float() / 255,
    "float64": RGB.astype(np.float64),
    "float16": TENSOR.half(),
    "bfloat16": TENSOR.bfloat16(),
    "int16": RGB.astype(np.int16),
    "int64": TENSOR.long(),
    "uint8 and float32": [TENSOR, TENSOR.float()[:4]],
    "bool": RGB > 99,
    "gray": RGB[..., :1],
    "gray float32": TENSOR[:, :1].float(),
    "alpha": np.concatenate([RGB, RGB[..., :1]], -1).transpose(0, 3, 1, 2),
    "three pixels high": RGB[:, :3],
    "an odd number of frames": RGB[:3],
}


def or_message(process: Any) -> Any:
    """What a call gives, or the words of its refusal."""
    try:
        return process()
    except ValueError as refused:
        return str(refused)


@families
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kind", INPUTS)
def test_every_kind_of_video(family, sampled, kind):
    """Where the stock class gives a value, ours gives it to the bit; where it refuses, so does ours."""
    call = {"do_sample_frames": True, "num_frames": 2, "fps": None} if sampled else {}
    settings = {"do_sample_frames": False, "size": dict(SMALL)}
    video = INPUTS[kind]
    with pytest.MonkeyPatch.context() as patch:
        if sampled and family == "qwen3_vl":  # which has a rate by default
            patch.setattr(Qwen3VLVideoProcessor, "fps", None)
        theirs = or_message(lambda: HUGGING_FACE[family](**settings)(video, **call))
        ours = or_message(lambda: BridgeSTGVideoProcessor(family=family, **settings)(video, **call))
    assert isinstance(theirs, str) == isinstance(ours, str)
    assert isinstance(theirs, str) or same(ours, theirs)


@families
@pytest.mark.parametrize("axis", range(4))
def test_negative_strides_are_read_as_their_copy(family, axis):
    flipped = np.flip(RGB, axis)
    process = BridgeSTGVideoProcessor(family=family, do_sample_frames=False, size=dict(SMALL))
    assert same(process(flipped), process(flipped.copy()))
    metadata = [{"fps": 6.0, "total_num_frames": 6, "duration": 1.0}]
    assert_same(family, flipped, do_sample_frames=True, fps=4, video_metadata=metadata)


@families
def test_images_named_by_their_paths(family, tmp_path):
    for i, frame in enumerate(RGB):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(len(RGB))]
    assert_same(family, [[paths, paths[:4]]])


@families
@pytest.mark.parametrize("videos", ["a.mp4", ["a.mp4", "b.mp4"]])
@pytest.mark.parametrize("call", [{}, {"do_sample_frames": True, "fps": 4}])
def test_paths_and_addresses_go_through_fetch_videos(monkeypatch, family, videos, call):
    def fetch(_, address, sample_indices_fn=None):
        if isinstance(address, list):
            return list(zip(*[fetch(_, one, sample_indices_fn) for one in address], strict=True))
        facts = VideoMetadata(total_num_frames=6, fps=6.0, duration=1.0)
        facts.frames_indices = list(range(6)) if sample_indices_fn is None else sample_indices_fn(metadata=facts)
        return RGB[np.asarray(facts.frames_indices)], facts

    for kind in (HUGGING_FACE[family], type(BridgeSTGVideoProcessor(family=family))):
        monkeypatch.setattr(kind, "fetch_videos", fetch)
    assert_same(family, videos, return_metadata=True, **call)


@families
def test_the_layout_may_be_named(family):
    for layout in ("channels_last", ChannelDimension.LAST):
        assert_same(family, frames(4, 64, 96, 3), input_data_format=layout)
        if family == "qwen2_vl":  # older Qwen3 processors refuse sides below a patch
            assert_same(family, frames(4, 3, 60, 3), input_data_format=layout)


@families
def test_defaults(family):
    theirs, ours = HUGGING_FACE[family](), BridgeSTGVideoProcessor(family=family)
    assert ours.to_dict() == theirs.to_dict() and ours.to_json_string() == theirs.to_json_string()
    assert ours.model_input_names == theirs.model_input_names
    if family == "qwen2_vl":
        assert_same(family, clip(4, 3, 40, 50), {"size": None}, do_resize=True)


@families
def test_attributes_of_the_class(family):
    theirs, ours = HUGGING_FACE[family], type(BridgeSTGVideoProcessor(family=family))
    for name in dir(theirs):
        assert hasattr(ours, name)
        value = inspect.getattr_static(theirs, name)
        if not name.startswith("_") and not callable(getattr(theirs, name)) and not isinstance(value, property):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert BridgeSTGVideoProcessor.patch_size == 14 and BridgeSTGVideoProcessor.size == Qwen2VLVideoProcessor.size


@families
def test_it_is_what_it_replaces(family):
    ours = BridgeSTGVideoProcessor(family=family)
    assert isinstance(ours, HUGGING_FACE[family]) and isinstance(ours, BridgeSTGVideoProcessor)
    assert issubclass(type(ours), BridgeSTGVideoProcessor)


def test_a_subclass_has_its_own_defaults_and_name():
    class Mine(BridgeSTGVideoProcessor):
        size = SMALL
        patch_size = 8

    mine = Mine(do_sample_frames=False)
    stock = Qwen2VLVideoProcessor(size=dict(SMALL), patch_size=8)
    assert same(mine(RGB), stock(RGB)) and mine.to_dict()["video_processor_type"] == "Mine"


@families
def test_without_a_resize(family):
    size = (64, 96) if family == "qwen3_vl" else (56, 84)
    assert_same(family, clip(4, 3, *size), do_resize=False)
    for video in (clip(4, 3, 50, 84), clip(4, 3, 50, 84).float()):
        with pytest.raises(ValueError, match="height of a video must be a multiple of patch_size"):
            BridgeSTGVideoProcessor(family=family, do_sample_frames=False)(videos=video, do_resize=False)


@families
@pytest.mark.parametrize("sampling", [{"num_frames": 6}, {"fps": 2.0}, {"fps": 7.5}, {"fps": 0}, {"fps": 100}])
def test_sampling_rules(monkeypatch, family, sampling):
    if "num_frames" in sampling and family == "qwen3_vl":
        monkeypatch.setattr(Qwen3VLVideoProcessor, "fps", None)
    metadata = {"fps": 10.0, "total_num_frames": 31, "duration": 3.1}
    for given in ([metadata], metadata, VideoMetadata(**metadata), [[metadata]]):
        options = {"do_sample_frames": True, "video_metadata": given, "return_metadata": True}
        assert_same(family, [clip(31, 3, 40, 50)], **options, **sampling)
        assert_same(family, [frames(31, 40, 50, 3)], **options, **sampling)


@pytest.mark.skipif(not CAPS, reason="this transformers has no cap_pixels_per_frame")
@families
@pytest.mark.parametrize("cap", [None, False, True])
def test_cap_pixels_per_frame(family, cap):
    settings = {
        "cap_pixels_per_frame": cap,
        "max_video_tokens": 20,
        "size": {"shortest_edge": 32 * 32, "longest_edge": 9**7},
    }
    assert_same(family, clip(12, 3, 130, 170), settings)
    assert_same(family, clip(2, 3, 300, 200), settings)


@pytest.mark.filterwarnings("ignore:Passing `min_pixels`:FutureWarning")
def test_pixel_bounds_of_qwen2():
    for bounds in ({"min_pixels": 3136, "max_pixels": 9000}, {"max_pixels": 9000}):
        assert_same("qwen2_vl", clip(4, 3, 60, 90), {"size": None, **bounds})
        assert_same("qwen2_vl", clip(4, 3, 60, 90), **bounds)


def test_one_frame_videos():
    assert_same("qwen2_vl", clip(1, 3, 40, 50))
    theirs = or_message(lambda: Qwen3VLVideoProcessor(do_sample_frames=False)(videos=clip(1, 3, 40, 50)))
    if isinstance(theirs, str):  # the newer ones refuse it
        with pytest.raises(ValueError, match=re.escape(theirs)):
            BridgeSTGVideoProcessor(family="qwen3_vl", do_sample_frames=False)(videos=clip(1, 3, 40, 50))
    else:
        assert_same("qwen3_vl", clip(1, 3, 40, 50))


def test_patches_are_counted():
    process = BridgeSTGVideoProcessor()
    expected = Qwen2VLVideoProcessor().get_num_of_video_patches(3, 61, 45, {"merge_size": 1})
    assert process.get_num_of_video_patches(3, 61, 45, {"merge_size": 1}) == expected
    assert process.get_num_of_video_patches(3, 61, 45) == process.get_num_of_video_patches(3, 61, 45, {})


NAN, INFINITY = math.nan, math.inf
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "videos must hold at least one video, got []"),
    ([[]], {}, "the videos must fit the settings"),
    ({"a": RGB}, {}, "videos must be arrays, images, paths or addresses, got dict"),
    ([RGB, None], {}, "videos must be arrays, images, paths or addresses, got NoneType"),
    (RGB[:0], {}, "videos must have at least one frame and one pixel, got shape [0, 3, 60, 84]"),
    (RGB[:, :0], {}, "videos must have at least one frame and one pixel"),
    (np.full((2, 8, 8, 3), "a"), {}, "videos must be arrays of numbers, got dtype <U1"),
    (RGB[..., :2], {}, "Unable to infer channel dimension format"),
    (RGB[:, :1].repeat(9, 2), {}, "absolute aspect ratio must be smaller than 200"),
    (RGB, {"patch_size": 0}, "patch_size must be an integer >= 1"),
    (RGB, {"merge_size": True}, "merge_size must be an integer >= 1"),
    (RGB, {"temporal_patch_size": "2"}, "temporal_patch_size must be an integer >= 1"),
    (RGB, {"patch_size": 10**5000}, "patch_size must be an integer >= 1"),
    (RGB, {"image_mean": [0.5, NAN, 0.5]}, "image_mean must be a number or one a channel, got [0.5, nan, 0.5]"),
    (RGB, {"image_mean": [1e39] * 3}, "image_mean must leave normalised pixels finite"),
    (RGB, {"image_mean": []}, "image_mean must be a number or one a channel, got []"),
    (RGB, {"image_std": [0.5, INFINITY, 0.5]}, "image_std must be a number or one a channel"),
    (RGB, {"image_std": [0.5, 0.0, 0.5]}, "image_std must leave normalised pixels finite"),
    (RGB, {"image_std": [1e-60] * 3}, "image_std must leave normalised pixels finite"),
    (RGB, {"image_std": [1e-40] * 3}, "image_std must leave normalised pixels finite"),
    (RGB, {"rescale_factor": NAN}, "rescale_factor must be a number or null, got nan"),
    (RGB, {"rescale_factor": INFINITY}, "rescale_factor must be a number or null, got inf"),
    (RGB, {"rescale_factor": 1e-300}, "with rescale_factor 1e-300"),
    (RGB, {"rescale_factor": 0.0}, "rescale_factor must be finite and not 0, got 0.0"),
    (RGB, {"size": {"shortest_edge": NAN, "longest_edge": 9000}}, "size.shortest_edge must be a number"),
    (RGB, {"size": {"height": 56, "width": 56}}, "must contain 'shortest_edge' and 'longest_edge'"),
    (RGB, {"resample": 9}, "resample must be a filter of PIL, 0..5, got 9"),
    (RGB, {"do_resize": "false"}, "do_resize must be true or false or null, got 'false'"),
    (RGB, {"device": "nowhere"}, "the videos must fit the settings"),
    (RGB, {"patch_sise": 14}, "'patch_sise' is not a setting; it must be patch_size"),
    (RGB, {"do_sample_frames": True, "fps": NAN}, "fps must be a number or null, got nan"),
    (RGB, {"do_sample_frames": True, "num_frames": 0}, "num_frames must be an integer >= 1"),
    (RGB, {"do_sample_frames": True}, "do_sample_frames must have num_frames or fps"),
    (RGB, {"do_sample_frames": True, "num_frames": 1}, "do_sample_frames must have num_frames or fps that leave a"),
    (
        RGB,
        {"do_sample_frames": True, "num_frames": 8, "video_metadata": [{"total_num_frames": 9}]},
        "video_metadata must be of the 6 frames given, got total_num_frames=9",
    ),
    (
        RGB,
        {"do_sample_frames": True, "fps": 2, "video_metadata": [{"total_num_frames": 6, "fps": 0}]},
        "fps of video_metadata must be a number > 0, got 0",
    ),
    (
        RGB,
        {"do_sample_frames": True, "num_frames": 2, "video_metadata": [{"total_num_frames": None}]},
        "total_num_frames of video_metadata must be a number > 0, got None",
    ),
]


@pytest.mark.parametrize(("video", "call", "message"), REFUSED)
def test_what_is_refused_is_one_sentence(video, call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        BridgeSTGVideoProcessor()(video, **call)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@families
@pytest.mark.parametrize("call", [call for video, call, message in REFUSED if video is RGB and "must be" in message])
def test_settings_are_refused_where_they_are_set(family, call):
    if not {"do_sample_frames", "device"} & set(call):
        with pytest.raises(ValueError, match="must"):
            BridgeSTGVideoProcessor(family=family, **call)


def test_an_unknown_family_is_a_sentence():
    with pytest.raises(ValueError, match="family must be one of 'qwen2_vl', 'qwen3_vl', got 'llava'"):
        BridgeSTGVideoProcessor(family="llava")


def test_the_grounding_processor_gives_the_same_pixels(processor):
    videos = [clip(5, 64, 64, 3), clip(4, 64, 96, 3, seed=1)]
    pixels, grids = processor.pixel_values(videos)
    process = BridgeSTGVideoProcessor(
        patch_size=processor.patch_size,
        size={"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels},
        image_mean=processor.image_mean,
        image_std=processor.image_std,
    )
    expected = process(videos, input_data_format="channels_last")
    assert torch.equal(pixels, expected["pixel_values_videos"])
    assert torch.equal(grids, expected["video_grid_thw"])
    assert isinstance(processor, BridgeSTGProcessor) and np.prod(grids.numpy(), axis=1).sum() == len(pixels)
    assert [list(processor.frame_grid(*video.shape[1:3])) for video in videos] == grids[:, 1:].tolist()
