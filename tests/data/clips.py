"""Clips that no camera makes on purpose: packets moved in time, cut out, or put into other containers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def remux(
    source: Path, target: Path, change: Callable[[list[Any], Fraction], list[Any] | None], **opening: Any
) -> Path:
    """Copy the packets of a video; `change(packets, time_base)` moves them in place, or returns others."""
    with av.open(str(source)) as read, av.open(str(target), "w", **opening) as written:
        stream = read.streams.video[0]
        copy = written.add_stream_from_template(stream)
        packets = [packet for packet in read.demux(stream) if packet.size]
        packets = change(packets, packets[0].time_base) or packets
        for packet in packets:
            packet.stream = copy
            written.mux(packet)
    return target


def shifted(seconds: float) -> Callable[[list[Any], Fraction], None]:
    """For `remux`: every packet later."""

    def change(packets: list[Any], time_base: Fraction) -> None:
        for packet in packets:
            packet.pts += round(seconds / time_base)
            packet.dts += round(seconds / time_base)

    return change


def pes_stamps(data: bytes | bytearray) -> list[int]:
    """Where the pts of every frame stands in a transport stream; a dts, where there is one, 5 bytes behind."""
    found = []
    for start in range(0, len(data) - 187, 188):
        packet = data[start : start + 188]
        place = 4 + (1 + packet[4] if packet[3] & 0x20 else 0)
        begins = packet[1] & 0x40 and packet[place : place + 3] == b"\0\0\1"
        if begins and 0xE0 <= packet[place + 3] <= 0xEF:
            found.append(start + place + 9)
    return found


def read_stamp(data: bytes | bytearray, place: int) -> int:
    a, b, c, d, e = data[place : place + 5]
    return (a >> 1 & 7) << 30 | b << 22 | c >> 1 << 15 | d << 7 | e >> 1


def write_stamp(data: bytearray, place: int, value: int) -> None:
    data[place] = data[place] & 0xF1 | (value >> 30 & 7) << 1
    data[place + 1] = value >> 22 & 255
    data[place + 2] = (value >> 15 & 127) << 1 | 1
    data[place + 3] = value >> 7 & 255
    data[place + 4] = (value & 127) << 1 | 1


def solid(
    path: Path,
    color: Sequence[int] = (200, 30, 30),
    size: tuple[int, int] = (64, 64),
    *,
    pixel: str = "1",
    tags: str = "",
    full: bool = False,
    matrix: int | None = None,
    codec: str = "libx264",
) -> Path:
    """Four frames of one colour, (width, height) `size`, in pixels of shape `pixel`.

    Args:
        tags: x264 parameters, such as "colormatrix=bt709".
        full, matrix: how RGB becomes YUV: range, and matrix as swscale numbers it (1 BT.709, 5 BT.601).
    """
    options = {"qp": "0", "x264-params": tags} if codec == "libx264" else {}
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream(codec, rate=4, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(pixel)
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((*size[::-1], 3), color, np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=2 if full else 1)
            frame.pts, frame.time_base = number, Fraction(1, 4)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def with_sound(path: Path, late: float = 0.0, pictures: int = 1, default: int | None = None) -> Path:
    """`pictures` video streams, of 32, 64, ... pixels a side and 8 frames, that begin `late` s after 3 s of sound."""
    with av.open(str(path), "w") as output:
        sound: Any = output.add_stream("aac", rate=16000, layout="mono")
        streams: list[Any] = []
        for number in range(pictures):
            stream: Any = output.add_stream("libx264", rate=4, options={"bf": "0"})
            stream.width = stream.height = 32 * (number + 1)
            stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
            if default is not None:
                stream.disposition = av.stream.Disposition.default if number == default else av.stream.Disposition(0)
            streams.append(stream)
        packets = []
        for part in range(48):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.rate, silence.pts = 16000, 1024 * part
            packets += sound.encode(silence)
        packets += sound.encode(None)
        for stream in streams:
            for number in range(8):
                frame = av.VideoFrame.from_ndarray(np.full((stream.height, stream.width, 3), 90, np.uint8))
                frame.pts, frame.time_base = round(1000 * (late + number / 4)), Fraction(1, 1000)
                packets += stream.encode(frame)
            packets += stream.encode(None)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            output.mux(packet)
    return path
