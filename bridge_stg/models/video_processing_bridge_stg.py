"""`BridgeSTGVideoProcessor`: the video processors of Qwen2-VL, Qwen2.5-VL and Qwen3-VL on `ops.patchify_videos`.

Settings, frame sampling, size budgets and their warnings are inherited from `transformers`, whichever version is
installed; gathering, resizing, normalising and patching happen in one pass, without copies of the video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor
from transformers.image_utils import ChannelDimension
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import (
    infer_channel_dimension_format,
    is_valid_video,
    make_batched_metadata,
    make_batched_videos,
)

from ..ops import patchify_videos
from ..ops.patchify_frames import Interpolation, check_frames

# The argument of a call that bounds each frame alone and not the video, where the installed version has the choice.
NO_TOTAL_BUDGET = {"cap_pixels_per_frame": False} if hasattr(Qwen2VLVideoProcessor, "cap_pixels_per_frame") else {}
# Filters by PIL's number and by torchvision's name.
_INTERPOLATIONS: dict[Any, Interpolation] = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}


class _Sampled(NamedTuple):
    """A whole video and the frames wanted of it, all for None."""

    frames: Any
    wanted: Tensor | None


class _ShapesOnly(BaseVideoProcessor):
    """Resizes meta tensors, which have a shape and no pixels: how size rules are asked without doing the work."""

    def resize(self, image: Tensor, size: Any, *args: Any, **kwargs: Any) -> Tensor:
        if image.device.type == "meta":
            return image.new_empty((*image.shape[:-2], size.height, size.width))
        return cast(Tensor, super().resize(image, size, *args, **kwargs))


class BridgeSTGVideoProcessor(BaseVideoProcessor):
    """Drop-in for `Qwen2VLVideoProcessor` and `Qwen3VLVideoProcessor`: same arguments, same outputs, bit for bit.

    Like `pathlib.Path`, it is not what a call of it returns: that is a `BridgeSTGQwen2VideoProcessor` or a
    `BridgeSTGQwen3VideoProcessor`, by `family`, or in a loaded configuration by its `video_processor_type`.

    Videos are uint8, `[T, 3, H, W]` or `[T, H, W, 3]`, tensors or arrays, or whatever the Hugging Face processors
    decode. Sampling (`do_sample_frames=True`) copies no frames. With `do_normalize=False` or another filter than
    bicubic and bilinear, the inherited implementation runs instead.

    Args:
        family: "qwen2_vl" (also Qwen2.5-VL; the default) or "qwen3_vl".
        kwargs: the settings of the Hugging Face processor of that family.

    Raises:
        TypeError, ValueError: from a call: frames that are not uint8 or not RGB, an empty video, an index outside the
            video; from the constructor: an unknown family.
    """

    def __new__(cls, *args: Any, family: str | None = None, **kwargs: Any) -> BridgeSTGVideoProcessor:
        chosen = cls.for_family(family, kwargs) if cls is BridgeSTGVideoProcessor else cls
        return object.__new__(chosen)

    def __init__(self, *, family: str | None = None, **kwargs: Any) -> None:
        kwargs.pop("video_processor_type", None)
        super().__init__(**kwargs)

    @staticmethod
    def for_family(family: str | None, settings: dict[str, Any]) -> type[BridgeSTGVideoProcessor]:
        """The class for `family`, or without one for the `video_processor_type` among the settings."""
        if family is None:
            family = "qwen3_vl" if "Qwen3" in str(settings.get("video_processor_type")) else "qwen2_vl"
        if family not in _FAMILIES:
            raise ValueError(
                f"BridgeSTGVideoProcessor: family must be one of {', '.join(map(repr, _FAMILIES))}, got {family!r}."
            )
        return _FAMILIES[family]

    @classmethod
    def from_dict(cls, video_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in `transformers`; a configuration of either family's own processor is taken too."""
        if cls is BridgeSTGVideoProcessor:
            family = kwargs.pop("family", None)
            return cls.for_family(family, video_processor_dict).from_dict(video_processor_dict, **kwargs)
        return super().from_dict(video_processor_dict, **kwargs)

    def _decode_and_sample_videos(
        self,
        videos: Any,
        video_metadata: Any = None,
        do_sample_frames: bool | None = None,
        sample_indices_fn: Callable[..., Any] | None = None,
    ) -> Any:
        arrays = make_batched_videos(videos)
        if not (do_sample_frames and sample_indices_fn is not None and is_valid_video(arrays[0])):
            return super()._decode_and_sample_videos(videos, video_metadata, do_sample_frames, sample_indices_fn)
        metadata = make_batched_metadata(arrays, video_metadata=video_metadata)
        sampled = []
        for frames, facts in zip(arrays, metadata, strict=True):
            facts.frames_indices = sample_indices_fn(metadata=facts)
            index = torch.as_tensor(np.asarray(facts.frames_indices), dtype=torch.int64)
            if index.numel():
                check_frames(index, len(frames))
            sampled.append(_Sampled(frames, index))
        return sampled, metadata

    def _prepare_input_videos(
        self,
        videos: Sequence[Any],
        do_convert_rgb: bool | None = None,
        input_data_format: Any = None,
        device: Any = None,
        **kwargs: Any,
    ) -> list[_Sampled]:
        """[T, 3, H, W] views of the videos; frames are gathered only where they must be copied anyway."""
        prepared = []
        for video in videos:
            frames, index = video if isinstance(video, _Sampled) else (video, None)
            frames = torch.as_tensor(frames)
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
        rules = {"do_resize": do_resize, "size": size, "resample": resample, **patches, **kwargs}
        interpolation = _INTERPOLATIONS.get(getattr(resample, "value", 2 if resample is None else resample))
        if not do_normalize or interpolation is None:
            return super()._preprocess(
                [frames if index is None else frames[index] for frames, index in videos],
                do_rescale=do_rescale,
                rescale_factor=rescale_factor,
                do_normalize=do_normalize,
                image_mean=image_mean,
                image_std=image_std,
                return_tensors=return_tensors,
                **rules,
            )
        for frames, _ in videos:
            _check_frames_are_pixels(frames)
        sizes = [(frames.shape[2], frames.shape[3]) for frames, _ in videos]
        if do_resize:
            shapes = [
                torch.empty((len(frames if index is None else index), 3, *hw), dtype=torch.uint8, device="meta")
                for (frames, index), hw in zip(videos, sizes, strict=True)
            ]
            plain = {"do_rescale": False, "rescale_factor": 1.0, "do_normalize": False}
            grids = super()._preprocess(shapes, **plain, image_mean=None, image_std=None, **rules)["video_grid_thw"]
            sizes = [(height * patch_size, width * patch_size) for _, height, width in grids.tolist()]
        pixel_values, grid_thw = patchify_videos(
            [frames for frames, _ in videos],
            [index for _, index in videos],
            size=sizes,
            mean=_per_channel(image_mean),
            std=_per_channel(image_std),
            rescale_factor=rescale_factor if do_rescale else 1.0,
            interpolation=interpolation,
            **patches,
        )
        return BatchFeature(
            {"pixel_values_videos": pixel_values, "video_grid_thw": grid_thw}, tensor_type=return_tensors
        )


class BridgeSTGQwen2VideoProcessor(BridgeSTGVideoProcessor, Qwen2VLVideoProcessor, _ShapesOnly):
    """`Qwen2VLVideoProcessor`, which Qwen2.5-VL uses too, in one pass."""


class BridgeSTGQwen3VideoProcessor(BridgeSTGVideoProcessor, Qwen3VLVideoProcessor, _ShapesOnly):
    """`Qwen3VLVideoProcessor` in one pass."""


_FAMILIES: dict[str, type[BridgeSTGVideoProcessor]] = {
    "qwen2_vl": BridgeSTGQwen2VideoProcessor,
    "qwen3_vl": BridgeSTGQwen3VideoProcessor,
}


def _check_frames_are_pixels(frames: Tensor) -> None:
    if frames.dtype != torch.uint8:
        raise TypeError(f"BridgeSTGVideoProcessor: videos must be torch.uint8, got {frames.dtype}.")
    if frames.shape[1] != 3:
        raise ValueError(f"BridgeSTGVideoProcessor: videos must have 3 channels, got {frames.shape[1]}.")
    if frames.shape[0] == 0:
        raise ValueError(f"BridgeSTGVideoProcessor: videos must have at least one frame, got {list(frames.shape)}.")


def _per_channel(value: Any) -> list[float]:
    return [float(value)] * 3 if isinstance(value, (int, float)) else [float(x) for x in value]
