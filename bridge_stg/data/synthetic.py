"""SyntheticTubes: a seeded benchmark of moving objects with exact tubes, in memory or as files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..files import ensure_writable_folder
from .render import Background, render_scene
from .sample import Box, GroundingSample, write_samples
from .scene import EVENT_FRAMES, SPLITS, TIERS, Scene, sample_image_scene, sample_scene
from .video import probe
from .video_writer import write_video


@dataclass(frozen=True)
class SyntheticClip(Scene):
    """One clip (or, with one frame and no event, one picture) as a description; pixels come from `render`.

    Attributes:
        background: what lies behind the objects.
        frame_count, fps: length and rate.
        size: native (h, w) in pixels, in which objects are round and `sample` gives its boxes.
    """

    background: Background
    frame_count: int
    fps: float
    size: tuple[int, int]

    @property
    def interval(self) -> tuple[float, float] | None:
        """The event in seconds, end exclusive."""
        if self.interval_frames is None:
            return None
        return self.interval_frames[0] / self.fps, self.interval_frames[1] / self.fps

    def render(self, size: tuple[int, int] | None = None, frames: Sequence[int] | None = None) -> np.ndarray:
        """Draw the clip, or only `frames`, as uint8 `[T, H, W, 3]` RGB at `size` (h, w; default native)."""
        wanted = list(range(self.frame_count)) if frames is None else [int(f) for f in frames]
        if any(not 0 <= f < self.frame_count for f in wanted):
            raise ValueError(f"frames must be in 0..{self.frame_count - 1}, got {wanted}")
        return render_scene(self.objects, self.background, self.size, size or self.size, wanted, self.fps)

    def boxes(self, normalised: bool = True) -> np.ndarray:
        """Exact boxes of the target, float32 `[frame_count, 4]` xyxy: in [0, 1], or in native pixels."""
        boxes = self.objects[self.target].boxes(self.size)
        if not normalised:
            height, width = self.size
            boxes = boxes * np.array([width, height, width, height])
        return boxes.astype(np.float32)

    def sample(self, id: str, video: str) -> GroundingSample:
        """The clip's annotation; boxes of all frames, also outside the event."""
        height, width = self.size
        boxes: dict[int, Box] = {}
        for frame, box in enumerate(self.boxes(normalised=False)):
            x1, y1, x2, y2 = (round(float(v), 3) for v in box)
            boxes[frame] = (x1, y1, x2, y2)
        return GroundingSample(
            id=id,
            video=video,
            sentence=self.sentence,
            width=width,
            height=height,
            fps=self.fps,
            frame_count=self.frame_count,
            task="referring" if self.interval_frames is None else "stvg",
            sentence_type=self.sentence_type,
            interval=self.interval,
            boxes=boxes,
            tier=self.tier,
        )


class _Synthetic(Dataset[SyntheticClip]):
    """Clips that are drawn from a seed; item i is a pure function of (seed, split, i) and the arguments."""

    kind: int  # a number of its own for every kind of clip, so that no two of them draw the same

    def __init__(
        self, split: str, seed: int, count: int, size: tuple[int, int], backgrounds: Sequence[str | os.PathLike[str]]
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if len(size) != 2 or min(size) < 16:
            raise ValueError(f"size must be (height, width) of at least 16 pixels each, got {size}")
        self.split, self.seed, self.count, self.size = split, seed, count, size
        self.backgrounds = tuple(os.fspath(path) for path in backgrounds)
        for path in self.backgrounds:
            probe(path)

    def __len__(self) -> int:
        return self.count

    def _rng(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.count:
            raise IndexError(f"index must be in 0..{self.count - 1}, got {index}")
        return np.random.default_rng(np.random.SeedSequence([self.seed, SPLITS.index(self.split), index, self.kind]))

    def _clip(self, scene: Scene, rng: np.random.Generator, frame_count: int, fps: float) -> SyntheticClip:
        background = Background(seed=int(rng.integers(1 << 31)))
        if self.backgrounds:
            video = self.backgrounds[int(rng.integers(len(self.backgrounds)))]
            background = replace(background, video=video, offset=float(rng.random()))
        return SyntheticClip(**vars(scene), background=background, frame_count=frame_count, fps=fps, size=self.size)


class SyntheticTubes(_Synthetic):
    """Video clips with one event each; item i is a pure function of (seed, split, i) and these arguments.

    Args:
        split: "train", "val" or "test". The target's (colour, shape, motion) comes from the split's own set,
            and in train no object ever performs a triple of the other two.
        seed: non-negative; other seeds give other clips of the same split.
        count: length; any index below it can be read in any order.
        tiers: a sequence is cycled through (equal shares); a mapping gives weights, drawn per clip.
        frame_count, fps: length (at least 5 frames) and rate.
        size: native (h, w).
        backgrounds: real videos to play behind the objects; empty means procedural backgrounds.

    Raises:
        ValueError: an argument is out of its range.
        VideoError: a background is not a readable video.
    """

    kind = 0

    def __init__(
        self,
        split: str = "train",
        *,
        seed: int = 0,
        count: int = 1000,
        tiers: Sequence[str] | Mapping[str, float] = TIERS,
        frame_count: int = 24,
        fps: float = 4.0,
        size: tuple[int, int] = (128, 128),
        backgrounds: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        super().__init__(split, seed, count, size, backgrounds)
        if frame_count <= EVENT_FRAMES[0]:
            raise ValueError(f"frame_count must be at least {EVENT_FRAMES[0] + 1}, got {frame_count}")
        if not fps > 0:
            raise ValueError(f"fps must be positive, got {fps}")
        unknown = [tier for tier in tiers if tier not in TIERS]
        if unknown or not tiers:
            raise ValueError(f"tiers must be some of {', '.join(TIERS)}, got {list(tiers)}")
        self.tiers = tuple(tiers)
        self._weights: np.ndarray | None = None
        if isinstance(tiers, Mapping):
            weights = np.array(list(tiers.values()), dtype=np.float64)
            if (weights < 0).any() or not weights.sum() > 0:
                raise ValueError(f"tier weights must be non-negative with a positive sum, got {dict(tiers)}")
            self._weights = weights / weights.sum()
        self.frame_count, self.fps = frame_count, float(fps)

    def __getitem__(self, index: int) -> SyntheticClip:
        rng = self._rng(index)
        if self._weights is None:
            tier = self.tiers[index % len(self.tiers)]
        else:
            tier = self.tiers[int(np.searchsorted(np.cumsum(self._weights), rng.random(), side="right"))]
        scene = sample_scene(rng, self.split, tier, self.frame_count, self.size)
        return self._clip(scene, rng, self.frame_count, self.fps)


class SyntheticImages(_Synthetic):
    """Still pictures with a referring expression ("the red circle"); one-frame clips of tier "image".

    All (colour, shape) pairs occur in every split; no other object looks like the target.
    Arguments as in `SyntheticTubes`.
    """

    kind = 1

    def __init__(
        self,
        split: str = "train",
        *,
        seed: int = 0,
        count: int = 1000,
        size: tuple[int, int] = (128, 128),
        backgrounds: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        super().__init__(split, seed, count, size, backgrounds)

    def __getitem__(self, index: int) -> SyntheticClip:
        rng = self._rng(index)
        return self._clip(sample_image_scene(rng, self.size), rng, frame_count=1, fps=1.0)


def write_split(
    folder: str | os.PathLike[str],
    split: str,
    count: int,
    seed: int,
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Path:
    """Write `count` clips as `folder/clips/<id>.mp4` (H.264) and, last, `folder/<split>.jsonl`; every file is whole.

    Args:
        split, count, seed, options: of `SyntheticTubes`; both sides of `size` must be even.
        progress: called with (clips done, count) after each clip.

    Returns:
        the path of the JSON Lines file.

    Raises:
        ValueError: an argument is out of its range; a side of `size` is odd.
        OutputError: the folder cannot be written.
    """
    tubes = SyntheticTubes(split, seed=seed, count=count, **options)
    if any(side % 2 for side in tubes.size):
        raise ValueError(f"size must be even for H.264 with 4:2:0 colour, got {tubes.size}")
    folder = Path(folder)
    ensure_writable_folder(folder / "clips")
    samples = []
    for index in range(count):
        clip = tubes[index]
        name = f"{split}-{seed}-{index:06d}"
        path = folder / "clips" / f"{name}.mp4"
        write_video(path, clip.render(), fps=tubes.fps)
        samples.append(clip.sample(name, str(path)))
        if progress is not None:
            progress(index + 1, count)
    annotations = folder / f"{split}.jsonl"
    write_samples(annotations, samples)
    return annotations
