"""The synthetic curriculum: phases of batches, each batch of one task, all of it a function of the seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ...data.scene import IMAGE_TIER, MOTION_QUESTION, STILL, TIERS
from ...data.synthetic import SyntheticClip, SyntheticImages, SyntheticTubes
from ...errors import ConfigError
from ...models.processing_bridge_stg import answer_text
from .item import ItemOptions, TrainingItem

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


class SyntheticCurriculum(Dataset[list[TrainingItem]]):
    """A curriculum of synthetic clips: item i is at place i % batch_size of batch i // batch_size.

    All of a batch are images, snippets, questions or clips.

    Args:
        phases: in order.
        batch_size: clips a batch.
        images_per_clip: a place of an image or snippet batch holds that many of them; they cost that much less.
        options: what is drawn for every clip.
        frame_size: (h, w) rendered.
        seed: of everything.
        length: places.

    Raises:
        ConfigError: there is no phase.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        *,
        batch_size: int,
        images_per_clip: int = 4,
        options: ItemOptions | None = None,
        frame_size: tuple[int, int] = (64, 64),
        seed: int = 0,
        length: int = 1_000_000,
    ) -> None:
        if not phases:
            raise ConfigError("The curriculum must have at least one phase, got none.")
        self.phases = tuple(phases)
        self.batch_size = batch_size
        self.images_per_clip = images_per_clip
        self.options = options or ItemOptions()
        self.frame_size = frame_size
        self.seed = seed
        self.length = length
        endless: dict[str, Any] = {"seed": seed, "count": _ENDLESS, "size": frame_size}
        self.sources = {tier: SyntheticTubes("train", tiers=(tier,), **endless) for tier in TIERS}
        self.images = SyntheticImages("train", **endless)

    def __len__(self) -> int:
        return self.length

    def phase_at(self, batch: int) -> Phase:
        """The phase of a batch; the last one goes on."""
        for phase in self.phases:
            if batch < phase.steps:
                return phase
            batch -= phase.steps
        return self.phases[-1]

    def __getitem__(self, index: int) -> list[TrainingItem]:
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

    def _snippet(self, clip: SyntheticClip, rng: np.random.Generator) -> TrainingItem:
        """Two neighbouring frames, both inside the event or both outside; no answer text."""
        assert clip.interval_frames is not None
        start, end = clip.interval_frames
        inside = (np.arange(clip.frame_count) >= start) & (np.arange(clip.frame_count) < end)
        wanted = bool(rng.random() < self.options.positive_ratio)
        first = int(rng.choice(np.flatnonzero((inside[:-1] == wanted) & (inside[1:] == wanted))))
        return self._pair(clip, first, clip.sentence, interval=(0, 2) if wanted else (0, 0))

    def _question(self, clip: SyntheticClip, rng: np.random.Generator) -> TrainingItem:
        """Two neighbouring frames between which the target moves; the answer is where to."""
        target = clip.objects[clip.target]
        motions = np.array(target.motions)
        first = int(rng.choice(np.flatnonzero(motions[1:] != STILL)))
        sentence = MOTION_QUESTION.format(color=target.color, shape=target.shape)
        return self._pair(clip, first, sentence, answer=f"{motions[first + 1]}.")

    def _pair(self, clip: SyntheticClip, first: int, sentence: str, **known: Any) -> TrainingItem:
        """An item of two neighbouring frames; `known` is its interval or its answer."""
        frames = [first, first + 1]
        return TrainingItem(
            frames=clip.render(self.frame_size, frames),
            times=[frame / clip.fps for frame in frames],
            sentence=sentence,
            boxes=np.asarray(clip.boxes(), dtype=np.float32)[frames],
            frame_index=np.arange(2),
            **known,
        )

    def _item(self, clip: SyntheticClip, rng: np.random.Generator) -> TrainingItem:
        """The whole clip, or the image."""
        hide_answer = bool(rng.random() < self.options.answer_dropout)
        frame_index, interval, answer = np.zeros(1, dtype=np.int64), None, None
        if clip.tier != IMAGE_TIER:
            assert clip.interval_frames is not None
            start, end = interval = clip.interval_frames
            answer = answer_text((start / clip.fps, end / clip.fps))
            frame_index = self.options.draw_frame_index(clip.frame_count, interval, rng)
        return TrainingItem(
            frames=clip.render(self.frame_size),
            times=[i / clip.fps for i in range(clip.frame_count)],
            sentence=clip.sentence,
            boxes=np.asarray(clip.boxes(), dtype=np.float32),
            frame_index=frame_index,
            interval=interval,
            answer=answer,
            hide_answer=hide_answer,
        )


def _draw(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    share = np.array(list(weights.values()), dtype=float)
    return list(weights)[int(rng.choice(len(share), p=share / share.sum()))]
