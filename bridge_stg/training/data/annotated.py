"""Annotated datasets as one stream of training items, each decoded when asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from ...data.clip import Clip, load_clip
from ...data.frame_sampling import frames_inside
from ...data.mixture import MixtureSampler
from ...data.sample import GroundingSample
from ...data.sample_store import SampleStore
from ...data.time_base import align_to_video
from ...data.video import VideoInfo, probe
from ...errors import OutputError, SampleError, reason_of
from ...files import ensure_writable_folder
from ...json_text import dump_json
from ...models.processing_bridge_stg import BridgeSTGProcessor, answer_text
from .batches import ClipShape
from .item import ItemOptions, TrainingItem

TEXT_TOKENS = 64  # prompt, sentence and answer
GROUP_TOKENS = 9  # vision start and end, and the time as text


class GroundingStream(Dataset[list[TrainingItem]]):
    """A mixture of annotated datasets: the item at place i is a sample with its clip, for `collate_grounding`.

    A sample has one of four tasks: a tube, an interval without boxes, a box in an image, or an answer without either.
    What it does not say is marked as unknown, so that the losses for it are absent. Its clip is the sample's segment,
    or as much of the video as is annotated; times count from its start. It never has more frames than `shape` says.

    Where a sample cannot be used (its video is missing or broken, its event lies outside, its frame size is not that of
    the annotation, its task has no label, or anything else fails), the next sample of its dataset and frame size takes
    its place, and the reason is written down once.

    Args:
        stores: datasets by name.
        weights: share of each in the stream; None means by size.
        processor: decides which frames the MLLM sees, and in which grid of patches.
        options: what is drawn for every item.
        seed: of everything.
        length: places.
        skipped: JSON Lines to which samples that cannot be used are appended; None writes nothing.

    Raises:
        SampleError: an item has no sample that can be used among a hundred of one frame size; or, on construction, the
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
        options: ItemOptions | None = None,
        seed: int = 0,
        length: int = 1 << 40,
        skipped: str | os.PathLike[str] | None = None,
    ) -> None:
        self.stores = dict(stores)
        self.processor = processor
        self.options = options or ItemOptions()
        self.seed = seed
        self.length = length
        self.skipped = None if skipped is None else Path(skipped).absolute()
        if self.skipped is not None:
            ensure_writable_folder(self.skipped.parent)
        self.mixture = MixtureSampler({name: len(store) for name, store in self.stores.items()}, weights, seed=seed)
        self._known: set[tuple[str, str]] = set()
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}
        self._grids = {name: self._grids_of(store) for name, store in self.stores.items()}
        self._groups = {name: self._group_counts(store) for name, store in self.stores.items()}

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
        wanted = np.floor(seconds * processor.fps + 1e-6) + 1  # a float, as with a rate near 0 it is beyond any integer
        most = processor.max_frames - processor.max_frames % size
        return -(-np.minimum(np.minimum(wanted, store.frames), most).astype(np.int64) // size)

    def __len__(self) -> int:
        return self.length

    def shape(self, place: int) -> ClipShape:
        """The frame size and token count of the clip at a place, from its annotation alone."""
        name, index = self.mixture.pick(place)
        rows, columns = (int(side) for side in self._grids[name][index])
        groups = int(self._groups[name][index])
        visual = groups * (rows * columns // self.processor.merge_size**2 + GROUP_TOKENS)
        return ClipShape((rows, columns), visual + TEXT_TOKENS + self.processor.bridge_tokens)

    def __getitem__(self, place: int) -> list[TrainingItem]:
        name, wanted = self.mixture.pick(place)
        for index in self._candidates(name, wanted):
            sample = self.stores[name][index]
            try:
                return [self._item(sample, tuple(self._grids[name][index]), int(self._groups[name][index]), place)]
            except Exception as error:  # of any kind: it is the sample's, and must not end the run
                reason = reason_of(error, sample.id)
            self._write_down(name, sample, reason)
        raise SampleError(f"No sample of {name} of one frame size can be used; the last one, {sample.id}: {reason}")

    def _candidates(self, name: str, wanted: int) -> Iterator[int]:
        """Numbers of the wanted sample, then of those behind it that fit the same batch."""
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
            with open(self.skipped, "ab", buffering=0) as file:
                file.write((dump_json(record) + "\n").encode())  # one write a line, as several processes append
        except OSError as error:
            raise OutputError(f"{self.skipped} cannot be written: {error.strerror or error}.") from error

    def _item(self, sample: GroundingSample, grid: tuple[int, ...], groups: int, place: int) -> TrainingItem:
        rng = np.random.default_rng([self.seed, 2, place])
        info = probe(sample.video)
        if self._grid(info.height, info.width) != grid:
            raise SampleError(
                f"{sample.video} is {info.width} x {info.height} pixels, annotated as {sample.width} x {sample.height}."
            )
        aligned = align_to_video(replace(sample, segment=sample.segment or (0, sample.frame_count)), info)
        clip = self._load(aligned, info, groups)
        hide_answer = bool(rng.random() < self.options.answer_dropout)
        boxes = _boxes(aligned, clip.source_frames)
        interval = answer = None
        if sample.task in ("stvg", "temporal"):
            seconds = _event(aligned, clip)
            inside = frames_inside(clip.times, seconds)
            interval = int(inside[0]), int(inside[-1]) + 1
            answer = answer_text(_readable(*seconds))
            frame_index = self.options.draw_frame_index(len(clip.times), interval, rng)
        else:
            frame_index = np.full(self.options.spatial_frames, -1, dtype=np.int64)
            frame_index[0] = 0
        if sample.task == "qa":
            answer = _plain(sample)
        if sample.task in ("temporal", "qa"):
            boxes[:] = np.nan
        elif sample.task == "referring" and np.isnan(boxes).any():
            raise SampleError(f"{sample.id} has no box, which task referring needs.")
        return TrainingItem(
            frames=clip.frames.numpy(),
            times=clip.times.tolist(),
            sentence=sample.sentence,
            boxes=boxes,
            frame_index=frame_index,
            interval=interval,
            answer=answer,
            hide_answer=hide_answer,
        )

    def _load(self, aligned: GroundingSample, info: VideoInfo, groups: int) -> Clip:
        """The frame with the box for the task referring, else as much of the segment as fits `groups` patch groups."""
        if aligned.task == "referring":
            frame = min(aligned.boxes, default=0)
            return load_clip(info, segment=(frame, frame + 1), fps=self.processor.fps, max_frames=1, multiple=1)
        most = min(self.processor.max_frames, groups * self.processor.temporal_patch_size)
        return load_clip(info, segment=aligned.segment, fps=self.processor.fps, max_frames=most)


def _event(sample: GroundingSample, clip: Clip) -> tuple[float, float]:
    """When the event of an aligned sample begins and ends, in seconds from the clip's start.

    Raises:
        SampleError: the sample has no interval, or it lies outside the clip.
    """
    if sample.interval is None:
        raise SampleError(f"{sample.id} has no interval, which task {sample.task} needs.")
    start, end = (min(max(edge - clip.begin, 0.0), clip.duration) for edge in sample.interval)
    if start >= end:
        raise SampleError(
            f"the event from {sample.interval[0]:.2f} s to {sample.interval[1]:.2f} s lies outside the clip, "
            f"{clip.begin:.2f} s to {clip.begin + clip.duration:.2f} s of {sample.video}."
        )
    return start, end


def _boxes(sample: GroundingSample, index: np.ndarray) -> np.ndarray:
    """Boxes of frames, float32 `[n, 4]` xyxy in [0, 1]; NaN where there is none."""
    unknown = (np.nan,) * 4
    boxes = np.array([sample.boxes.get(frame, unknown) for frame in index.tolist()], dtype=np.float32)
    return (boxes / np.array([sample.width, sample.height] * 2, dtype=np.float32)).clip(0, 1)


def _plain(sample: GroundingSample) -> str:
    """The answer of a question on one line; like a sentence, it cannot write special tokens."""
    text = " ".join((sample.answer or "").split())
    if not text:
        raise SampleError(f"{sample.id} has no answer, which task qa needs.")
    return text.replace("<|", "< |")


def _readable(start: float, end: float) -> tuple[float, float]:
    """The event, or, where both times have the same decimal, the tenth of a second in which it begins."""
    if f"{start:.1f}" != f"{end:.1f}":
        return start, end
    tenth = math.floor(start * 10 + 1e-6)
    return tenth / 10, (tenth + 1) / 10
