"""Finding frames in a file: decoding starts at the key frame before the first one needed and stops at the last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
from av.video.frame import VideoFrame

from .media_file import MediaFile, decoded, open_media

if TYPE_CHECKING:
    from .video import VideoInfo

_SEEK_GAIN = 16  # a seek drops the frames in flight in the decoder, so it has to skip more than those
_REACH = 1.0  # seconds from a frame that cannot be decoded to the one that stands in for it


def find_frames(info: VideoInfo, needed: np.ndarray, strict: bool = True) -> Iterator[tuple[int, VideoFrame]]:
    """Decode the frames `needed` (ascending, unique), as far as the file allows.

    A frame that cannot be decoded is replaced by the nearest that can: inside the video by one within a second, at
    its end where not more than 2% of the frames, or one, are lost. Without `strict` by any.
    """
    if not len(needed):
        return
    with ExitStack() as stack:
        reader = FrameReader(info, stack)
        if reader.ticks is None:
            yield from _find_by_count(info, reader, needed, strict)
        else:
            yield from _find_by_time(info, reader, reader.ticks, needed, strict)


class FrameReader:
    """Decodes a video from any key frame on, and tells which frame each picture is.

    Attributes:
        ticks: int64 `[frames]`, ascending: what `pictures` calls each frame; None where frames can only be counted.
        keys: int64, ascending: the same of the key frames.
    """

    def __init__(self, info: VideoInfo, stack: ExitStack) -> None:
        self._info, self._stack = info, stack
        self._file: MediaFile | None = None
        self._packets: Iterator[Any] = iter(())
        self._passed = 0  # packets that were read
        self.ticks, self._starts = info.pts, [start for _, start in info.keyframes]
        self.keys = np.array([tick for tick, _ in info.keyframes], dtype=np.int64)
        if info.place is not None:
            # The file's own clock was repaired, so packets are found by number and not by time.
            self.ticks = np.arange(info.frame_count)

    def pictures(self, key: int = -1) -> Iterator[tuple[int, VideoFrame]]:
        """(tick, frame) in presentation order, from a place in `keys` on, or from the beginning (-1)."""
        if self._info.place is not None:
            yield from self._numbered(self._info.place, self._starts[key] if key >= 0 else self._info.lead)
            return
        file = self._file or self._open()
        at_start = key < 0 or not file.seek(self._starts[key])
        if at_start and self._passed:
            file = self._open()
        skipped = 0
        for packet in file.packets():
            self._passed += 1
            if at_start and skipped < self._info.lead and packet.size:
                skipped += 1
                continue
            for picture in decoded(packet):
                if self.ticks is None or picture.pts is not None:
                    yield picture.pts or 0, picture

    def _numbered(self, place: np.ndarray, start: int) -> Iterator[tuple[int, VideoFrame]]:
        if self._file is None or start < self._passed:
            self._packets = self._open().packets()
        assert self._file is not None
        self._file.stream.codec_context.flush_buffers()
        for packet in self._packets:
            if packet.size:
                self._passed += 1
                if self._passed <= start:
                    continue
                packet.pts, packet.dts = int(place[self._passed - 1]), None
            for picture in decoded(packet):
                if picture.pts is not None and picture.pts >= 0:
                    yield picture.pts, picture

    def _open(self) -> MediaFile:
        self._stack.close()
        self._file = self._stack.enter_context(open_media(self._info.path, self._info.stream))
        self._file.stream.thread_type = "AUTO"
        self._passed = 0
        return self._file


def _find_by_count(
    info: VideoInfo, reader: FrameReader, needed: np.ndarray, strict: bool
) -> Iterator[tuple[int, VideoFrame]]:
    done, count = 0, 0
    picture: VideoFrame | None = None
    for _, picture in reader.pictures():
        if count == needed[done]:
            yield count, picture
            done += 1
        if done == len(needed):
            return
        count += 1
    yield from _stand_in(info, picture, count - 1, needed[done:], strict)


def _find_by_time(
    info: VideoInfo, reader: FrameReader, ticks: np.ndarray, needed: np.ndarray, strict: bool
) -> Iterator[tuple[int, VideoFrame]]:
    done = 0
    retreat = 0  # further key frames to go back, where a seek landed behind the needed frame
    while done < len(needed):
        # Decoding from the first key frame needs no seek.
        key = max(0, _key_before(reader.keys, ticks[needed[done]]) - retreat) or -1
        previous: VideoFrame | None = None
        previous_tick = 0
        again = False
        for tick, picture in reader.pictures(key):
            if previous is None and tick > ticks[needed[done]] and key > 0:
                break
            due = done
            while done < len(needed) and tick >= ticks[needed[done]]:
                target = int(ticks[needed[done]])
                nearer = previous is not None and target - previous_tick < tick - target
                if strict and not _reaches(info, ticks, needed[done], previous_tick if nearer else tick):
                    return
                yield int(needed[done]), previous if nearer and previous is not None else picture
                done += 1
            if done == len(needed):
                return
            previous, previous_tick = picture, tick
            if done > due:
                retreat = 0
                next_key = _key_before(reader.keys, ticks[needed[done]])
                if next_key > 0 and np.searchsorted(ticks, reader.keys[next_key]) - needed[done - 1] > _SEEK_GAIN:
                    again = True
                    break
        if again:
            continue
        if previous is None and key > 0:
            retreat = 2 * retreat + 1
            continue
        last = int(np.searchsorted(ticks, previous_tick, side="right")) - 1
        yield from _stand_in(info, previous, last, needed[done:], strict)
        return


def _reaches(info: VideoInfo, ticks: np.ndarray, frame: int, tick: int) -> bool:
    """Whether the frame at `tick` may stand in for `frame`."""
    if tick == ticks[frame]:
        return True
    place = min(int(np.searchsorted(ticks, tick)), len(ticks) - 1)
    return bool(abs(info.times[place] - info.times[frame]) <= max(_REACH, 1.5 / info.fps))


def _stand_in(
    info: VideoInfo, picture: VideoFrame | None, last: int, needed: np.ndarray, strict: bool
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield the last frame that can be decoded for each of those behind it."""
    if picture is None or (strict and info.frame_count - 1 - last > max(1, info.frame_count // 50)):
        return
    for frame in needed:
        yield int(frame), picture


def _key_before(keys: np.ndarray, tick: int) -> int:
    """Index of the last key frame at or before `tick`, -1 if there is none."""
    return int(np.searchsorted(keys, tick, side="right")) - 1
