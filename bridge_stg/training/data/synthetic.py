"""The synthetic multi-task curriculum: phases of batches, each batch of one task, all of it a function of the seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from ...data.frame_sampling import sample_spatial_frames
from ...data.scene import IMAGE_TIER, MOTION_QUESTION, STILL, TIERS
from ...data.synthetic import SyntheticClip, SyntheticImages, SyntheticTubes
from ...errors import ConfigError
from ...models.processing_bridge_stg import answer_text

SNIPPET = "snippet"
QUESTION = "question"
_ENDLESS = 1 << 40


@dataclass(frozen=True)
class Phase:
    """Batches of one mixture.

    Attributes:
        steps: how many; the last phase goes on for as long as the training does.
        mix: weight per tier of SyntheticTubes; `image` is the referring task on single images, `snippet` two frames
            of a clip of any tier, inside its event or outside, `question` two frames of a moving object and the
            question where it moves: motion is learnt from them at the price of an image.
    """

    steps: int
    mix: Mapping[str, float]

    def __post_init__(self) -> None:
        allowed = (IMAGE_TIER, SNIPPET, QUESTION, *TIERS)
        if unknown := set(self.mix) - set(allowed):
            raise ConfigError(f"A phase mixes {', '.join(allowed)}; {sorted(unknown)[0]!r} is none of them.")
        if self.steps < 1 or min(self.mix.values(), default=0) < 0 or sum(self.mix.values()) <= 0:
            raise ConfigError(f"A phase needs steps >= 1 and positive weights, got {self.steps} and {dict(self.mix)}.")


class SyntheticCurriculum(Dataset):
    """Item i is the sample at place i % batch_size of batch i // batch_size; a batch holds images, snippets or clips.

    Args:
        phases: in order.
        batch_size: clips a batch.
        images_per_clip: a place of an image or snippet batch holds that many of them; they cost that much less.
        spatial_frames: S, frames the spatial decoder sees in training.
        frame_size: (h, w) rendered.
        answer_dropout: share of clips whose answer the bridging tokens do not see.
        seed: of everything.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        *,
        batch_size: int,
        images_per_clip: int = 4,
        spatial_frames: int = 12,
        positive_ratio: float = 0.5,
        negatives: Literal["uniform", "boundary"] = "uniform",
        frame_size: tuple[int, int] = (64, 64),
        answer_dropout: float = 0.4,
        seed: int = 0,
        length: int = 1_000_000,
    ) -> None:
        if not phases:
            raise ConfigError("The curriculum must have at least one phase, got none.")
        self.phases = tuple(phases)
        self.batch_size = batch_size
        self.images_per_clip = images_per_clip
        self.spatial_frames = spatial_frames
        self.positive_ratio = positive_ratio
        self.negatives = negatives
        self.frame_size = frame_size
        self.answer_dropout = answer_dropout
        self.seed = seed
        self.length = length
        options: dict[str, Any] = {"seed": seed, "count": _ENDLESS, "size": frame_size}
        self.sources = {tier: SyntheticTubes("train", tiers=(tier,), **options) for tier in TIERS}
        self.images = SyntheticImages("train", **options)

    def __len__(self) -> int:
        return self.length

    def phase_at(self, batch: int) -> Phase:
        for phase in self.phases:
            if batch < phase.steps:
                return phase
            batch -= phase.steps
        return self.phases[-1]

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        batch = index // self.batch_size
        mix = self.phase_at(batch).mix
        clips = {tier: weight for tier, weight in mix.items() if tier in TIERS}
        kinds = {
            IMAGE_TIER: mix.get(IMAGE_TIER, 0.0),
            SNIPPET: mix.get(SNIPPET, 0.0),
            QUESTION: mix.get(QUESTION, 0.0),
            "clip": sum(clips.values()),
        }
        kind = _draw(np.random.default_rng([self.seed, 1, batch]), kinds)  # the same for every place of the batch
        rng = np.random.default_rng([self.seed, 2, index])
        if kind == "clip":
            return [self._item(self.sources[_draw(rng, clips)][index], rng)]
        places = range(index * self.images_per_clip, (index + 1) * self.images_per_clip)
        if kind == IMAGE_TIER:
            return [self._item(self.images[i], rng) for i in places]
        if kind == QUESTION:
            sources = [self.sources[tier] for tier in ("single", "distractors")]
            return [self._question(sources[i % 2][i], rng) for i in places]
        return [self._snippet(self.sources[TIERS[i % len(TIERS)]][i], rng) for i in places]

    def _snippet(self, clip: SyntheticClip, rng: np.random.Generator) -> dict[str, Any]:
        """Two neighbouring frames, both inside the event or both outside; no answer text."""
        assert clip.interval_frames is not None
        start, end = clip.interval_frames
        inside = (np.arange(clip.frame_count) >= start) & (np.arange(clip.frame_count) < end)
        wanted = bool(rng.random() < self.positive_ratio)
        first = int(rng.choice(np.flatnonzero((inside[:-1] == wanted) & (inside[1:] == wanted))))
        return self._pair(clip, first) | {"sentence": clip.sentence, "interval": (0, 2) if wanted else (0, 0)}

    def _question(self, clip: SyntheticClip, rng: np.random.Generator) -> dict[str, Any]:
        """Two neighbouring frames between which the target moves; the answer is where to."""
        target = clip.objects[clip.target]
        motions = np.array(target.motions)
        first = int(rng.choice(np.flatnonzero(motions[1:] != STILL)))
        sentence = MOTION_QUESTION.format(color=target.color, shape=target.shape)
        return self._pair(clip, first) | {"sentence": sentence, "answer": f"{motions[first + 1]}."}

    def _pair(self, clip: SyntheticClip, first: int) -> dict[str, Any]:
        frames = [first, first + 1]
        return {
            "frames": clip.render(self.frame_size, frames),
            "times": [frame / clip.fps for frame in frames],
            "boxes": np.asarray(clip.boxes(), dtype=np.float32)[frames],
            "interval": None,
            "answer": None,
            "frame_index": np.arange(2),
            "hide_answer": False,
        }

    def _item(self, clip: SyntheticClip, rng: np.random.Generator) -> dict[str, Any]:
        frames = clip.render(self.frame_size)
        boxes = np.asarray(clip.boxes(), dtype=np.float32)
        times = [i / clip.fps for i in range(clip.frame_count)]
        item: dict[str, Any] = {
            "frames": frames,
            "times": times,
            "sentence": clip.sentence,
            "boxes": boxes,
            "interval": None,
            "answer": None,
            "hide_answer": bool(rng.random() < self.answer_dropout),
        }
        if clip.tier == IMAGE_TIER:
            item["frame_index"] = np.zeros(1, dtype=np.int64)
            return item
        assert clip.interval_frames is not None
        start, end = clip.interval_frames
        item["interval"] = (start, end)
        item["answer"] = answer_text((start / clip.fps, end / clip.fps))
        item["frame_index"] = sample_spatial_frames(
            clip.frame_count,
            (start, end),
            self.spatial_frames,
            positive_ratio=self.positive_ratio,
            negatives=self.negatives,
            rng=rng,
        )
        return item


def _draw(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    share = np.array(list(weights.values()), dtype=float)
    return list(weights)[int(rng.choice(len(share), p=share / share.sum()))]


def collate_grounding(groups: Sequence[list[dict[str, Any]]], processor: Any) -> dict[str, Any]:
    """A batch for `BridgeSTGTrainer`: the processor's inputs, the frames to decode, and their labels.

    Takes lists of items and flattens them. An item holds `frames` uint8 `[T, H, W, 3]`, `times` (T seconds),
    `sentence`, `boxes` `[T, 4]` xyxy in [0, 1] (NaN where unknown), `interval` (frames; None when unknown, empty when
    the event is not there), `answer` (text or None), `frame_index` `[S]`, `hide_answer`.
    """
    items = [item for group in groups for item in group]
    features = processor(
        [item["frames"] for item in items],
        [item["times"] for item in items],
        [item["sentence"] for item in items],
        [item["answer"] for item in items],
        training=True,
    )
    hide = torch.tensor([item["hide_answer"] for item in items])
    answer_tokens = features.pop("answer_tokens")
    batch: dict[str, Any] = dict(features)
    batch["hidden_answer"] = answer_tokens & hide[:, None]
    frame_index = torch.from_numpy(np.stack([item["frame_index"] for item in items]))
    batch["frame_index"] = frame_index
    frame_count = batch["frame_times"].shape[1]
    positions = torch.arange(frame_count)
    intervals = torch.tensor([item["interval"] or (0, frame_count) for item in items])
    inside = (positions >= intervals[:, :1]) & (positions < intervals[:, 1:])  # [B, T]
    boxes = torch.stack([_padded_boxes(item["boxes"], frame_count) for item in items])
    chosen = boxes.gather(1, frame_index.clamp(min=0)[..., None].expand(-1, -1, 4))
    present = inside.gather(1, frame_index.clamp(min=0)) & (frame_index >= 0)
    known = ~chosen.isnan().any(-1)
    has_interval = torch.tensor([item["interval"] is not None for item in items])
    batch["targets"] = {
        "boxes": torch.nan_to_num(chosen),
        "has_box": present & known,
        "present": present,
        "has_presence": (frame_index >= 0) & has_interval[:, None],
        "inside": inside,
        "has_interval": has_interval,
    }
    return batch


def _padded_boxes(boxes: np.ndarray, frame_count: int) -> torch.Tensor:
    """xyxy `[T, 4]` to cxcywh `[frame_count, 4]`; the last frame repeats."""
    low, high = boxes[:, :2], boxes[:, 2:]
    converted = np.concatenate([(low + high) / 2, high - low], axis=1)
    index = np.minimum(np.arange(frame_count), len(boxes) - 1)
    return torch.from_numpy(converted[index])
