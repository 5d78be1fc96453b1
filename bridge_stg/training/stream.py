"""Annotated datasets as one stream of training items: decoded when asked for, each a function of seed and place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from ..data.frame_sampling import clip_frames, frames_inside, sample_spatial_frames
from ..data.mixture import MixtureSampler
from ..data.sample import GroundingSample
from ..data.sample_store import SampleStore
from ..data.time_base import align_to_video
from ..data.video import decode_frames, probe
from ..errors import SampleError, VideoError
from ..models.processing_bridge_stg import BridgeSTGProcessor, answer_text
from .batching import ClipShape

TEXT_TOKENS = 64  # prompt, sentence and answer
GROUP_TOKENS = 9  # vision start and end, and the time as text


class GroundingStream(Dataset):
    """Place i of a mixture of datasets, decoded; what `collate_grounding` takes.

    All four tasks: a tube, an interval without boxes, a box in an image, an answer without either. What a sample does
    not say is marked as unknown, so that the losses for it are absent. A clip is the sample's segment or the whole
    video; times count from its start.

    A sample that cannot be used (a video that is missing or broken, an event outside it, a frame size that is not that
    of the annotation) gives its place to the next one of its dataset and frame size, and is written down once.

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
        processor = self.processor
        seconds = (store.frames - 1) / store.rates
        frames = np.minimum(np.floor(seconds * processor.fps + 1e-6).astype(np.int64) + 1, store.frames)
        size = processor.temporal_patch_size
        return -(-np.minimum(frames, processor.max_frames - processor.max_frames % size) // size)

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
                return [self._item(sample, tuple(self._grids[name][index]), place)]
            except (VideoError, SampleError) as error:
                reason = str(error)
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
        descriptor = os.open(self.skipped, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (json.dumps(record, ensure_ascii=False) + "\n").encode())
        finally:
            os.close(descriptor)

    def _item(self, sample: GroundingSample, grid: tuple[int, ...], place: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 2, place])
        info = probe(sample.video)
        if self._grid(info.height, info.width) != grid:
            raise SampleError(
                f"{sample.video} is {info.width} x {info.height} pixels, annotated as {sample.width} x {sample.height}."
            )
        aligned = align_to_video(sample, info)
        if sample.task == "referring" and info.frame_count > 1:  # one annotated frame of a video
            first = min(aligned.boxes, default=0)
            index, times, duration = np.array([first]), np.zeros(1), 0.0
        else:
            index, times, duration = clip_frames(info, aligned.segment, self.processor.fps, self.processor.max_frames)
        item: dict[str, Any] = {
            "frames": decode_frames(info, index).numpy(),
            "times": times.tolist(),
            "sentence": sample.sentence,
            "boxes": _boxes(aligned, index),
            "interval": None,
            "answer": sample.answer if sample.task == "qa" else None,
            "hide_answer": bool(rng.random() < self.answer_dropout),
            "frame_index": np.full(self.spatial_frames, -1, dtype=np.int64),
        }
        if sample.task in ("referring", "qa"):
            item["frame_index"][0] = 0
            if sample.task == "qa":
                item["boxes"][:] = np.nan
            elif np.isnan(item["boxes"]).any():
                raise SampleError(f"{sample.id} has no box, which task referring needs.")
            return item
        if aligned.interval is None:
            raise SampleError(f"{sample.id} has no interval, which task {sample.task} needs.")
        begin = float(info.times[aligned.segment[0]]) if aligned.segment else 0.0
        start, end = (min(max(edge - begin, 0.0), duration) for edge in aligned.interval)
        if start >= end:
            raise SampleError(
                f"the event from {aligned.interval[0]:.2f} s to {aligned.interval[1]:.2f} s lies outside the clip, "
                f"{begin:.2f} s to {begin + duration:.2f} s of {sample.video}."
            )
        inside = frames_inside(times, (start, end))
        item["interval"] = (int(inside[0]), int(inside[-1]) + 1)
        item["answer"] = answer_text((start, end))
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
