"""Scenes of synthetic clips: looks, motions, the split of compositions, sentences and paths of objects.

Coordinates are normalised to [0, 1] in x and y. Everything is drawn from one `numpy.random.Generator`,
so that a clip is a pure function of its seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .sample import SentenceType

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 38, 38),
    "green": (38, 178, 58),
    "blue": (45, 85, 232),
    "yellow": (238, 212, 40),
    "purple": (160, 52, 205),
    "white": (238, 238, 238),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
MOTIONS = ("left", "right", "up", "down")
STILL = "still"
TIERS = ("single", "distractors", "twins", "interrogative")
IMAGE_TIER = "image"
SPLITS = ("train", "val", "test")

DIAMETER = (0.20, 0.32)  # of the shorter frame side
EVENT_FRAMES = (4, 10)
EVENT_SPEED = (0.04, 0.065)  # of the frame per frame
SEGMENT_FRAMES = (3, 8)
SEGMENT_SPEED = (0.03, 0.06)

_DIRECTION = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), STILL: (0, 0)}
_TO = {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"}
_PATH_TRIES = 24
_PLACE_TRIES = 6

DECLARATIVE = (
    "the {color} {shape} that moves {motion}",
    "the {color} {shape} moving {to}",
    "a {color} {shape} moves {to}",
    "find the {color} {shape} when it moves {motion}",
)
INTERROGATIVE = ("what moves {motion}?", "which object moves {to}?", "what is moving {motion}?")
REFERRING = ("the {color} {shape}", "find the {color} {shape}")
MOTION_QUESTION = "where does the {color} {shape} move?"

VOCABULARY: tuple[str, ...] = (
    *("a", "find", "is", "it", "moves", "moving", "object", "that", "the", "to", "what", "when", "which"),
    *("left", "right", "up", "down", "upwards", "downwards"),
    *COLORS,
    *SHAPES,
    *("where", "does", "move"),
)
"""Every word of every sentence, lower case; the only punctuation is the question mark."""

Composition = tuple[str, str, str]


def _split_compositions() -> dict[str, tuple[Composition, ...]]:
    """The fixed split of the 120 (colour, shape, motion) triples: 84 train, 12 val, 24 test.

    Balanced over motions; each (colour, shape) pair loses at most two of its four motions to val and test.
    """
    parts: dict[str, list[Composition]] = {split: [] for split in SPLITS}
    for c, color in enumerate(COLORS):
        for s, shape in enumerate(SHAPES):
            group = (c + s) % 5
            test = (c + 2 * s) % 4 if group != 0 else None
            val = (c + 2 * s + 1) % 4 if group in (0, 2) else None
            for m, motion in enumerate(MOTIONS):
                split = "test" if m == test else "val" if m == val else "train"
                parts[split].append((color, shape, motion))
    return {split: tuple(triples) for split, triples in parts.items()}


COMPOSITIONS: Mapping[str, tuple[Composition, ...]] = _split_compositions()
_LOOKS = tuple((color, shape) for color in COLORS for shape in SHAPES)
_TRAIN_TRIPLES = frozenset(COMPOSITIONS["train"])


def _unit_polygon(shape: str) -> np.ndarray:
    """Vertices `[P, 2]`, box centred at the origin, larger box side 1."""
    points: np.ndarray
    if shape == "circle":
        angle = np.linspace(0.0, 2 * np.pi, 48, endpoint=False)
        points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    elif shape == "square":
        points = np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
    elif shape == "triangle":
        points = np.array([(-1.0, 0.0), (0.0, -np.sqrt(3)), (1.0, 0.0)])
    elif shape == "star":
        angle = np.pi * np.arange(10) / 5 - np.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)[:, None]
        points = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    else:
        arm = np.array([(-0.34, -1.0), (0.34, -1.0), (0.34, -0.34)])
        quarter = np.array([(0.0, 1.0), (-1.0, 0.0)])
        points = np.concatenate([arm @ np.linalg.matrix_power(quarter, turn) for turn in range(4)])
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) / (high - low).max()


UNIT_POLYGONS: Mapping[str, np.ndarray] = {shape: _unit_polygon(shape) for shape in SHAPES}
HALF_EXTENT: Mapping[str, np.ndarray] = {shape: points.max(axis=0) for shape, points in UNIT_POLYGONS.items()}


@dataclass(frozen=True, eq=False)
class SceneObject:
    """One object of a clip.

    Attributes:
        color, shape: its look in words.
        rgb: the colour drawn, 0-255; the same for all objects of one colour in a clip.
        diameter: larger side of its box, relative to the shorter frame side.
        motions: its motion at each frame; the displacement from frame f - 1 to f belongs to frame f.
        centers: box centre at each frame, `[frame_count, 2]` float64, normalised (x, y).
    """

    color: str
    shape: str
    rgb: tuple[int, int, int]
    diameter: float
    motions: tuple[str, ...]
    centers: np.ndarray

    def half_size(self, size: tuple[int, int]) -> np.ndarray:
        """Half width and height of the box, normalised, in a frame of `size` (h, w)."""
        return half_size(self.shape, self.diameter, size)

    def boxes(self, size: tuple[int, int]) -> np.ndarray:
        """Exact boxes of the drawn polygon, `[frame_count, 4]` float64 xyxy, normalised."""
        half = self.half_size(size)
        return np.concatenate([self.centers - half, self.centers + half], axis=1).clip(0.0, 1.0)


def half_size(shape: str, diameter: float, size: tuple[int, int]) -> np.ndarray:
    """Half width and height of a `shape`'s box, normalised, in a frame of `size` (h, w)."""
    height, width = size
    return HALF_EXTENT[shape] * diameter * min(height, width) / np.array([width, height])


@dataclass(frozen=True)
class Scene:
    """What happens in a clip.

    Attributes:
        tier: one of `TIERS`, or "image".
        sentence, sentence_type: what to find, "declarative" or "interrogative".
        objects: in drawing order, the last one on top.
        target: index in `objects` of the one that the sentence means.
        interval_frames: frames [start, end) of the event; None for a picture.
    """

    tier: str
    sentence: str
    sentence_type: SentenceType
    objects: tuple[SceneObject, ...]
    target: int
    interval_frames: tuple[int, int] | None


def sample_scene(rng: np.random.Generator, split: str, tier: str, frame_count: int, size: tuple[int, int]) -> Scene:
    """Draw one clip of `tier`; in the train split no object ever performs a held-out triple."""
    builder = _SceneBuilder(rng, split, frame_count, size)
    triples = COMPOSITIONS[split]
    color, shape, motion = triples[rng.integers(len(triples))]
    interval = builder.random_interval()
    builder.add(color, shape, event=(motion, *interval), avoid=motion)
    if tier == "distractors":
        count = int(rng.integers(1, 3))
        performer = int(rng.integers(count)) if rng.random() < 0.5 else None
        for i in range(count):
            builder.add_similar(color, shape, motion, performs=i == performer)
    elif tier == "twins":
        builder.add(color, shape, avoid=motion)
        if rng.random() < 0.5:
            builder.add_similar(color, shape, motion, performs=rng.random() < 0.5)
    elif tier == "interrogative":
        for _ in range(rng.integers(1, 3)):
            builder.add(*_LOOKS[rng.integers(len(_LOOKS))], avoid=motion)
    templates = INTERROGATIVE if tier == "interrogative" else DECLARATIVE
    template = templates[rng.integers(len(templates))]
    sentence = template.format(color=color, shape=shape, motion=motion, to=_TO[motion])
    sentence_type: SentenceType = "interrogative" if tier == "interrogative" else "declarative"
    return builder.finish(tier, sentence, sentence_type, interval)


def sample_image_scene(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Draw one still picture with a referring expression and 0-3 distractors, none of the target's look."""
    builder = _SceneBuilder(rng, "val", 1, size)
    color, shape = _LOOKS[rng.integers(len(_LOOKS))]
    builder.add(color, shape)
    for _ in range(rng.integers(0, 4)):
        look = builder.similar_look(color, shape) if rng.random() < 0.8 else _LOOKS[rng.integers(len(_LOOKS))]
        if look != (color, shape):
            builder.add(*look)
    sentence = REFERRING[rng.integers(len(REFERRING))].format(color=color, shape=shape)
    return builder.finish(IMAGE_TIER, sentence, "declarative", None)


class _SceneBuilder:
    """Collects objects whose paths stay in view and, where a few tries allow it, do not cover each other."""

    def __init__(self, rng: np.random.Generator, split: str, frame_count: int, size: tuple[int, int]) -> None:
        self.rng = rng
        self.split = split
        self.frame_count = frame_count
        self.size = size
        self.palette: dict[str, tuple[int, int, int]] = {
            name: tuple(np.clip(np.array(rgb) + rng.integers(-12, 13, 3), 0, 255).tolist())
            for name, rgb in COLORS.items()
        }
        self.objects: list[SceneObject] = []

    def may_perform(self, look: tuple[str, str], motion: str) -> bool:
        return self.split != "train" or motion == STILL or (*look, motion) in _TRAIN_TRIPLES

    def random_interval(self) -> tuple[int, int]:
        """Frames [start, end) of an event, its length and then its start uniform."""
        length = int(self.rng.integers(EVENT_FRAMES[0], min(EVENT_FRAMES[1], self.frame_count - 1) + 1))
        start = int(self.rng.integers(0, self.frame_count - length + 1))
        return start, start + length

    def similar_look(self, color: str, shape: str, motion: str = STILL) -> tuple[str, str]:
        """A look that shares exactly one of colour and shape, and may perform `motion` in this split."""
        same_color = [(color, name) for name in SHAPES if name != shape]
        same_shape = [(name, shape) for name in COLORS if name != color]
        looks = same_color if self.rng.random() < 0.5 else same_shape
        looks = [look for look in looks if self.may_perform(look, motion)]
        return looks[self.rng.integers(len(looks))]

    def add_similar(self, color: str, shape: str, motion: str, performs: bool) -> None:
        """Add a distractor of a similar look that performs `motion` once, at any time, or never."""
        look = self.similar_look(color, shape, motion if performs else STILL)
        self.add(*look, event=(motion, *self.random_interval()) if performs else None, avoid=motion)

    def add(self, color: str, shape: str, event: tuple[str, int, int] | None = None, avoid: str | None = None) -> None:
        """Add an object that performs `event` (motion, start, end), if any, and `avoid` at no other time."""
        diameter = float(self.rng.uniform(*DIAMETER))
        half = half_size(shape, diameter, self.size)
        motions = [m for m in (STILL, *MOTIONS) if m != avoid and self.may_perform((color, shape), m)]
        best, best_gap = None, -np.inf
        for _ in range(_PLACE_TRIES if self.objects else 1):
            path = _sample_path(self.rng, self.frame_count, motions, event, half)
            gap = self._gap(path[1], half)
            if gap > best_gap:
                best, best_gap = path, gap
            if gap >= 0:
                break
        assert best is not None
        self.objects.append(SceneObject(color, shape, self.palette[color], diameter, *best))

    def _gap(self, centers: np.ndarray, half: np.ndarray) -> float:
        """Smallest clearance between the boxes along the path, negative where they overlap."""
        gaps = [
            (np.abs(centers - other.centers) - half - other.half_size(self.size)).max(axis=1).min()
            for other in self.objects
        ]
        return min(gaps, default=0.0)

    def finish(self, tier: str, sentence: str, sentence_type: SentenceType, interval: tuple[int, int] | None) -> Scene:
        """Shuffle the drawing order, so that being on top does not tell the target."""
        order = self.rng.permutation(len(self.objects)).tolist()
        objects = tuple(self.objects[i] for i in order)
        return Scene(tier, sentence, sentence_type, objects, order.index(0), interval)


def _sample_path(
    rng: np.random.Generator,
    frame_count: int,
    motions: Sequence[str],
    event: tuple[str, int, int] | None,
    half: np.ndarray,
) -> tuple[tuple[str, ...], np.ndarray]:
    """Motion of every frame and box centres `[frame_count, 2]`, the whole box in view at all frames."""
    room = 1.0 - 2.0 * half
    for _ in range(_PATH_TRIES):
        names, velocity = _sample_velocity(rng, frame_count, motions, event)
        offset = np.cumsum(velocity, axis=0) - velocity[0]
        low, high = offset.min(axis=0), offset.max(axis=0)
        if ((high - low) <= room).all():
            break
    else:
        # The event alone always fits: at most 10 frames x 0.065 beside a box of at most 0.32.
        outside = np.ones(frame_count, dtype=bool)
        if event is not None:
            outside[event[1] : event[2]] = False
        velocity[outside] = 0.0
        names = [STILL if out else name for name, out in zip(names, outside, strict=True)]
        offset = np.cumsum(velocity, axis=0) - velocity[0]
        low, high = offset.min(axis=0), offset.max(axis=0)
    start = half - low + rng.random(2) * (room - (high - low))
    return tuple(names), start + offset


def _sample_velocity(
    rng: np.random.Generator, frame_count: int, motions: Sequence[str], event: tuple[str, int, int] | None
) -> tuple[list[str], np.ndarray]:
    """Motion name and displacement `[frame_count, 2]` of every frame."""
    names: list[str] = []
    speeds: list[float] = []

    def fill(end: int) -> None:
        while len(names) < end:
            left = end - len(names)
            length = int(rng.integers(SEGMENT_FRAMES[0], SEGMENT_FRAMES[1] + 1))
            if left - length < SEGMENT_FRAMES[0]:
                length = left if left <= SEGMENT_FRAMES[1] else left - SEGMENT_FRAMES[0]
            choices = [m for m in motions if not names or m != names[-1]] or list(motions)
            names.extend([choices[rng.integers(len(choices))]] * length)
            speeds.extend([float(rng.uniform(*SEGMENT_SPEED))] * length)

    if event is not None:
        motion, start, end = event
        fill(start)
        names.extend([motion] * (end - start))
        speeds.extend([float(rng.uniform(*EVENT_SPEED))] * (end - start))
    fill(frame_count)
    velocity = np.array([_DIRECTION[name] for name in names]) * np.array(speeds)[:, None]
    return names, velocity
