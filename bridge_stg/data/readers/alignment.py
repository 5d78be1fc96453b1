"""Aligning a dataset to the frames of its decoded videos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from ...errors import SampleError, VideoError
from ..sample import GroundingSample
from ..time_base import align_to_video
from ..video import VideoInfo, probe
from .reading import Item, Problem


def align_items(items: Iterable[Item]) -> Iterator[Item]:
    """Pass every sample that a reader yields through `align_to_video`.

    Yields:
        aligned samples, and a problem for each whose video cannot be read or ends before its event.
    """
    look = lru_cache(maxsize=64)(probe_or_reason)
    for item in items:
        if not isinstance(item, GroundingSample):
            yield item
            continue
        info = look(item.video)
        if isinstance(info, str):
            yield Problem(item.id, info)
            continue
        try:
            yield align_to_video(item, info)
        except SampleError as error:
            yield Problem(item.id, str(error))


def probe_or_reason(video: str) -> VideoInfo | str:
    """The info of a video, or the reason why it cannot be read."""
    try:
        return probe(video)
    except VideoError as error:
        return str(error)
