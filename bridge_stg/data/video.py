"""Reading video through PyAV: frame times without decoding, and only the frames that are needed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from ..errors import VideoError

MOST_ELONGATED = 200  # how many times a side of a frame may be the other: the bound of Qwen's image processors
_SEEK_GAIN = 16  # a seek drops the frames in flight in the decoder, so it has to skip more than those
# Demuxers of bare bitstreams invent a rate of 25; only a rate in the bitstream itself counts.
_BARE = frozenset(
    ("h261", "h263", "h264", "hevc", "vvc", "m4v", "mjpeg", "mpegvideo", "vc1", "cavsvideo", "dirac", "obu")
)
# The packets of these carry decoding times at best, so their frames are found by counting.
_UNORDERED = frozenset(("avi", "mpeg", "vob"))


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """What `probe` learns of a video.

    Attributes:
        path: of the file.
        width, height: in pixels, upright (after the rotation the file asks for).
        fps: mean frame rate, frames per second; for a one-frame video the container's rate, else 1.
        frame_count: frames in presentation order.
        duration: seconds from the first frame to the end of the last.
        times: float64 `[frame_count]`, seconds of each frame after the first, ascending.
        rotation: counter-clockwise turn that makes a decoded frame upright, 0, 90, 180 or 270 degrees.
        pts: int64 `[frame_count]` stream timestamps, ascending; None where the stream has none that can be
            trusted, so that frames are counted instead.
        keyframes: ascending (pts, dts) of the frames decoding can start at; empty without timestamps.
        start_time: seconds of the first frame on the file's own clock, as players show it.
    """

    path: str
    width: int
    height: int
    fps: float
    frame_count: int
    duration: float
    times: np.ndarray = field(repr=False)
    rotation: int = 0
    pts: np.ndarray | None = field(default=None, repr=False)
    keyframes: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    start_time: float = 0.0


class _PacketMark(NamedTuple):
    """What is kept of a packet; its data would fill the memory with the whole file."""

    pts: int | None
    dts: int | None
    keyframe: bool
    discard: bool


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Read a video's frame times and key frames from its packets; decodes one frame, for size and rotation.

    Times come from the stream's timestamps, so that a variable frame rate is right; what the container states
    is used only where timestamps are absent, and to notice that the file was cut off.

    Raises:
        VideoError: the file is missing, a folder, empty, not a video, without a video stream, truncated, or
            without a usable time base.
    """
    path = os.fspath(path)
    with _open(path) as (container, stream):
        read = [
            _PacketMark(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard)
            for packet in _packets(container, stream, path)
            if packet.size
        ]
        shown = [mark for mark in read if not mark.discard]
        if not shown:
            raise VideoError(f"{path} has a video stream without frames; the file is damaged or truncated.")
        rate = _declared_rate(container, stream)
        pts, times = _frame_times(path, container, stream, shown, rate)
        fps = _mean_rate(times, rate)
        duration = float(times[-1]) + 1.0 / fps
        _check_complete(path, container, stream, len(read), duration)
        keyframes: list[tuple[int, int]] = []
        if pts is not None:
            keyframes = sorted(
                (p.pts, p.pts if p.dts is None else p.dts) for p in read if p.keyframe and p.pts is not None
            )
    with _open(path) as (container, stream):
        first = next(_decoded(container, stream, path), None)
        if first is None:
            raise VideoError(f"{path} is damaged: none of its {len(times)} frames can be decoded.")
        rotation = _rotation(first)
        width, height = (first.height, first.width) if rotation % 180 else (first.width, first.height)
    return VideoInfo(path, width, height, fps, len(times), duration, times, rotation, pts, tuple(keyframes))


def decode_frames(video: str | os.PathLike[str] | VideoInfo, frame_index: Iterable[int]) -> torch.Tensor:
    """Decode frames in the order asked for; repeats are allowed.

    Seeks to the key frame before a needed frame where that skips enough, stops after the last one, and holds
    the needed frames only.

    Args:
        video: a path, or what `probe` returned for it.
        frame_index: 0-based frames in presentation order.

    Returns:
        uint8 `[len(frame_index), H, W, 3]`, RGB, upright.

    Raises:
        VideoError: as `probe`, or the file ends or breaks before a needed frame.
        ValueError: a frame is out of range.
    """
    info = video if isinstance(video, VideoInfo) else probe(video)
    wanted = np.asarray(list(frame_index), dtype=np.int64)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= info.frame_count):
        raise ValueError(f"frame_index must be in 0..{info.frame_count - 1}, got {wanted.min()}..{wanted.max()}")
    out = np.empty((len(wanted), info.height, info.width, 3), dtype=np.uint8)
    needed = np.array(sorted(set(wanted.tolist())), dtype=np.int64)
    reformatter = VideoReformatter()
    found = 0
    for frame, picture in _find_frames(info, needed):
        array = _to_array(picture, info, reformatter)
        for row in np.flatnonzero(wanted == frame):
            out[row] = array
        found += 1
    if found < len(needed):
        decodable = _count_decodable(info)
        raise VideoError(
            f"{info.path} is truncated or damaged: only {decodable} of its {info.frame_count} frames can be "
            f"decoded, and frame {needed[found]} is needed."
        )
    return torch.from_numpy(out)


def frames(video: str | os.PathLike[str] | VideoInfo) -> Iterator[np.ndarray]:
    """Stream all frames in presentation order, each uint8 `[H, W, 3]`, RGB, upright; holds one at a time.

    Raises:
        VideoError: as `probe`, or more than 2% of the frames (and more than one) cannot be decoded.
    """
    info = video if isinstance(video, VideoInfo) else probe(video)
    reformatter = VideoReformatter()
    count = 0
    with _open(info.path) as (container, stream):
        stream.thread_type = "AUTO"
        for picture in _decoded(container, stream, info.path):
            yield _to_array(picture, info, reformatter)
            count += 1
    if count < info.frame_count - max(1, info.frame_count // 50):
        raise VideoError(
            f"{info.path} is truncated or damaged: only {count} of its {info.frame_count} frames can be decoded."
        )


@contextmanager
def _open(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its first video stream, or say in one sentence why not."""
    if not os.path.exists(path):
        raise VideoError(f"{path} does not exist; a video file is needed.")
    if os.path.isdir(path):
        raise VideoError(f"{path} is a folder; a video file is needed.")
    if os.path.getsize(path) == 0:
        raise VideoError(f"{path} is empty; a video file is needed.")
    try:
        container = av.open(path, metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(
            f"{path} cannot be opened as a video ({_reason(error)}); it is damaged, truncated or of another kind."
        ) from error
    with container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise VideoError(f"{path} has no video stream, only {kinds}; a video is needed.")
        stream = streams[0]
        if stream.codec_context is None or not stream.codec_context.name:
            raise VideoError(f"{path} holds video in a format that cannot be decoded here.")
        yield container, stream


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _packets(container: InputContainer, stream: VideoStream, path: str) -> Iterator[Any]:
    """Packets of the stream in file order, from where the container stands, then the empty flush packet."""
    try:
        yield from container.demux(stream)
    except av.FFmpegError as error:
        raise VideoError(f"{path} is truncated or damaged: reading it failed ({_reason(error)}).") from error


def _decoded(container: InputContainer, stream: VideoStream, path: str) -> Iterator[VideoFrame]:
    """Decoded frames in presentation order; packets the decoder refuses are passed over."""
    for packet in _packets(container, stream, path):
        try:
            pictures = packet.decode()
        except av.FFmpegError:
            continue
        yield from pictures


def _declared_rate(container: InputContainer, stream: VideoStream) -> float:
    """The rate the file states, 0 if none; for a bare bitstream the one in its headers."""
    if container.format.name in _BARE:
        return float(stream.codec_context.framerate or 0)
    return float(stream.average_rate or stream.guessed_rate or 0)


def _frame_times(
    path: str, container: InputContainer, stream: VideoStream, packets: list[_PacketMark], rate: float
) -> tuple[np.ndarray | None, np.ndarray]:
    """Stream timestamps (None where frames must be counted) and seconds after the first frame, ascending."""
    names = set(container.format.name.split(","))
    if not names & _BARE and all(packet.pts is not None for packet in packets) and stream.time_base:
        pts = np.sort(np.array([packet.pts for packet in packets], dtype=np.int64))
        if (np.diff(pts) > 0).all():
            return None if names & _UNORDERED else pts, (pts - pts[0]) * float(stream.time_base)
    if rate <= 0 and len(packets) > 1:
        raise VideoError(f"{path} has no usable time base: its frames have neither ascending times nor a rate.")
    return None, np.arange(len(packets)) / (rate or 1.0)


def _check_complete(path: str, container: InputContainer, stream: VideoStream, read: int, duration: float) -> None:
    """Compare what can be read with what the container promises, as strictly as each kind of file allows."""
    names = container.format.name.split(",")
    if "mp4" in names or "avi" in names:
        size = os.path.getsize(path)
        missing = sum(entry.pos + entry.size > size for entry in stream.index_entries)
        if missing:
            total = max(stream.frames, read)
            left = min(read, total - missing)
            raise VideoError(f"{path} is truncated: only {left} of its {total} frames are in it.")
    promised = _clock(stream.metadata.get("DURATION", "")) if "matroska" in names else 0.0
    if promised - duration > max(0.5, 0.1 * promised):
        raise VideoError(f"{path} is truncated: its frames end at {duration:.2f} s of {promised:.2f} s.")


def _clock(text: str) -> float:
    """Seconds of "HH:MM:SS.fraction", 0 for anything else."""
    try:
        hours, minutes, seconds = (float(part) for part in text.split(":"))
    except ValueError:
        return 0.0
    return 3600 * hours + 60 * minutes + seconds


def _mean_rate(times: np.ndarray, declared: float) -> float:
    """Frames per second over `times`; the declared rate where it agrees within 1%, being free of rounding."""
    if len(times) < 2:
        return declared if 0 < declared <= 1000 else 1.0
    measured = (len(times) - 1) / float(times[-1] - times[0])
    return declared if declared > 0 and abs(declared - measured) <= 0.01 * measured else measured


def _rotation(frame: VideoFrame) -> int:
    return round(frame.rotation / 90) * 90 % 360


def _to_array(frame: VideoFrame, info: VideoInfo, reformatter: VideoReformatter) -> np.ndarray:
    """RGB `[H, W, 3]`, upright, at the video's size also where the stream changes it.

    One reformatter serves a whole read: setting up a conversion costs ten times the conversion.
    """
    height, width = (info.width, info.height) if info.rotation % 180 else (info.height, info.width)
    array = reformatter.reformat(frame, width, height, "rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(array, info.rotation // 90)) if info.rotation else array


def _find_frames(info: VideoInfo, needed: np.ndarray) -> Iterator[tuple[int, VideoFrame]]:
    """Decode the frames `needed` (ascending, unique), as far as the file allows."""
    if not len(needed):
        return
    with _open(info.path) as (container, stream):
        stream.thread_type = "AUTO"
        if info.pts is None:
            wanted = set(needed.tolist())
            for count, picture in enumerate(_decoded(container, stream, info.path)):
                if count in wanted:
                    yield count, picture
                if count >= needed[-1]:
                    return
            return
        yield from _find_by_time(info, info.pts, needed, container, stream)


def _find_by_time(
    info: VideoInfo, pts: np.ndarray, needed: np.ndarray, container: InputContainer, stream: VideoStream
) -> Iterator[tuple[int, VideoFrame]]:
    keys = np.array([key for key, _ in info.keyframes], dtype=np.int64)
    tolerance = max(1, int(pts[-1] - pts[0]) // max(1, len(pts) - 1))
    done = 0
    retreat = 0  # key frames to go back further, where a seek landed after the needed frame
    while done < len(needed):
        first_key = _key_before(keys, pts[needed[done]]) - retreat
        _seek(container, stream, info.keyframes[first_key] if first_key > 0 else None, int(pts[0]))
        previous: VideoFrame | None = None
        previous_pts = 0
        for picture in _decoded(container, stream, info.path):
            if picture.pts is None:
                continue
            if previous is None and picture.pts > pts[needed[done]] and first_key > 0:
                retreat += 1
                break
            due = done
            # A frame the decoder dropped is replaced by the nearest one it gave.
            while done < len(needed) and picture.pts >= pts[needed[done]]:
                target = int(pts[needed[done]])
                nearer = previous is not None and target - previous_pts < picture.pts - target
                yield int(needed[done]), previous if nearer and previous is not None else picture
                done += 1
            if done == len(needed):
                return
            previous, previous_pts = picture, picture.pts
            if done > due:
                retreat = 0
                next_key = _key_before(keys, pts[needed[done]])
                skipped = int(np.searchsorted(pts, keys[next_key])) - int(needed[done - 1]) if next_key > 0 else 0
                if skipped > _SEEK_GAIN:
                    break
        else:
            while done < len(needed) and previous is not None:
                if pts[needed[done]] - previous_pts > tolerance:
                    return
                yield int(needed[done]), previous
                done += 1
            return


def _key_before(keys: np.ndarray, pts: int) -> int:
    """Index of the last key frame at or before `pts`, -1 if there is none."""
    return int(np.searchsorted(keys, pts, side="right")) - 1


def _seek(container: InputContainer, stream: VideoStream, keyframe: tuple[int, int] | None, start: int) -> None:
    """Go to a key frame (pts, dts), or to the start of the stream."""
    timestamp = min(start, 0) if keyframe is None else keyframe[1]
    container.seek(timestamp, stream=stream, backward=True, any_frame=False)


def _count_decodable(info: VideoInfo) -> int:
    try:
        with _open(info.path) as (container, stream):
            return sum(1 for _ in _decoded(container, stream, info.path))
    except VideoError:
        return 0
