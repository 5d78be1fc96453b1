"""Reading video through PyAV: frame times without decoding, and only the frames that are needed."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from ..errors import VideoError, printable
from .available_memory import check_memory
from .clock import MOST_REORDERED, Clock, PacketMark, read_clock
from .frame_search import FrameReader, find_frames
from .media_file import BARE, MediaFile, open_media, sentences
from .picture import displayed_size, orientation, pixel_shape, to_rgb

MOST_ELONGATED = 200  # how many times a side of a frame may be the other: the bound of Qwen's image processors
_LONGEST = 31 * 24 * 3600.0  # seconds a clip may span; a damaged clock says more
_FASTEST = 1000.0  # frames per second
_LONGEST_GAP = 10.0  # seconds; a longer step of a clock that may jump is a jump, as in FFmpeg's own tools
# Broadcast formats, whose clock may jump, and in which a recording may begin anywhere.
_BROADCAST = frozenset(("mpegts", "mpeg", "vob"))
# The packets of these carry decoding times at best, so their frames are found by counting.
_UNORDERED = frozenset(("avi", "mpeg", "vob"))


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """What `probe` learns of a video. It can be given wherever a path is, and saves looking at the file again.

    Attributes:
        path: of the file.
        width, height: in square pixels as they are displayed: upright, after the rotation the file asks for, and
            stretched where its pixels are not square. Boxes are in these.
        fps: mean frame rate, frames per second; for a one-frame video the container's rate, else 1.
        frame_count: frames in presentation order.
        duration: seconds from the first frame to the end of the last, which is where its packet says that it ends.
        times: float64 `[frame_count]`, seconds of each frame after the first, ascending.
        rotation: counter-clockwise turn that makes a decoded frame upright, 0, 90, 180 or 270 degrees.
        pts: int64 `[frame_count]` stream timestamps, ascending; None where the stream has none that can be
            trusted, so that frames are found by counting frames or packets.
        keyframes: ascending (tick, start) of the frames decoding can start at, without `place` (pts, dts), with it
            (frame, packet); empty where frames are counted.
        mirrored: whether a decoded frame is mirrored left to right before the turn.
        stream: which of the file's video streams this is, from 0; cover art is none.
        lead: packets before the first key frame, where a recording begins between two; they are passed over.
        place: int64 `[packets]`, the frame of each packet in file order, negative for none; None unless the
            stream's timestamps were repaired.
        repairs: what was repaired in the stream's clock, a clause each; empty for a sound file.
        start_time: seconds of the first frame on the file's own clock, which begins with the first of its sound and
            picture, as players show it. `times` plus this is the file's own time.
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
    mirrored: bool = False
    stream: int = 0
    lead: int = 0
    place: np.ndarray | None = field(default=None, repr=False)
    repairs: tuple[str, ...] = ()
    start_time: float = 0.0

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path


def probe(path: str | os.PathLike[str] | VideoInfo, stream: int | None = None) -> VideoInfo:
    """Read a video's frame times and key frames from its packets; decodes one frame, for size and orientation.

    Times come from the stream's timestamps, so that a variable frame rate is right. Where they contradict each
    other they are repaired in that place only, and `VideoInfo.repairs` and the log say how. What the container
    states is used only where timestamps are absent, and to notice that the file was cut off. Nothing but the file
    itself is read, whatever it refers to, and its name is never taken for an address or a pattern.

    Args:
        path: of a video, or of an image, which is a video of one frame; a `VideoInfo` is returned as it is, unless
            it is of another stream.
        stream: which of the video streams, from 0; None takes the one marked as default, else the first.

    Raises:
        VideoError: the file is missing, a folder, a pipe, empty, not a video, without that video stream, truncated,
            larger than memory, or without a usable time base.
    """
    if isinstance(path, VideoInfo) and stream in (None, path.stream):
        return path
    path = os.fsdecode(path)
    with open_media(path, stream) as file:
        info = _read_packets(file)
        check_memory(path, 1, file.stream.codec_context.width, file.stream.codec_context.height)
        pixel = pixel_shape(file)
        with ExitStack() as stack:
            pictures = FrameReader(info, stack).pictures()
            tick, first = next(pictures, (0, None))
            if first is None:
                raise VideoError(f"{printable(path)} is damaged: none of its {info.frame_count} frames can be decoded.")
            mirrored, rotation = orientation(file, first)
            size = displayed_size(first.width, first.height, pixel)
            if info.lead:
                info = _without_lead(info, tick, (later for later, _ in pictures))
    width, height = size[::-1] if rotation % 180 else size
    if info.repairs:
        _log_once(f"{printable(path)}: {'; '.join(info.repairs)}.")
    return replace(info, width=width, height=height, rotation=rotation, mirrored=mirrored)


@functools.lru_cache(maxsize=1000)
def _log_once(text: str) -> None:
    """Log a text once, as a training run probes a video many times."""
    logging.getLogger(__name__).warning(text)


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
    info = probe(video)
    wanted = np.asarray(list(frame_index), dtype=np.int64)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= info.frame_count):
        raise ValueError(f"frame_index must be in 0..{info.frame_count - 1}, got {wanted.min()}..{wanted.max()}")
    check_memory(info.path, len(wanted), info.width, info.height)
    with sentences(info.path):
        out = np.empty((len(wanted), info.height, info.width, 3), dtype=np.uint8)
    needed = np.array(sorted(set(wanted.tolist())), dtype=np.int64)
    found = 0
    for frame, array in _find_arrays(info, needed):
        for row in np.flatnonzero(wanted == frame):
            out[row] = array
        found += 1
    if found < len(needed):
        raise VideoError(f"{_damage(info)}, and frame {needed[found]} is needed.")
    return torch.from_numpy(out)


def frames(video: str | os.PathLike[str] | VideoInfo, strict: bool = True) -> Iterator[np.ndarray]:
    """Stream all frames in presentation order, the same as `decode_frames` gives; holds one at a time.

    Args:
        video: a path, or what `probe` returned for it.
        strict: whether too many lost frames are an error; if not, the nearest decodable frame stands in for any.

    Yields:
        `frame_count` times uint8 `[H, W, 3]`, RGB, upright.

    Raises:
        VideoError: as `decode_frames` of every frame.
    """
    info = probe(video)
    count = 0
    for _, array in _find_arrays(info, np.arange(info.frame_count), strict):
        yield array
        count += 1
    if count < info.frame_count:
        raise VideoError(f"{_damage(info)}.")


def _find_arrays(info: VideoInfo, needed: np.ndarray, strict: bool = True) -> Iterator[tuple[int, np.ndarray]]:
    reformatter = VideoReformatter()
    size = info.width, info.height
    for frame, picture in find_frames(info, needed, strict):
        yield frame, to_rgb(info.path, picture, size, info.mirrored, info.rotation, reformatter)


def _damage(info: VideoInfo) -> str:
    try:
        with ExitStack() as stack:
            decodable = sum(1 for _ in FrameReader(info, stack).pictures())
    except VideoError:
        decodable = 0
    whole = f"{printable(info.path)} is truncated or damaged"
    return f"{whole}: only {decodable} of its {info.frame_count} frames can be decoded"


def _read_packets(file: MediaFile) -> VideoInfo:
    """Everything about a video that its packets tell; size and orientation need a decoded frame."""
    path, stream = file.path, file.stream
    read = [
        PacketMark(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, packet.is_discard)
        for packet in file.packets()
        if packet.size
    ]
    shown = [mark for mark in read if not mark.discard]
    if not shown:
        raise VideoError(f"{printable(path)} has a video stream without frames; the file is damaged or truncated.")
    bare = _is_bare(file, len(shown))
    rate = _declared_rate(file, bare)
    unit = float(stream.time_base or 0)
    clock = None if bare else _stream_clock(file, shown)
    if clock is None:
        if rate <= 0 and len(shown) > 1:
            raise VideoError(
                f"{printable(path)} has no usable time base: its frames have neither ascending times nor a rate."
            )
        times = np.arange(len(shown)) / (rate or 1.0)
        first = min((mark.pts for mark in shown if mark.pts is not None), default=None)
    else:
        times = (clock.ticks - clock.ticks[0]) * unit
        first = int(clock.ticks[0])
    fps = _mean_rate(times, rate)
    last = 0.0 if clock is None or clock.end is None else (clock.end - int(clock.ticks[-1])) * unit
    duration = float(times[-1]) + (last or 1.0 / fps)
    if not duration <= _LONGEST:
        raise VideoError(
            f"{printable(path)} has a damaged clock: its {len(times)} frames span {duration:.0f} s, and a clip has at "
            f"most {_LONGEST:.0f} s."
        )
    _check_complete(file, len(read), duration + max(0.0, (first or 0) * unit))
    # A stream alone starts at its first picture; what an AVI states for it is when decoding begins.
    alone = len(file.container.streams) == 1
    origin = None if alone or file.container.start_time is None else file.container.start_time / 1e6
    # A microsecond is the unit in which a container states its start.
    start_time = 0.0 if first is None or origin is None else max(0.0, round(first * unit - origin, 6))
    info = VideoInfo(path, 0, 0, fps, len(times), duration, times, stream=file.number, start_time=start_time)
    keys = [number for number, mark in enumerate(read) if mark.keyframe]
    info = replace(info, lead=keys[0] if keys else 0)
    if clock is None:
        return info
    if clock.repairs:
        place = np.full(len(read), -1)
        place[[number for number, mark in enumerate(read) if not mark.discard]] = clock.place
        starts = sorted((int(place[number]), number) for number in keys if place[number] >= 0)
        return replace(info, place=place, keyframes=tuple(starts), repairs=clock.repairs)
    if not file.formats & _UNORDERED:
        marks = [read[number] for number in keys]
        starts = sorted((m.pts, m.pts if m.dts is None else m.dts) for m in marks if m.pts is not None)
        info = replace(info, pts=clock.ticks, keyframes=tuple(starts))
    return info


def _stream_clock(file: MediaFile, shown: list[PacketMark]) -> Clock | None:
    """The frames' times; None where they are counted at the declared rate."""
    if not file.stream.time_base:
        return None
    second = float(1 / file.stream.time_base)
    longest = _LONGEST_GAP * second if file.formats & _BROADCAST else None
    clock = read_clock(shown, "mp4" not in file.formats, longest, second)
    # Frames that are found by counting are timed by counting too, unless their times are sound.
    return None if clock and clock.repairs and file.formats & _UNORDERED else clock


def _without_lead(info: VideoInfo, first: int, later: Iterator[int]) -> VideoInfo:
    """Leave out the first frames that cannot be decoded, as they refer to frames before the recording.

    Args:
        info: the video with them.
        first, later: what `FrameReader` calls the frames that come out of the decoder.
    """
    if info.pts is None and info.place is None:
        lost = info.frame_count - 1 - sum(1 for _ in later)
    else:
        first = min([first, *itertools.islice(later, MOST_REORDERED)])
        lost = first if info.pts is None else int(np.searchsorted(info.pts, first))
    if lost <= 0:
        return info
    gone = float(info.times[lost])
    frames_lost = "frame needs" if lost == 1 else f"{lost} frames need"
    return replace(
        info,
        frame_count=info.frame_count - lost,
        duration=info.duration - gone,
        times=info.times[lost:] - gone,
        pts=None if info.pts is None else info.pts[lost:],
        place=None if info.place is None else info.place - lost,
        keyframes=info.keyframes
        if info.place is None
        else tuple((frame - lost, packet) for frame, packet in info.keyframes if frame >= lost),
        repairs=(*info.repairs, f"the first {frames_lost} a picture before the recording, and are left out"),
        start_time=info.start_time + gone,
    )


def _is_bare(file: MediaFile, count: int) -> bool:
    """Whether the frames of a file have no times, as in a bare bitstream or in concatenated pictures (bare MJPEG)."""
    return bool(file.formats & BARE) or (count > 1 and any(name.endswith("_pipe") for name in file.formats))


def _declared_rate(file: MediaFile, bare: bool) -> float:
    """The frame rate that the file states, of a bare bitstream in its headers; 0 if there is none or it is absurd."""
    stream = file.stream
    if bare:
        rate = float(stream.codec_context.framerate or 0)
    else:
        rate = float(stream.average_rate or stream.guessed_rate or 0)
    return rate if 0 < rate <= _FASTEST else 0.0


def _check_complete(file: MediaFile, read: int, end: float) -> None:
    """Raise VideoError where the file holds less than its container promises."""
    stream = file.stream
    if file.formats & {"mp4", "avi"}:
        size = os.path.getsize(file.path)
        missing = sum(entry.pos + entry.size > size for entry in stream.index_entries)
        if missing:
            total = max(stream.frames, read, len(stream.index_entries))
            left = min(read, total - missing)
            raise VideoError(f"{printable(file.path)} is truncated: only {left} of its {total} frames are in it.")
    promised = _seconds(stream.metadata.get("DURATION", "")) if "matroska" in file.formats else 0.0
    if promised - end > max(0.5, 0.1 * promised):
        raise VideoError(f"{printable(file.path)} is truncated: its frames end at {end:.2f} s of {promised:.2f} s.")


def _seconds(text: str) -> float:
    """Seconds of "HH:MM:SS.fraction", 0 for anything else."""
    try:
        hours, minutes, seconds = (float(part) for part in text.split(":"))
    except ValueError:
        return 0.0
    return 3600 * hours + 60 * minutes + seconds


def _mean_rate(times: np.ndarray, declared: float) -> float:
    """Frames per second over `times`; the declared rate, which has no rounding, where it agrees within 1%."""
    if len(times) < 2:
        return declared or 1.0
    measured = (len(times) - 1) / float(times[-1] - times[0])
    return declared if declared > 0 and abs(declared - measured) <= 0.01 * measured else measured
