"""Readers of published datasets; each streams `GroundingSample`, and a `Problem` for what could not be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ...errors import SampleError
from .charades_sta import read_charades_sta
from .hcstvg import read_hcstvg_v1, read_hcstvg_v2
from .jsonl import read_jsonl
from .reading import CONVENTIONS, Convention, Dataset, Item, Problem, checked
from .refcoco import read_refcoco
from .vidor import VidORBoxes
from .vidstg import read_vidstg

FORMATS = ("vidstg", "hcstvg-v1", "hcstvg-v2", "charades-sta", "refcoco", "jsonl")


def iterate_dataset(
    source: str | os.PathLike[str],
    format: str,
    *,
    boxes: str | os.PathLike[str] | None = None,
    videos: str | os.PathLike[str] | None = None,
    split: str | None = None,
    convention: Convention = "exact",
) -> Iterator[Item]:
    """Stream the samples of a dataset, as the boxes of a large one are too many to hold as Python objects.

    Args:
        source: the annotation file; for "refcoco" also the folder that holds it.
        format: one of `FORMATS`.
        boxes: VidOR annotations for "vidstg", `instances.json` for "refcoco"; of no use to the others.
        videos: folder of the videos or images.
        split: of "refcoco" only, whose file holds all of them.
        convention: how frames are numbered, for "vidstg" and "hcstvg-*".

    Yields:
        samples with unique ids, and a `Problem` for whatever is skipped or odd.

    Raises:
        SampleError: an option does not fit the format, or the source is of another format: 200,000 records cannot be
            read, and fewer than one in a hundred can.
    """
    _check_options(format, boxes, split, convention)
    if format == "vidstg":
        items = read_vidstg(source, boxes, videos, convention)
    elif format == "hcstvg-v1":
        items = read_hcstvg_v1(source, videos, convention)
    elif format == "hcstvg-v2":
        items = read_hcstvg_v2(source, videos, convention)
    elif format == "charades-sta":
        items = read_charades_sta(source, videos)
    elif format == "refcoco":
        items = read_refcoco(source, boxes, videos, split)
    else:
        items = read_jsonl(source, videos)
    return checked(items)


def read_dataset(source: str | os.PathLike[str], format: str, **options: Any) -> Dataset:
    """All of `iterate_dataset` in memory; options and errors are the same."""
    return Dataset.collect(iterate_dataset(source, format, **options))


def _check_options(format: str, boxes: object, split: str | None, convention: str) -> None:
    if format not in FORMATS:
        raise SampleError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    if convention not in CONVENTIONS:
        raise SampleError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}.")
    if boxes is not None and format not in ("vidstg", "refcoco"):
        raise SampleError(f"boxes are a file of their own in vidstg and refcoco only, not in {format}.")
    if split is not None and format != "refcoco":
        raise SampleError(f"split is for refcoco only: {format} has a file for each.")
    if convention != "exact" and format not in ("vidstg", "hcstvg-v1", "hcstvg-v2"):
        raise SampleError(f"convention {convention!r} is for vidstg and hcstvg only, not for {format}.")


__all__ = [
    "CONVENTIONS",
    "FORMATS",
    "Convention",
    "Dataset",
    "Item",
    "Problem",
    "VidORBoxes",
    "iterate_dataset",
    "read_charades_sta",
    "read_dataset",
    "read_hcstvg_v1",
    "read_hcstvg_v2",
    "read_jsonl",
    "read_refcoco",
    "read_vidstg",
]
