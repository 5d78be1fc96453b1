"""Annotated datasets as one stream of training items: decoded when asked for, each a function of seed and place."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from ...data.frame_sampling import clip_frames, frames_inside, sample_spatial_frames
from ...data.mixture import MixtureSampler
from ...data.sample import GroundingSample
from ...data.sample_store import SampleStore
from ...data.time_base import align_to_video
from ...data.video import decode_frames, probe
from ...errors import OutputError, SampleError, reason_of
from ...files import ensure_writable_folder
from ...json_text import dump_json
from ...models.processing_bridge_stg import BridgeSTGProcessor, answer_text
from .batches import ClipShape

TEXT_TOKENS = 64  # prompt, sentence and answer
GROUP_TOKENS = 9  # vision start and end, and the time as text


class GroundingStream(Dataset):
    """Place i of a mixture of datasets, decoded; what `collate_grounding` takes.

    All four tasks: a tube, an interval without boxes, a box in an image, an answer without either. What a sample does
    not say is marked as unknown, so that the losses for it are absent. A clip is the sample's segment, or as much of
    the video as is annotated; times count from its start. It never has more frames than `shape` says.

    A sample that cannot be used (a video that is missing or broken, an event outside it, a frame size that is not that
    of the annotation, no label of its task, or whatever else happens to it) gives its place to the next one of its
    dataset and frame size, and is written down once.

    Args:
        stores: datasets by name.
        weights: share of each in the stream; None means by size.
        processor: says which frames the MLLM sees, and in which grid of patches.
        spatial_frames: S, frames the spatial decoder sees.
        positive_ratio, negatives: see `sample_spatial_frames`.
        answer_dropout: share of clips whose answer the bridging tokens do not see.
        seed: of everything.
        length: places.
        skipped: JSON Lines to which samples that cannot be used are appended; None writes nothing.

    Raises:
        SampleError: from an item: none of a hundred samples of its frame size can be used; from the constructor: the
            processor refuses a frame size.
        OutputError: `skipped` cannot be written.
        ValueError: weights that do not fit the datasets, see `MixtureSampler`.
    """

    def __init__(
        self,
        stores: Mapping[str, SampleStore],
        weights: Mapping[str, float] | None,
        processor: BridgeSTGProcessor,
        *,
        spatial_frames: int = 16,
        positive_ratio: float = 0.5,
        negatives: Literal["uniform", "boundary"] = "uniform",
        answer_dropout: float = 0.4,
        seed: int = 0,
        length: int = 1 << 40,
        skipped: str | os.PathLike[str] | None = None,
    ) -> None:
        self.stores = dict(stores)
        self.processor = processor
        self.spatial_frames = spatial_frames
        self.positive_ratio = positive_ratio
        self.negatives: Literal["uniform", "boundary"] = negatives
        self.answer_dropout = answer_dropout
        self.seed = seed
        self.length = length
        self.skipped = None if skipped is None else Path(skipped).absolute()
        if self.skipped is not None:
            ensure_writable_folder(self.skipped.parent)
        self._mixture = (
            {name: len(store) for name, store in self.stores.items()},
            None if weights is None else dict(weights),
        )
        self._sampler: MixtureSampler | None = None
        self._known: set[tuple[str, str]] = set()
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}
        self._grids = {name: self._grids_of(store) for name, store in self.stores.items()}
        self._groups = {name: self._group_counts(store) for name, store in self.stores.items()}
        self.pick(0)  # a mistake in the weights must not wait for a loader process

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        if (height, width) not in self._sizes:
            self._sizes[height, width] = self.processor.frame_grid(height, width)
        return self._sizes[height, width]

    def _grids_of(self, store: SampleStore) -> np.ndarray:
        """int64 `[n, 2]`, (rows, columns) of patches of every sample's frames."""
        sizes = np.stack([store.heights, store.widths], axis=1)
        distinct, inverse = np.unique(sizes, axis=0, return_inverse=True)
        return np.array([self._grid(int(h), int(w)) for h, w in distinct], dtype=np.int64)[inverse.reshape(-1)]

    def _group_counts(self, store: SampleStore) -> np.ndarray:
        """int64 `[n]`, temporal patch groups of every clip."""
        processor, size = self.processor, self.processor.temporal_patch_size
        seconds = (store.frames - 1) / store.rates
        wanted = np.floor(seconds * processor.fps + 1e-6) + 1  # float: with a rate near 0 it is beyond any integer
        most = processor.max_frames - processor.max_frames % size
        return -(-np.minimum(np.minimum(wanted, store.frames), most).astype(np.int64) // size)

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sampler": None}

    def pick(self, place: int) -> tuple[str, int]:
        """The dataset and the number of the sample at a place."""
        if self._sampler is None:
            sizes, weights = self._mixture
            self._sampler = MixtureSampler(sizes, weights, seed=self.seed)
        return self._sampler.pick(place)

    def shape(self, place: int) -> ClipShape:
        """What the clip at a place costs, from its annotation alone."""
        name, index = self.pick(place)
        rows, columns = (int(side) for side in self._grids[name][index])
        groups = int(self._groups[name][index])
        visual = groups * (rows * columns // self.processor.merge_size**2 + GROUP_TOKENS)
        return ClipShape((rows, columns), visual + TEXT_TOKENS + self.processor.bridge_tokens)

    def __getitem__(self, place: int) -> list[dict[str, Any]]:
        name, wanted = self.pick(place)
        for index in self._candidates(name, wanted):
            sample = self.stores[name][index]
            try:
                return [self._item(sample, tuple(self._grids[name][index]), int(self._groups[name][index]), place)]
            except Exception as error:  # of whatever kind: it is this sample's, and must not end the run
                reason = reason_of(error, sample.id)
            self._write_down(name, sample, reason)
        raise SampleError(f"No sample of {name} of one frame size can be used; the last one, {sample.id}: {reason}")

    def _candidates(self, name: str, wanted: int) -> Iterator[int]:
        """The sample itself, then those behind it that fit the same batch."""
        yield wanted
        alike = (self._grids[name] == self._grids[name][wanted]).all(1)
        alike &= self._groups[name] <= self._groups[name][wanted]
        others = np.flatnonzero(alike)
        others = np.roll(others, -int(np.searchsorted(others, wanted, side="right")))
        yield from others[others != wanted][:99].tolist()

    def _write_down(self, name: str, sample: GroundingSample, reason: str) -> None:
        if self.skipped is None or (name, sample.id) in self._known:
            return
        self._known.add((name, sample.id))
        record = {"source": name, "id": sample.id, "video": sample.video, "reason": reason}
        try:
            descriptor = os.open(self.skipped, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:  # one write a line: processes share the file
                os.write(descriptor, (dump_json(record) + "\n").encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OutputError(f"{self.skipped} cannot be written: {error.strerror or error}.") from error

    def _item(self, sample: GroundingSample, grid: tuple[int, ...], groups: int, place: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 2, place])
        info = probe(sample.video)
        if self._grid(info.height, info.width) != grid:
            raise SampleError(
                f"{sample.video} is {info.width} x {info.height} pixels, annotated as {sample.width} x {sample.height}."
            )
        annotated = sample.segment or (0, sample.frame_count)
        aligned = align_to_video(replace(sample, segment=annotated), info)
        if sample.task == "referring":
            index, times, duration = np.array([min(aligned.boxes, default=0)]), np.zeros(1), 0.0
        else:
            most = min(self.processor.max_frames, groups * self.processor.temporal_patch_size)
            index, times, duration = clip_frames(info, aligned.segment, self.processor.fps, most)
        item: dict[str, Any] = {
            "frames": decode_frames(info, index).numpy(),
            "times": times.tolist(),
            "sentence": sample.sentence,
            "boxes": _boxes(aligned, index),
            "interval": None,
            "answer": None,
            "hide_answer": bool(rng.random() < self.answer_dropout),
            "frame_index": np.full(self.spatial_frames, -1, dtype=np.int64),
        }
        if sample.task in ("referring", "qa"):
            item["frame_index"][0] = 0
            if sample.task == "qa":
                item["boxes"][:] = np.nan
                item["answer"] = _plain(sample)
            elif np.isnan(item["boxes"]).any():
                raise SampleError(f"{sample.id} has no box, which task referring needs.")
            return item
        if aligned.interval is None:
            raise SampleError(f"{sample.id} has no interval, which task {sample.task} needs.")
        assert aligned.segment is not None
        begin = float(info.times[aligned.segment[0]])
        start, end = (min(max(edge - begin, 0.0), duration) for edge in aligned.interval)
        if start >= end:
            raise SampleError(
                f"the event from {aligned.interval[0]:.2f} s to {aligned.interval[1]:.2f} s lies outside the clip, "
                f"{begin:.2f} s to {begin + duration:.2f} s of {sample.video}."
            )
        inside = frames_inside(times, (start, end))
        item["interval"] = (int(inside[0]), int(inside[-1]) + 1)
        if sample.task == "temporal":
            item["boxes"][:] = np.nan
        item["answer"] = answer_text(_readable(start, end))
        item["frame_index"] = sample_spatial_frames(
            len(times),
            item["interval"],
            self.spatial_frames,
            positive_ratio=self.positive_ratio,
            negatives=self.negatives,
            rng=rng,
        )
        return item


def _boxes(sample: GroundingSample, index: np.ndarray) -> np.ndarray:
    """Boxes of frames, float32 `[n, 4]` xyxy in [0, 1]; NaN where there is none."""
    unknown = (np.nan,) * 4
    boxes = np.array([sample.boxes.get(frame, unknown) for frame in index.tolist()], dtype=np.float32)
    return (boxes / np.array([sample.width, sample.height] * 2, dtype=np.float32)).clip(0, 1)


def _plain(sample: GroundingSample) -> str:
    """The answer of a question; like a sentence, it cannot write special tokens."""
    text = " ".join((sample.answer or "").split())
    if not text:
        raise SampleError(f"{sample.id} has no answer, which task qa needs.")
    return text.replace("<|", "< |")


def _readable(start: float, end: float) -> tuple[float, float]:
    """An event too short for two different times of one decimal becomes the tenth of a second that it begins in."""
    if f"{start:.1f}" != f"{end:.1f}":
        return start, end
    tenth = math.floor(start * 10 + 1e-6)
    return tenth / 10, (tenth + 1) / 10
