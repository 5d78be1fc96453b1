"""Draws synthetic scenes: anti-aliased objects over procedural or real-video backgrounds.

A clip rendered smaller than its native size is the native rendering averaged by area, so that training on
small frames sees what a model sees of the written video.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from .scene import UNIT_POLYGONS, SceneObject
from .video import frames as stream_frames
from .video import probe

_SHIFT = 8  # fixed-point bits of the vertex coordinates
_AA_SPREAD = 0.65  # pixels by which OpenCV's LINE_AA fill exceeds a polygon; measured
_MITRE_LIMIT = 2**0.5  # a right angle's; sharper tips, which the anti-aliasing rounds off, move no further
_BACKGROUND_FRAMES = 256
_NOISE = np.random.Generator(np.random.PCG64(7)).normal(0.0, 1.5, 1 << 20).round().astype(np.int8)


@dataclass(frozen=True)
class Background:
    """What lies behind the objects.

    Attributes:
        seed: of the procedural background and the sensor noise.
        video: a real video played behind the objects, or None.
        offset: where in that video the clip starts, in [0, 1).
    """

    seed: int
    video: str | None = None
    offset: float = 0.0


def render_scene(
    objects: Sequence[SceneObject],
    background: Background,
    native_size: tuple[int, int],
    size: tuple[int, int],
    frames: Sequence[int],
    fps: float,
) -> np.ndarray:
    """Draw `frames` as uint8 `[len(frames), H, W, 3]` RGB.

    Objects are round at `native_size`; another `size` (both (h, w)) shows the same picture, and a smaller one
    is drawn at the native size and averaged.
    """
    canvas = native_size if size[0] <= native_size[0] and size[1] <= native_size[1] else size
    height, width = canvas
    backdrop = _backdrop(background, canvas, frames, fps)
    polygons = []
    for item in objects:
        points = _polygon(item, native_size, canvas)
        corners = points[None] + item.centers[frames][:, None] * (width, height) - 0.5
        polygons.append(np.round(corners * (1 << _SHIFT)).astype(np.int32))
    out = np.empty((len(frames), *size, 3), dtype=np.uint8)
    pixels = height * width * 3
    for row, frame in enumerate(frames):
        image = backdrop[min(row, len(backdrop) - 1)].copy()
        for item, polygon in zip(objects, polygons, strict=True):
            cv2.fillPoly(image, [polygon[row]], item.rgb, cv2.LINE_AA, _SHIFT)
        # The place in the noise pool depends on the frame alone, not on which frames are asked for.
        start = (background.seed + 7919 * frame) * 104729 % max(1, _NOISE.size - pixels)
        noise = np.resize(_NOISE[start : start + pixels], image.shape)
        cv2.add(image, noise, dst=image, dtype=cv2.CV_8U)
        out[row] = image if canvas == size else cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    return out


def _backdrop(background: Background, size: tuple[int, int], frames: Sequence[int], fps: float) -> np.ndarray:
    """Pictures behind the objects, uint8 `[len(frames), H, W, 3]`, or `[1, H, W, 3]` for a still one."""
    if background.video is not None:
        return _video_background(background.video, background.offset, size, frames, fps)
    return procedural_background(np.random.default_rng(background.seed), size)[None]


def procedural_background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A dim, low-saturation picture `[H, W, 3]` uint8: gradient, low-frequency noise and static texture."""
    base = rng.uniform(40.0, 125.0) + rng.uniform(-10.0, 10.0, 3)
    coarse = base + rng.normal(0.0, 9.0, (4, 4, 1)) + rng.normal(0.0, 3.0, (4, 4, 3))
    slope = rng.normal(0.0, 14.0, 2)
    ramp = np.linspace(-1.0, 1.0, 4)
    coarse += (slope[0] * ramp[:, None] + slope[1] * ramp[None, :])[..., None]
    texture = rng.normal(0.0, rng.uniform(0.0, 5.0), (32, 32, 1))
    height, width = size
    smooth = cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    fine = cv2.resize(texture.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return np.clip(smooth + fine[..., None], 8.0, 165.0).astype(np.uint8)


def _polygon(item: SceneObject, native_size: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Vertices `[P, 2]` around the centre in pixels of `size`, moved in by the anti-aliasing's spread."""
    unit = UNIT_POLYGONS[item.shape]
    scale = item.diameter * min(native_size) * np.array([size[1] / native_size[1], size[0] / native_size[0]])
    return unit * scale - _AA_SPREAD * _mitre(item.shape)


@functools.cache
def _mitre(shape: str) -> np.ndarray:
    """Per vertex, the move that shifts both its edges outwards by one unit, `[P, 2]`, short at sharp tips."""
    points = UNIT_POLYGONS[shape]
    edge = np.roll(points, -1, axis=0) - points
    normal = np.stack([edge[:, 1], -edge[:, 0]], axis=1) / np.linalg.norm(edge, axis=1, keepdims=True)
    following = np.roll(points, -1, axis=0)
    area = np.sum(points[:, 0] * following[:, 1] - points[:, 1] * following[:, 0])
    normal *= np.sign(area)
    before = np.roll(normal, 1, axis=0)
    mitre = (normal + before) / (1.0 + np.sum(normal * before, axis=1, keepdims=True))
    length = np.linalg.norm(mitre, axis=1, keepdims=True)
    return mitre * np.minimum(1.0, _MITRE_LIMIT / length)


def _video_background(path: str, offset: float, size: tuple[int, int], frames: Sequence[int], fps: float) -> np.ndarray:
    """Frames `[T, H, W, 3]` of the video at its own pace, forwards then backwards, from a share `offset`."""
    pictures, times = _load_background(path, size)
    period = max(2.0 * times[-1], 1e-9)
    clock = (offset * times[-1] + np.asarray(frames) / fps) % period
    clock = np.minimum(clock, period - clock)
    return pictures[np.abs(times[None, :] - clock[:, None]).argmin(axis=1)]


@functools.lru_cache(maxsize=8)
def _load_background(path: str, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Up to 256 frames of `path`, covering `size`, desaturated and dimmed, and their times in seconds."""
    info = probe(path)
    height, width = size
    scale = max(height / info.height, width / info.width)
    cover = max(height, round(info.height * scale)), max(width, round(info.width * scale))
    top, left = (cover[0] - height) // 2, (cover[1] - width) // 2
    pictures = []
    for frame in itertools.islice(stream_frames(info), _BACKGROUND_FRAMES):
        picture = cv2.resize(frame, (cover[1], cover[0]), interpolation=cv2.INTER_AREA)
        picture = picture[top : top + height, left : left + width]
        grey = picture.mean(axis=2, keepdims=True)
        pictures.append((0.6 * (grey + 0.35 * (picture - grey))).astype(np.uint8))
    return np.stack(pictures), info.times[: len(pictures)]
