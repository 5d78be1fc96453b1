"""Checks of the processors' settings; each failure is one sentence with the field, the value and the rule."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers.image_utils import SizeDict

from ..errors import BridgeSTGError, ConfigError
from ..settings import Rule, check_fields, show

_MOST = 2**31 - 1
_SIZE = Rule(int, least=1, most=_MOST)
_TEXT = Rule(str)
# The settings of `BridgeSTGProcessor`, by the names of its constructor's arguments.
PROCESSOR_RULES: dict[str, Rule] = {
    **dict.fromkeys(("patch_size", "temporal_patch_size", "merge_size"), _SIZE),
    **dict.fromkeys(("min_pixels", "max_pixels", "max_frames"), _SIZE),
    "bridge_tokens": Rule(int, least=0, most=_MOST),  # 0 in the coupled baseline
    "image_mean": Rule(list, each=Rule(float), length=3),
    "image_std": Rule(list, each=Rule(float, above=0), length=3),
    "fps": Rule(float, above=0),
    **dict.fromkeys(("timestamp_format", "prompt_prefix", "prompt_suffix"), _TEXT),
}
# The settings of the video processors of Qwen2-VL and Qwen3-VL.
_COUNT = Rule(int, least=1, most=_MOST, optional=True)
_NUMBER = Rule(float, optional=True)
_SWITCH = Rule(bool, optional=True)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("patch_size", "temporal_patch_size", "merge_size"), _COUNT),
    **dict.fromkeys(("min_frames", "max_frames", "num_frames"), _COUNT),
    "max_video_tokens": Rule(int, least=0, most=_MOST, optional=True),
    **dict.fromkeys(("min_pixels", "max_pixels", "fps", "rescale_factor"), _NUMBER),
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_sample_frames"), _SWITCH),
    **dict.fromkeys(("do_center_crop", "return_metadata", "cap_pixels_per_frame"), _SWITCH),
}
_PIL_FILTERS = range(6)
# A name this similar to a known one is refused as misspelt. Other unknown fields are kept, as in transformers.
_NEARLY = 0.8


def check_processor_settings(
    settings: Mapping[str, Any],
    source: str = "The processor",
    *,
    prefix: str = "",
    error: type[BridgeSTGError] = ConfigError,
) -> dict[str, Any]:
    """Check fields of `BridgeSTGProcessor` and return them converted; fields that are not given stay out.

    Args:
        source: where they stand, such as a file; begins the message.
        prefix: before the names of fields in messages, such as "processor.".

    Raises:
        ConfigError: an unknown field, a value of the wrong type or range, statistics that leave pixels infinite or
            NaN, a time format that formats no time, a text that is no Unicode; another error where `error` says so.
    """
    found = check_fields(settings, PROCESSOR_RULES, source, prefix=prefix, error=error)
    for name, value in found.items():
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise error(f"{source}: {prefix}{name} must hold no lone surrogate, got {show(value)}.")
    try:
        check_statistics(source, found.get("image_mean", 0.0), found.get("image_std", 1.0), 1 / 255, prefix)
    except ValueError as refused:
        raise error(str(refused)) from None
    form = found.get("timestamp_format", "")
    try:
        form.format(0.5)
    except (ValueError, LookupError, AttributeError, TypeError, MemoryError, OverflowError) as refused:
        raise error(
            f"{source}: {prefix}timestamp_format must format one number, as '{{:.1f}} s' does, got {show(form)}."
        ) from refused
    return found


def is_slip(name: str) -> bool:
    """Whether `name` is a misspelt field of `BridgeSTGProcessor`."""
    return name not in PROCESSOR_RULES and bool(difflib.get_close_matches(name, PROCESSOR_RULES, cutoff=_NEARLY))


def check_video_settings(owner: str, settings: Mapping[str, Any], kind: type) -> None:
    """Check the settings given to a video processor, by their names.

    Args:
        owner: begins the message.
        kind: the class; its attributes and the names in its `valid_kwargs` are the known fields.

    Raises:
        ValueError: a value of the wrong type or range, or an unknown name that is nearly a known one.
    """
    known = list(kind.valid_kwargs.__annotations__)  # type: ignore[attr-defined]
    for name, value in settings.items():
        if isinstance(value, np.generic):
            value = value.item()
        if name in ("image_mean", "image_std"):
            _check_numbers(owner, name, value)
        elif name == "size":
            _check_size(owner, value)
        elif name == "resample" and isinstance(value, int) and value not in _PIL_FILTERS:
            raise ValueError(f"{owner}: resample must be a filter of PIL, 0..5, got {show(value)}.")
        elif name in _RULES:
            _check(owner, name, value, _RULES[name])
        elif near := _nearly(name, known, kind):
            raise ValueError(f"{owner}: {show(name)} is no setting; it must be {near} or another known one.")


def check_statistics(
    owner: str, image_mean: Any, image_std: Any, rescale_factor: float | None, prefix: str = ""
) -> None:
    """Check that every pixel 0..255 has a normalised value in float32.

    Raises:
        ValueError: the statistics hold NaN, infinity or 0, or are so small or large that pixels would become so.
    """
    _check_numbers(owner, "image_mean", image_mean)
    _check_numbers(owner, "image_std", image_std)
    if image_mean is None or image_std is None or rescale_factor is None:
        return  # transformers says that they must be specified
    if rescale_factor == 0 or not math.isfinite(rescale_factor):
        raise ValueError(f"{owner}: rescale_factor must be finite and not 0, got {rescale_factor!r}.")
    with np.errstate(all="ignore"):  # overflow shows in the results, which are checked below
        mean, std = (
            np.atleast_1d(np.asarray(values, np.float32) * np.float32(1.0 / rescale_factor))
            for values in (image_mean, image_std)
        )
        ends = np.array([[0.0], [255.0]], np.float32)
        finite = [bool(np.isfinite(values).all()) for values in (mean, std, (ends - mean.max()) / std)]
        finite.append(bool(np.isfinite((ends - mean.min()) / std).all()))
    if not all(finite):
        name, value = ("image_mean", image_mean) if not finite[0] else ("image_std", image_std)
        rule = f"must leave normalised pixels finite in float32 with rescale_factor {rescale_factor!r}"
        raise ValueError(f"{owner}: {prefix}{name} {rule}, got {show(value)}.")


def per_channel(values: Any) -> list[float]:
    """Three float32 numbers, one a channel; an empty list if `values` are for another number of channels."""
    numbers = [values] if isinstance(values, (int, float)) else list(values) if values is not None else []
    return [float(np.float32(value)) for value in numbers * (3 // len(numbers))] if len(numbers) in (1, 3) else []


def _nearly(name: str, known: list[str], kind: type) -> str | None:
    if name in known or inspect.getattr_static(kind, name, None) is not None:
        return None
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=_NEARLY)), None)


def _check(owner: str, name: str, value: Any, rule: Rule) -> None:
    if rule.kind is bool:  # transformers takes 0 and 1, and any text for true
        if value in (0, 1, None):
            return
        raise ValueError(f"{owner}: {name} must be {rule}, got {show(value)}.")
    try:
        rule.read(value, name, owner)
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _check_numbers(owner: str, name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, np.ndarray):
        value = value.tolist()
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    rule = Rule(float)
    for item in items:
        try:
            _check(owner, name, item.item() if isinstance(item, np.generic) else item, rule)
        except ValueError:
            raise ValueError(f"{owner}: {name} must be a number or one a channel, got {show(value)}.") from None
    if not items:
        raise ValueError(f"{owner}: {name} must be a number or one a channel, got {show(value)}.")


def _check_size(owner: str, value: Any) -> None:
    """Check the numbers in a size; transformers checks which names it may have."""
    if value is None:
        return
    numbers = dict(value) if isinstance(value, (Mapping, SizeDict)) else {"": value}
    for name, number in numbers.items():
        for item in number if isinstance(number, (list, tuple)) else [number]:
            _check(owner, f"size.{name}".rstrip("."), item, _NUMBER)
