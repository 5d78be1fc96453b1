"""Turning a decoded frame into what a viewer sees: RGB in the stated colours, upright, in square pixels."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from PIL import Image

from ..errors import VideoError, printable
from .media_file import MediaFile, reason, sentences

_BT709, _UNSPECIFIED = 1, 2  # as H.273 numbers colour matrices
_COLOURS = {8: "YCgCo", 10: "BT.2020 constant luminance", 12: "chroma-derived", 13: "chroma-derived", 14: "ICtCp"}
HD_LINES = 720  # untagged video of so many lines is BT.709; below, BT.601
_LONGEST_PIXEL = 10  # times a side of a pixel may be the other; more is damage
_ORIENTATION = 0x0112  # the tag of EXIF
# EXIF's orientations: (mirrored, counter-clockwise turn after that).
_EXIF = {1: (False, 0), 2: (True, 0), 3: (False, 180), 4: (True, 180), 5: (True, 90), 6: (False, 270)}
_EXIF |= {7: (True, 270), 8: (False, 90)}


def is_still(formats: frozenset[str]) -> bool:
    """Whether a container is an image format, whose resolution in dots an inch does not give the shape of pixels."""
    return any(name.endswith("_pipe") or name in ("gif", "apng", "ico", "webp") for name in formats)


def pixel_shape(file: MediaFile) -> Fraction:
    """Width of a pixel over its height; 1 where the file states nothing or nonsense."""
    stated = file.stream.sample_aspect_ratio or file.stream.codec_context.sample_aspect_ratio
    if is_still(file.formats) or not stated or not 1 / _LONGEST_PIXEL <= stated <= _LONGEST_PIXEL:
        return Fraction(1)
    return Fraction(stated)


def displayed_size(width: int, height: int, pixel: Fraction) -> tuple[int, int]:
    """Width and height in square pixels; the short side of a pixel is stretched, so that no detail is lost."""
    return (round(width * pixel), height) if pixel >= 1 else (width, round(height / pixel))


def orientation(file: MediaFile, frame: VideoFrame) -> tuple[bool, int]:
    """How to make a decoded frame upright: whether to mirror it left to right, and how far to turn it then."""
    if is_still(file.formats):
        return _EXIF.get(_exif_orientation(file.path), (False, 0))
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # side data of a kind that this PyAV has no name for hides the rest
        return False, round(frame.rotation / 90) * 90 % 360
    if matrix is None:
        return False, 0
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return mirrored, round(-math.degrees(math.atan2(b, a)) / 90) * 90 % 360


def _exif_orientation(path: str) -> int:
    try:
        with Image.open(path) as image:
            return int(image.getexif().get(_ORIENTATION, 1))
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError):  # what Pillow cannot read
        return 1


def to_rgb(
    path: str, frame: VideoFrame, size: tuple[int, int], mirrored: bool, rotation: int, reformatter: VideoReformatter
) -> np.ndarray:
    """Convert one frame.

    One reformatter serves a whole read: setting up a conversion costs ten times the conversion.

    Args:
        path: of the file, for the message.
        size: (width, height) of the result, also where the stream changes its own.
        mirrored, rotation: see `orientation`.

    Returns:
        uint8 `[height, width, 3]`.

    Raises:
        VideoError: the conversion from the frame's colours is not known, or it does not fit in memory.
    """
    width, height = size[::-1] if rotation % 180 else size
    if frame.colorspace == _UNSPECIFIED and frame.height >= HD_LINES and not frame.format.is_rgb:
        frame.colorspace = _BT709
    with sentences(path):
        try:
            array = reformatter.reformat(frame, width, height, "rgb24").to_ndarray()
        except MemoryError:
            raise
        except (av.FFmpegError, ValueError) as error:
            colours = _COLOURS.get(int(frame.colorspace), f"matrix {int(frame.colorspace)}")
            raise VideoError(
                f"{printable(path)} cannot be converted to RGB from {frame.format.name} in the colours {colours} "
                f"({reason(error)})."
            ) from error
    if mirrored:
        array = array[:, ::-1]
    if rotation:
        array = np.rot90(array, rotation // 90)
    return np.ascontiguousarray(array)
