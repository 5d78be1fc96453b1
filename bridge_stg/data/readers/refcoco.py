"""RefCOCO, RefCOCO+ and RefCOCOg: `refs(<by>).p` or the same as JSON, with `instances.json` for the boxes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import SampleError
from ..jsonl import repeated_id, unreadable
from ..sample import GroundingSample
from ..values import is_key, shown
from .reading import Item, Problem, VideoFolder, attempt, corners, load_json, require, unknown_keys
from .unpickling import load_plain_pickle

_NEEDED = ("ref_id", "ann_id", "image_id", "split", "sentences")
_KNOWN = frozenset((*_NEEDED, "file_name", "category_id", "sent_ids"))


def read_refcoco(
    refs: str | os.PathLike[str],
    instances: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    split: str | None = None,
) -> Iterator[Item]:
    """One sample of task "referring" a sentence: an image is a video of one frame, with one box.

    A sample's id is `<ref_id>-<sent_id>`. Pickles are read as data only (see `load_plain_pickle`).

    Args:
        refs: `refs(unc).p`, `refs(google).p`, `refs(umd).p`, a JSON array of the same records, or a folder with one
            such file.
        instances: COCO annotations; None means `instances.json` beside `refs`.
        images: folder of the COCO images; None keeps their bare names.
        split: "train", "val", "testA", ...; None means all.

    Yields:
        samples, and a problem for each reference or sentence that is skipped or odd.

    Raises:
        SampleError: a file is missing, broken or of another kind, or no reference has the split.
    """
    path = _find_refs(Path(refs))
    records = load_json(path, list, "references") if path.suffix == ".json" else load_plain_pickle(path)
    if not isinstance(records, list):
        raise SampleError(f"{path} must hold a list of references, got {type(records).__name__}.")
    coco_path = Path(instances) if instances is not None else path.with_name("instances.json")
    coco = require(load_json(coco_path, dict, "COCO instances"), ("images", "annotations"), str(coco_path))
    pictures: dict[Any, Mapping[str, Any]] = {}
    annotations: dict[Any, Mapping[str, Any]] = {}
    for key, table in (("images", pictures), ("annotations", annotations)):
        yield from _fill(table, coco[key], key, coco_path)
    if split is not None:
        chosen = [record for record in records if isinstance(record, Mapping) and record.get("split") == split]
        if not chosen:
            named = (record.get("split") for record in records if isinstance(record, Mapping))
            found = sorted({name for name in named if isinstance(name, str)})
            raise SampleError(f"split must be one of {', '.join(found)} in {path}, got {split!r}.")
        records = chosen
    folder = VideoFolder(images)
    for number, record in enumerate(records):
        name = f"reference {number}"
        yield from unknown_keys(name, record, _KNOWN)
        try:
            record = require(record, _NEEDED, "a reference")
            if not is_key(record["ref_id"]):
                raise SampleError(f"ref_id of a reference must be a number or a text, got {shown(record['ref_id'])}.")
            name = str(record["ref_id"])
            picture, box = _look_up(record, pictures, annotations)
        except SampleError as error:
            yield Problem(name, str(error))
            continue
        if not isinstance(record["sentences"], list):
            yield Problem(name, f"sentences must be an array, got {type(record['sentences']).__name__}.")
            continue
        for index, sentence in enumerate(record["sentences"]):
            sent_id = sentence.get("sent_id", index) if isinstance(sentence, Mapping) else index
            if not is_key(sent_id):
                yield Problem(name, f"sent_id of sentence {index} must be a number or a text, got {shown(sent_id)}.")
                continue
            id = f"{name}-{sent_id}"
            yield attempt(id, partial(_sample, id, sentence, picture, box, folder))


def _find_refs(path: Path) -> Path:
    if not os.path.isdir(path):
        return path
    try:
        files = list(path.iterdir())
    except OSError as error:
        raise unreadable(path, "a folder of references", error) from error
    found = sorted(file for file in files if file.name.startswith("refs") and file.suffix in (".p", ".json"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise SampleError(f"{path} must hold one refs(...).p or refs*.json, found {names}; name the file itself.")
    return found[0]


def _fill(table: dict[Any, Mapping[str, Any]], entries: Any, key: str, path: Path) -> Iterator[Problem]:
    """Put the entries into the table by id; yields those that have none, or one that is taken."""
    if not isinstance(entries, list):
        raise SampleError(f"{key} of {path} must be an array of objects with an id, got {type(entries).__name__}.")
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not is_key(entry.get("id")):
            yield Problem(f"{key} {number}", f"it must be an object with a number or a text as id, got {shown(entry)}.")
        elif entry["id"] in table:
            yield Problem(f"{key} {number}", repeated_id(entry["id"]))
        else:
            table[entry["id"]] = entry


def _look_up(
    record: Mapping[str, Any],
    pictures: Mapping[Any, Mapping[str, Any]],
    annotations: Mapping[Any, Mapping[str, Any]],
) -> tuple[Mapping[str, Any], Any]:
    for key, table in (("image_id", pictures), ("ann_id", annotations)):
        if not is_key(record[key]) or record[key] not in table:
            raise SampleError(f"{key} {shown(record[key])} of a reference is not in the instances.")
    picture = require(pictures[record["image_id"]], ("file_name", "width", "height"), "an image of the instances")
    annotation = require(annotations[record["ann_id"]], ("bbox",), "an annotation of the instances")
    return picture, annotation["bbox"]


def _sample(id: str, sentence: Any, picture: Mapping[str, Any], box: Any, folder: VideoFolder) -> GroundingSample:
    text = require(sentence, ("sent",), "a sentence of a reference")["sent"]
    if not isinstance(picture["file_name"], str):
        raise SampleError(f"file_name of an image must be a text, got {shown(picture['file_name'])}.")
    return GroundingSample(
        id=id,
        video=folder.find(picture["file_name"]),
        sentence=text.strip() if isinstance(text, str) else text,
        width=picture["width"],
        height=picture["height"],
        fps=1.0,
        frame_count=1,
        task="referring",
        boxes={0: corners("bbox", box)},
    )
