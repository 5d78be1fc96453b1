"""`BridgeSTGVideoProcessor`: the video processors of Qwen2-VL, Qwen2.5-VL and Qwen3-VL on `ops.patchify_videos`.

Settings, frame sampling, size budgets and their warnings are inherited from `transformers`, whichever version is
installed; gathering, resizing, normalising and patching happen in one pass, without copies of the video. What the pass
cannot take, such as float frames, runs the inherited code.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.utils import is_torchvision_available

if not is_torchvision_available():
    raise ImportError(
        "BridgeSTGVideoProcessor needs torchvision, as the processors of transformers that it replaces do."
    )

from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor
from transformers.image_utils import ChannelDimension
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import (
    infer_channel_dimension_format,
    is_valid_video,
    make_batched_metadata,
    make_batched_videos,
)

from ..errors import ModelError
from ..files import write_text
from ..ops import patchify_videos
from ..ops.patchify_frames.api import Interpolation
from ..settings import show
from .processor_settings import check_statistics, check_video_settings, per_channel

_NAME = "BridgeSTGVideoProcessor"
# Filters by PIL's number and by torchvision's name.
_INTERPOLATIONS: dict[Any, Interpolation] = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}


class _Sampled(NamedTuple):
    """A video and the frames that are wanted of it; None means all."""

    frames: Any
    wanted: Tensor | None

    def gathered(self) -> Tensor:
        """The wanted frames, laid out as in the inherited code."""
        frames = self.frames if self.wanted is None else self.frames[self.wanted]
        return cast(Tensor, frames.contiguous())

    def __len__(self) -> int:
        return len(self.frames if self.wanted is None else self.wanted)


class _ShapesOnly(BaseVideoProcessor):
    """Resizes meta tensors, which have a shape and no pixels: this applies the size rules without the work."""

    def resize(self, image: Tensor, size: Any, *args: Any, **kwargs: Any) -> Tensor:
        if image.device.type == "meta":
            return image.new_empty((*image.shape[:-2], size.height, size.width))
        return cast(Tensor, super().resize(image, size, *args, **kwargs))


class _OnePass(BaseVideoProcessor):
    """What both families share: checked settings, sampling without copies, and the single pass over the pixels."""

    _saved_as: str

    def __init__(self, *, family: str | None = None, **kwargs: Any) -> None:
        kwargs.pop("video_processor_type", None)
        check_video_settings(_NAME, kwargs, type(self))
        super().__init__(**kwargs)
        if self.do_normalize:
            check_statistics(_NAME, self.image_mean, self.image_std, self.rescale_factor if self.do_rescale else 1.0)

    def to_dict(self) -> dict[str, Any]:
        """The settings as in `transformers`, under the stock class's name, so that they load without this package."""
        settings = super().to_dict()
        if type(self) in _FAMILIES.values():  # a user's subclass keeps its own name
            settings["video_processor_type"] = self._saved_as
        return settings

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the settings; the file appears whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        write_text(json_file_path, self.to_json_string())

    @classmethod
    def get_video_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read the settings as in `transformers`.

        Raises:
            ModelError: a file does not hold a JSON object, or cannot be parsed.
        """
        try:
            settings, rest = super().get_video_processor_dict(pretrained_model_name_or_path, **kwargs)
        except (ValueError, TypeError, RecursionError) as error:  # digits by the thousand, brackets, bytes, a list
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"The video processor of {pretrained_model_name_or_path} cannot be read: {reason}."
            ) from error
        if not isinstance(settings, dict):
            raise ModelError(
                f"The video processor of {pretrained_model_name_or_path} cannot be read: its file must hold a JSON "
                f"object, got {show(settings)}."
            )
        return settings, rest

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """Process videos as in `transformers`.

        Raises:
            TypeError, ValueError: there is no video, a setting is of the wrong type or out of range, or the frames fit
                no setting.
        """
        _check_videos(videos)
        check_video_settings(_NAME, kwargs, type(self))
        try:
            return super().preprocess(videos, **kwargs)
        except (StrictDataclassError, LookupError, RuntimeError) as error:  # several lines, or torch's own words
            raise ValueError(f"{_NAME}: the videos must fit the settings: {' '.join(str(error).split())}") from error

    def _decode_and_sample_videos(
        self,
        videos: Any,
        video_metadata: Any = None,
        do_sample_frames: bool | None = None,
        sample_indices_fn: Callable[..., Any] | None = None,
    ) -> Any:
        arrays = make_batched_videos(videos)
        if not arrays:
            raise ValueError(f"{_NAME}: videos must hold at least one video, got lists without one.")
        if not (do_sample_frames and sample_indices_fn is not None and is_valid_video(arrays[0])):
            return super()._decode_and_sample_videos(videos, video_metadata, do_sample_frames, sample_indices_fn)
        metadata = make_batched_metadata(arrays, video_metadata=video_metadata)
        sampled = []
        for frames, facts in zip(arrays, metadata, strict=True):
            facts.frames_indices = _sample(sample_indices_fn, facts, len(frames))
            sampled.append(_Sampled(frames, torch.as_tensor(np.asarray(facts.frames_indices), dtype=torch.int64)))
        return sampled, metadata

    def _prepare_input_videos(
        self,
        videos: Sequence[Any],
        do_convert_rgb: bool | None = None,
        input_data_format: Any = None,
        device: Any = None,
        **kwargs: Any,
    ) -> list[_Sampled]:
        """Views `[T, C, H, W]` of the videos; wanted frames are gathered only where they must be copied anyway."""
        prepared = []
        for video in videos:
            frames, index = video if isinstance(video, _Sampled) else (video, None)
            frames = _as_tensor(frames)
            if input_data_format is None:
                input_data_format = infer_channel_dimension_format(frames)
            if input_data_format == ChannelDimension.LAST:
                frames = frames.permute(0, 3, 1, 2)
            if do_convert_rgb and frames.shape[1] != 3:
                frames = self.convert_to_rgb(frames)
            if device is not None and torch.device(device) != frames.device:
                frames, index = (frames if index is None else frames[index]).to(device), None
            prepared.append(_Sampled(frames, None if index is None else index.to(frames.device)))
        return prepared

    def _preprocess(
        self,
        videos: Sequence[_Sampled],
        do_resize: bool = True,
        size: Any = None,
        resample: Any = None,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        patch_size: int = 14,
        temporal_patch_size: int = 2,
        merge_size: int = 2,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        patches: dict[str, Any] = {
            "patch_size": patch_size,
            "temporal_patch_size": temporal_patch_size,
            "merge_size": merge_size,
        }
        for name, value in patches.items():
            if value is None:  # possible in a configuration only
                raise ValueError(f"{_NAME}: {name} must be an integer >= 1, got None.")
            patches[name] = int(value)
        if do_resize and size is None:
            raise ValueError(f"{_NAME}: size must be given with do_resize, got None.")
        factor = rescale_factor if do_rescale else 1.0
        if do_normalize:
            check_statistics(_NAME, image_mean, image_std, factor)
        for video in videos:
            _check_frames(video, None if do_resize else patch_size * merge_size)
        rules = {"do_resize": do_resize, "size": size, "resample": resample, **patches, **kwargs}
        interpolation = _INTERPOLATIONS.get(getattr(resample, "value", 2 if resample is None else resample))
        mean, std = per_channel(image_mean), per_channel(image_std)
        pixels = all(v.frames.dtype == torch.uint8 and v.frames.shape[1] == 3 for v in videos)
        usual = mean and std and min(std) > 0 and 1e-37 < factor < 1e37  # the op refuses others
        if not (do_normalize and pixels and interpolation and usual):
            return super()._preprocess(
                [video.gathered() for video in videos],
                do_rescale=do_rescale,
                rescale_factor=rescale_factor,
                do_normalize=do_normalize,
                image_mean=image_mean,
                image_std=image_std,
                return_tensors=return_tensors,
                **rules,
            )
        shapes = [
            torch.empty((len(video), *video.frames.shape[1:]), dtype=torch.uint8, device="meta") for video in videos
        ]
        plain = {"do_rescale": False, "rescale_factor": 1.0, "do_normalize": False}
        features = super()._preprocess(shapes, **plain, image_mean=None, image_std=None, **rules)
        patch = patches["patch_size"]
        pixel_values, grid_thw = patchify_videos(
            [video.frames for video in videos],
            [video.wanted for video in videos],
            size=[(height * patch, width * patch) for _, height, width in features["video_grid_thw"].tolist()],
            mean=mean,
            std=std,
            rescale_factor=factor,
            interpolation=interpolation,
            **patches,
        )
        values = {"pixel_values_videos": pixel_values, "video_grid_thw": grid_thw}
        return type(features)(values, tensor_type=return_tensors)  # transformers has two classes named BatchFeature


class BridgeSTGVideoProcessor(_OnePass, Qwen2VLVideoProcessor, _ShapesOnly, metaclass=abc.ABCMeta):
    """Drop-in for `Qwen2VLVideoProcessor` and `Qwen3VLVideoProcessor`: same arguments, same outputs, bit for bit.

    The class is the processor of Qwen2-VL and Qwen2.5-VL. With `family="qwen3_vl"`, or in a loaded configuration by its
    `video_processor_type`, it gives a `BridgeSTGQwen3VideoProcessor`, which counts as an instance of it.

    uint8 RGB videos, `[T, 3, H, W]` or `[T, H, W, 3]`, tensors or arrays of any strides, take one pass, and sampling
    (`do_sample_frames=True`) copies no frames. With `do_normalize=False`, another filter than bicubic and bilinear,
    frames of another dtype or other channels, the inherited implementation runs instead. What is saved names the stock
    class. docs/compatibility_processor.md lists every behaviour.

    Args:
        family: "qwen2_vl" (also Qwen2.5-VL; the default) or "qwen3_vl".
        kwargs: the settings of the Hugging Face processor of that family.

    Raises:
        TypeError, ValueError: from a call: no video or an empty one, frames that no setting can take, an index outside
            the video; from both: an unknown family, a setting of the wrong type or range, NaN or infinite statistics,
            a field whose name is nearly a known one.
    """

    _saved_as = "Qwen2VLVideoProcessor"

    def __new__(cls, *args: Any, family: str | None = None, **kwargs: Any) -> Any:
        chosen = cls.for_family(family, kwargs) if cls is BridgeSTGVideoProcessor else cls
        if chosen is cls:
            return object.__new__(cls)
        return chosen(*args, **kwargs)  # it is not an instance of this class, so Python does not call `__init__` again

    def get_num_of_video_patches(
        self, num_frames: int, height: int, width: int, videos_kwargs: dict[str, Any] | None = None
    ) -> int:
        """Count patches as in `transformers`; `videos_kwargs` is optional, which the stock class only documents."""
        return cast(int, super().get_num_of_video_patches(num_frames, height, width, videos_kwargs or {}))

    @staticmethod
    def for_family(family: str | None, settings: Mapping[str, Any]) -> type[Any]:
        """The class for `family`; if that is None, the class for the `video_processor_type` in the settings."""
        if family is None:
            kind = settings.get("video_processor_type", "Qwen2")
            found = [name for name, mark in (("qwen2_vl", "Qwen2"), ("qwen3_vl", "Qwen3")) if mark in str(kind)]
            if not found and kind != _NAME:
                raise ValueError(
                    f"{_NAME}: video_processor_type must be one of Qwen2-VL or Qwen3-VL, got {show(kind)}."
                )
            family = found[0] if found else "qwen2_vl"
        if family not in _FAMILIES:
            raise ValueError(f"{_NAME}: family must be one of {', '.join(map(repr, _FAMILIES))}, got {family!r}.")
        return _FAMILIES[family]

    @classmethod
    def from_dict(cls, video_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from settings as in `transformers`; those of both families' stock processors are accepted."""
        family = kwargs.pop("family", None)
        chosen = cls.for_family(family, video_processor_dict) if cls is BridgeSTGVideoProcessor else cls
        if chosen is cls:
            return super().from_dict(video_processor_dict, **kwargs)
        return chosen.from_dict(video_processor_dict, **kwargs)


class BridgeSTGQwen3VideoProcessor(_OnePass, Qwen3VLVideoProcessor, _ShapesOnly):
    """`Qwen3VLVideoProcessor` in one pass; see `BridgeSTGVideoProcessor`."""

    _saved_as = "Qwen3VLVideoProcessor"


BridgeSTGVideoProcessor.register(BridgeSTGQwen3VideoProcessor)
_FAMILIES: dict[str, type[_OnePass]] = {
    "qwen2_vl": BridgeSTGVideoProcessor,
    "qwen3_vl": BridgeSTGQwen3VideoProcessor,
}


def _check_videos(videos: Any, depth: int = 0) -> None:
    """Check that videos are arrays, images, paths or addresses, or lists of these as nested as transformers allows."""
    if isinstance(videos, (list, tuple)):
        if not videos and not depth:
            raise ValueError(f"{_NAME}: videos must hold at least one video, got {videos!r}.")
        for video in videos:
            _check_videos(video, depth + 1)
    elif not isinstance(videos, (np.ndarray, Tensor, str, os.PathLike, Image.Image)):
        raise TypeError(f"{_NAME}: videos must be arrays, images, paths or addresses, got {type(videos).__name__}.")


def _sample(sample: Callable[..., Any], facts: Any, frames: int) -> Any:
    """Frame indices that the family's sampling rule gives, in the rule's own type."""
    asked = getattr(sample, "keywords", {})
    total, fps = facts.total_num_frames, facts.fps
    needs_fps = asked.get("num_frames") is None and fps is not None
    for name, value in (("total_num_frames", total), *((("fps", fps),) if needs_fps else ())):
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 < value < float("inf"):
            raise ValueError(f"{_NAME}: {name} of video_metadata must be a number > 0, got {show(value)}.")
    given = f"num_frames={asked.get('num_frames')} and fps={asked.get('fps')}"
    try:
        index = sample(metadata=facts)
    except (TypeError, ZeroDivisionError, OverflowError) as error:  # Qwen2-VL has no default, and rounds 1 frame to 0
        raise ValueError(
            f"{_NAME}: do_sample_frames must have num_frames or fps that leave a group of frames, got {given} "
            f"for a video of {total} frames."
        ) from error
    if not len(index):
        raise ValueError(f"{_NAME}: do_sample_frames must leave at least one frame, got none by {given}.")
    if (last := int(max(index))) >= frames:
        raise ValueError(
            f"{_NAME}: video_metadata must be of the {frames} frames given, got total_num_frames={total}, "
            f"which asks for frame {last}."
        )
    return index


def _as_tensor(frames: Any) -> Tensor:
    if isinstance(frames, np.ndarray) and any(stride < 0 for stride in frames.strides):
        frames = np.ascontiguousarray(frames)
    try:
        tensor = torch.as_tensor(frames) if isinstance(frames, (np.ndarray, Tensor)) else None
    except TypeError as error:  # arrays of texts or objects, or in another byte order
        raise TypeError(f"{_NAME}: videos must be arrays of numbers, got dtype {frames.dtype}.") from error
    if tensor is None or tensor.dim() != 4:
        found = show(frames) if tensor is None else f"shape {list(tensor.shape)}"
        raise TypeError(
            f"{_NAME}: each of videos must be an array of 4 axes (frames, channels, height, width), got {found}."
        )
    return tensor


def _check_frames(video: _Sampled, unit: int | None) -> None:
    """Check that a video has pixels and, with a `unit`, that its sides are multiples of it."""
    height, width = video.frames.shape[2:]
    if min(len(video), *video.frames.shape) == 0:
        raise ValueError(
            f"{_NAME}: videos must have at least one frame and one pixel, got shape {list(video.frames.shape)}."
        )
    for name, value in (("height", height), ("width", width)):
        if unit is not None and value % unit:
            raise ValueError(
                f"{_NAME}: without do_resize the {name} of a video must be a multiple of patch_size * merge_size = "
                f"{unit}, got {value}."
            )
