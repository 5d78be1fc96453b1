"""Charades-STA: a text file of `<video> <start> <end>##<sentence>` lines; intervals only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ...errors import SampleError
from ..jsonl import Line, decode, numbered_lines
from ..sample import GroundingSample
from ..time_base import UNKNOWN_SIZE
from ..values import shown
from .reading import Item, VideoFolder, attempt

# The file has seconds and no frames: a clock of tenths, to which its times are rounded, stands in for them.
CLOCK = 10.0
_SECONDS = re.compile(r"-?[0-9]{1,18}(\.[0-9]*)?")  # what float() takes beside it, such as 1_0, is a slip


def read_charades_sta(
    annotations: str | os.PathLike[str], videos: str | os.PathLike[str] | None = None
) -> Iterator[Item]:
    """One sample of task "temporal" a line.

    A sample's id is `<video>-<line>`. The file says nothing of rate, length and size: frames are tenths of a second,
    the video ends with the event and measures `UNKNOWN_SIZE`, and only the interval in seconds is to be relied on,
    until `align_to_video` has put in what the video says.

    Args:
        annotations: the published text file.
        videos: folder of the videos, looked through by name; None names them `<video>.mp4`.

    Yields:
        samples, and a problem for each line that is skipped.

    Raises:
        SampleError: the file cannot be read or is empty.
    """
    path = Path(annotations)
    folder = VideoFolder(videos)
    empty = True
    for line in numbered_lines(path, "Charades-STA annotations"):
        empty = False
        yield attempt(f"line {line.number}", partial(_sample, line, folder))
    if empty:
        raise SampleError(f"{path} holds no line; Charades-STA has one <video> <start> <end>##<sentence> a line.")


def _sample(line: Line, folder: VideoFolder) -> GroundingSample:
    text = decode(line.data).strip()
    head, separator, sentence = text.partition("##")
    parts = head.split()
    if not separator or len(parts) != 3:
        raise SampleError(f"a line must be <video> <start> <end>##<sentence>, got {shown(text)}.")
    if not all(_SECONDS.fullmatch(part) for part in parts[1:]):
        raise SampleError(f"start and end must be seconds, got {shown(parts[1])} and {shown(parts[2])}.")
    start, end = float(parts[1]), float(parts[2])
    return GroundingSample(
        id=f"{parts[0]}-{line.number}",
        video=folder.find(f"{parts[0]}.mp4"),
        sentence=sentence.strip(),
        width=UNKNOWN_SIZE[0],
        height=UNKNOWN_SIZE[1],
        fps=CLOCK,
        frame_count=max(1, round(end * CLOCK)) if 0 < end < 1e6 else 1,
        task="temporal",
        interval=(start, end),
    )
