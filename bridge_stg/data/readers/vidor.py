"""Boxes of VidOR, which VidSTG refers to by video and trajectory id."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import SampleError
from ..sample import Box
from ..values import is_key, shown
from .reading import load_json, require

_CACHE = 32  # videos; VidSTG keeps the sentences of a video together


@dataclass(frozen=True)
class VidORVideo:
    """One VidOR file.

    Attributes:
        video_path: relative path of the video, such as "1001/7771650716.mp4"; None where the file has none.
        tracks: {trajectory id: {frame: (xmin, ymin, xmax, ymax)}}; a value that is not a box stays as it was written.
    """

    video_path: str | None
    tracks: Mapping[Any, Mapping[int, Any]]

    def tube(self, target: Any, frames: range) -> dict[int, Box]:
        """Boxes of a trajectory at those of `frames` that have one."""
        return {frame: box for frame, box in self.tracks.get(target, {}).items() if frame in frames}


class VidORBoxes:
    """VidOR annotations: `<video id>.json` anywhere below a folder, or one such file."""

    def __init__(self, path: str | os.PathLike[str]):
        """Raises:
        SampleError: there is no such folder or file.
        """
        path = Path(path)
        if not os.path.exists(path):
            raise SampleError(f"{path} does not exist; VidOR boxes are a folder of <video id>.json files, or one file.")
        self.path = path
        self._files: dict[str, Path] = {}
        for file in sorted(path.rglob("*.json")) if os.path.isdir(path) else [path]:
            # A copy may carry more in its name than the video's id.
            for name in (file.stem, *re.findall(r"(?<!\d)\d{6,}(?!\d)", file.stem)):
                self._files.setdefault(name, file)
        self._parse = lru_cache(maxsize=_CACHE)(_parse_or_error)

    def video(self, vid: str) -> VidORVideo:
        """Annotation of a video.

        Raises:
            SampleError: there is no file for it, or the file is broken.
        """
        if vid not in self._files:
            raise SampleError(f"{self.path} has no VidOR file of video {shown(vid)}, so its boxes are unknown.")
        found = self._parse(self._files[vid])
        if isinstance(found, SampleError):
            raise SampleError(str(found))
        return found


def _parse_or_error(path: Path) -> VidORVideo | SampleError:
    try:
        return _parse(path)
    except SampleError as error:  # kept as well, or every sentence of the video would read the file again
        return error


def _parse(path: Path) -> VidORVideo:
    record = require(load_json(path, dict, "a VidOR annotation"), ("trajectories",), str(path))
    if not isinstance(record["trajectories"], list):
        raise SampleError(f"trajectories of {path} must be an array with one entry a frame.")
    tracks: dict[Any, dict[int, Any]] = {}
    for frame, entries in enumerate(record["trajectories"]):
        for entry in entries if isinstance(entries, list) else [entries]:
            entry = require(entry, ("tid", "bbox"), f"an object in frame {frame} of {path}")
            if not is_key(entry["tid"]):
                raise SampleError(f"tid of an object in frame {frame} of {path} is {shown(entry['tid'])}, no number.")
            box = require(entry["bbox"], ("xmin", "ymin", "xmax", "ymax"), f"a box in frame {frame} of {path}")
            tracks.setdefault(entry["tid"], {})[frame] = (box["xmin"], box["ymin"], box["xmax"], box["ymax"])
    video_path = record.get("video_path")
    return VidORVideo(video_path if isinstance(video_path, str) and video_path else None, tracks)
