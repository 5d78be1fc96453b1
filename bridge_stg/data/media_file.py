"""An open media file: FFmpeg gets its bytes and never its name, and every failure becomes a `VideoError`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..errors import VideoError, printable

# Demuxers of bare bitstreams invent a rate of 25; only a rate in the bitstream itself counts.
BARE = frozenset(
    ("h261", "h263", "h264", "hevc", "vvc", "m4v", "mjpeg", "mpegvideo", "vc1", "cavsvideo", "dirac", "obu")
)
_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails
# The first bytes of playlists, which hold no media but the names of other files.
_PLAYLISTS = (b"#extm3u", b"ffconcat", b"<mpd", b"v=0\n", b"v=0\r", b"[playlist]", b"<smil", b"<asx", b"<assetmap")
_SPECIAL = (
    (stat.S_ISDIR, "is a folder; a video file is needed."),
    (stat.S_ISFIFO, "is a pipe, which cannot be read twice; save it to a file first."),
    (stat.S_ISSOCK, "is a socket, which cannot be read twice; save it to a file first."),
    (lambda mode: not stat.S_ISREG(mode), "is a device; a video file is needed."),
)


class _Bytes:
    """A file as PyAV reads it.

    PyAV loses what a callback raises or reports it at the next call, whichever that is; so an error, an interrupt
    too, is kept here and the file ends at it.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.failure: BaseException | None = None

    def read(self, size: int) -> bytes:
        if self.failure is None:
            try:
                return self._raw.read(size)
            except BaseException as error:
                self.failure = error
        return b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()


class MediaFile:
    """An open file and one of its video streams.

    Attributes:
        path: as it was given.
        container, stream: of PyAV.
        formats: names of the container's format.
        number: of the stream among the video streams.
    """

    def __init__(self, path: str, container: InputContainer, source: _Bytes, number: int | None) -> None:
        self.path, self.container, self._source = path, container, source
        self.formats = frozenset(container.format.name.split(","))
        # Cover art and thumbnails are streams of one picture each; none of them is the video.
        streams = [stream for stream in container.streams.video if not stream.disposition & _PICTURES]
        if not streams:
            kinds = ", ".join(sorted({"pictures" if s.type == "video" else s.type for s in container.streams}))
            raise VideoError(f"{printable(path)} has no video stream, only {kinds or 'nothing'}; a video is needed.")
        if number is None:
            number = next((n for n, s in enumerate(streams) if s.disposition & Disposition.default), 0)
        if not 0 <= number < len(streams):
            have = "one video stream, 0" if len(streams) == 1 else f"video streams 0..{len(streams) - 1}"
            raise VideoError(f"{printable(path)} has {have}; there is no stream {number}.")
        self.number = number
        self.stream: VideoStream = streams[number]
        if self.stream.codec_context is None or not self.stream.codec_context.name:
            raise VideoError(f"{printable(path)} holds video in a format that cannot be decoded here.")

    def packets(self) -> Iterator[Any]:
        """Packets of the stream in file order, from where the file stands, then the empty flush packet."""
        while True:
            try:
                for packet in self.container.demux(self.stream):
                    self.check()
                    yield packet
            except IndexError:  # a stream that begins here, which PyAV does not know of; the next packet follows
                continue
            self.check()
            return

    def seek(self, timestamp: int) -> bool:
        """Go to the last key frame at or before a decoding time; False where the format cannot."""
        try:
            self.container.seek(timestamp, stream=self.stream, backward=True, any_frame=False)
        except (av.FFmpegError, OSError):  # images, pipes of images, damaged indices
            self.check()
            return False
        return True

    def check(self) -> None:
        """Raise what reading the file raised."""
        if self._source.failure is not None:
            raise self._source.failure


@contextmanager
def open_media(path: str, number: int | None = None) -> Iterator[MediaFile]:
    """Open a file and its video stream `number` (the default one when None).

    Raises:
        VideoError: it is not a regular file, empty, a playlist, not a video, has no such stream, or reading it inside
            the block fails.
    """
    with sentences(path):
        _check_kind(path)
        with open(path, "rb", buffering=0) as raw:
            _refuse_playlist(path, raw)
            source = _Bytes(raw)
            try:
                # Nothing but this file is ever opened, whatever it refers to: no protocol is allowed.
                options = {"protocol_whitelist": "none"}
                container = av.open(source, metadata_errors="ignore", options=options, buffer_size=1 << 16)
            except (av.FFmpegError, OSError, ValueError) as error:
                if source.failure is not None:
                    raise source.failure from error
                if isinstance(error, MemoryError):
                    raise
                raise VideoError(
                    f"{printable(path)} cannot be opened as a video ({reason(error)}); it is damaged, truncated or "
                    "of another kind."
                ) from error
            with container:
                yield MediaFile(path, container, source, number)


def decoded(packet: Any) -> list[VideoFrame]:
    """The frames that a packet completes, in presentation order; none where the decoder refuses the packet."""
    try:
        return packet.decode()
    except MemoryError:
        raise
    except av.FFmpegError:
        return []


@contextmanager
def sentences(path: str) -> Iterator[None]:
    """Turn what FFmpeg and the system raise into a `VideoError` about `path`."""
    try:
        yield
    except MemoryError as error:
        raise VideoError(f"{printable(path)} does not fit in memory.") from error
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{printable(path)} cannot be read as a video ({reason(error)}).") from error


def reason(error: BaseException) -> str:
    """The system's or FFmpeg's words for an error, without number and file name."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _check_kind(path: str) -> None:
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        if "://" in path:
            rule = "is an address, and only files are read; download it first."
        else:
            rule = "does not exist; a video file is needed."
        raise VideoError(f"{printable(path)} {rule}") from error
    except ValueError as error:  # a NUL, or a surrogate that stands for no byte
        raise VideoError(f"{printable(path)} cannot be the name of a file ({error}).") from error
    for of_kind, rule in _SPECIAL:
        if of_kind(status.st_mode):
            raise VideoError(f"{printable(path)} {rule}")
    if status.st_size == 0:
        raise VideoError(f"{printable(path)} is empty; a video file is needed.")


def _refuse_playlist(path: str, raw: BinaryIO) -> None:
    head = raw.read(2048).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    raw.seek(0)
    if head.startswith(b"<?xml"):
        head = head[head.find(b"?>") + 2 :].lstrip()
    while head.startswith(b"<!--"):
        head = head[head.find(b"-->") + 3 :].lstrip() if b"-->" in head else b""
    if head.startswith(_PLAYLISTS):
        raise VideoError(f"{printable(path)} is a playlist, which only names other files; a video file is needed.")
