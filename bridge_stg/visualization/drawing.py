"""What every picture shares: the palette, boxes on frames (OpenCV) and text in frames (Pillow)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.sample import Box, GroundingSample

if TYPE_CHECKING:
    from ..models.result import TubeEntry

Color = tuple[int, int, int]

# Teal and amber stay apart under every common colour deficiency; shape tells them apart as well:
# a predicted box is a whole outline, a true one is four corners.
PREDICTED: Color = (18, 181, 166)
TRUE: Color = (255, 176, 59)
SHADE: Color = (17, 22, 30)
WHITE: Color = (255, 255, 255)


def hex_color(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def true_boxes(sample: GroundingSample | None) -> Mapping[int, Box]:
    """True boxes of the frames inside the true interval; all of them where there is none."""
    if sample is None:
        return {}
    if sample.interval_frames is None:
        return sample.boxes
    start, end = sample.interval_frames
    return {frame: box for frame, box in sample.boxes.items() if start <= frame < end}


def render_frame(
    frame: np.ndarray,
    predicted: TubeEntry | None,
    true: Box | None,
    width: int | None = None,
    thickness: int | None = None,
) -> np.ndarray:
    """A copy of uint8 `[H, W, 3]`, scaled to `width` pixels, with its boxes drawn on it.

    The predicted box is solid, or dashed where it was interpolated; the true one is four corners. `thickness`
    is in pixels; None suits the size of the picture.
    """
    scale = 1.0 if width is None else width / frame.shape[1]
    image = scale_frame(frame, scale)
    thickness = thickness or max(1, round(min(image.shape[:2]) / 150))
    if true is not None:
        _draw_box(image, np.multiply(true, scale), TRUE, thickness, _corners)
    if predicted is not None:
        strokes = _dashes if predicted.interpolated else _outline
        _draw_box(image, np.multiply(predicted.box, scale), PREDICTED, thickness, strokes)
    return image


def scale_frame(frame: np.ndarray, scale: float) -> np.ndarray:
    """Resize uint8 `[H, W, 3]` by `scale`, always to a new array."""
    if scale == 1:
        return frame.copy()
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


# (length, thickness), in pixels -> the strokes that are drawn of a line, as (from, to) fractions of its length.
Strokes = Callable[[float, int], list[tuple[float, float]]]


def _outline(length: float, thickness: int) -> list[tuple[float, float]]:
    return [(0.0, 1.0)]


def _corners(length: float, thickness: int) -> list[tuple[float, float]]:
    return [(0.0, 0.28), (0.72, 1.0)]


def _dashes(length: float, thickness: int) -> list[tuple[float, float]]:
    """Dashes as long as the gaps, with a dash at both ends."""
    count = 2 * max(1, round(length / (9 * thickness))) + 1
    return [(part / count, (part + 1) / count) for part in range(0, count, 2)]


def _draw_box(image: np.ndarray, box: np.ndarray, color: Color, thickness: int, strokes: Strokes) -> None:
    """Draw the edges of a box (xyxy, continuous pixels) just inside it, over a dark halo of one line."""
    height, width = image.shape[:2]
    x1, x2 = (int(np.clip(v, 0, width - 1)) for v in (round(box[0]), round(box[2]) - 1))
    y1, y2 = (int(np.clip(v, 0, height - 1)) for v in (round(box[1]), round(box[3]) - 1))
    x2, y2 = max(x1, x2), max(y1, y2)
    mask = np.zeros((height, width), dtype=np.uint8)
    for a, b in strokes(x2 - x1, thickness):
        left, right = round(x1 + a * (x2 - x1)), round(x1 + b * (x2 - x1))
        cv2.rectangle(mask, (left, y1), (right, min(y1 + thickness - 1, y2)), 1, cv2.FILLED)
        cv2.rectangle(mask, (left, max(y2 - thickness + 1, y1)), (right, y2), 1, cv2.FILLED)
    for a, b in strokes(y2 - y1, thickness):
        top, bottom = round(y1 + a * (y2 - y1)), round(y1 + b * (y2 - y1))
        cv2.rectangle(mask, (x1, top), (min(x1 + thickness - 1, x2), bottom), 1, cv2.FILLED)
        cv2.rectangle(mask, (max(x2 - thickness + 1, x1), top), (x2, bottom), 1, cv2.FILLED)
    reach = 2 * max(1, thickness // 2) + 1
    halo = cv2.dilate(mask, np.ones((reach, reach), dtype=np.uint8)).astype(bool)
    image[halo] = (image[halo] * 0.3 + np.array(SHADE) * 0.7).astype(np.uint8)
    image[mask.astype(bool)] = color


@lru_cache(maxsize=32)
def load_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships: the same type on every machine, in every figure."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels, between words if it can; the rest is an ellipsis."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < max_lines:
        count = len(words)
        while count > 1 and font.getlength(" ".join(words[:count])) > width:
            count -= 1
        line, words = " ".join(words[:count]), words[count:]
        kept = _fitting_length(line, font, width)
        if kept < len(line):
            words.insert(0, line[kept:])
        lines.append(line[:kept])
    if words:
        last = f"{lines[-1]} {words[0]}"
        lines[-1] = last[: _fitting_length(last, font, width - font.getlength("…"))].rstrip() + "…"
    return lines


def _fitting_length(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """How many letters of `text`, at least one, are at most `width` pixels wide."""
    length = len(text)
    while length > 1 and font.getlength(text[:length]) > width:
        length -= 1
    return length


def draw_caption(text: str, width: int, height: int, *, margin: int) -> np.ndarray | None:
    """A band with `text` for a frame of `width` x `height`; None where it is too small for legible type.

    Returns:
        uint8 RGBA `[h, width, 4]`: dark and translucent, the text opaque.
    """
    size = max(9, round(min(width, height) * 0.045))
    font = load_font(size)
    lines = wrap_text(text, font, width - 2 * margin, max_lines=2)
    leading = round(size * 1.3)
    band = len(lines) * leading + 2 * (margin // 2)
    if band > height * 0.4 or width < 4 * size:
        return None
    picture = Image.new("RGBA", (width, band), (*SHADE, 190))
    pen = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        y = margin // 2 + row * leading + leading // 2
        pen.text((margin, y), line, font=font, fill=(*WHITE, 255), anchor="lm")
    return np.asarray(picture)


def blend(image: np.ndarray, picture: np.ndarray, top: int) -> None:
    """Lay an RGBA picture of the image's width over it, in place, from row `top` down."""
    region = image[top : top + len(picture)]
    alpha = picture[..., 3:].astype(np.uint16)
    region[:] = ((region * (255 - alpha) + picture[..., :3] * alpha + 127) // 255).astype(np.uint8)
