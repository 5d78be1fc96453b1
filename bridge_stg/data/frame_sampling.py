"""Choosing frames: an even grid in time for the MLLM, positives and negatives for the spatial decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np


def uniform_frame_index(
    times: Sequence[float] | np.ndarray, fps: float, max_frames: int, multiple: int = 2
) -> np.ndarray:
    """Pick frames at about `fps` a second over the whole clip, at most `max_frames`, evenly thinned.

    Args:
        times: seconds of each source frame, ascending, `[frame_count]`; any spacing.
        fps: wanted rate; where the source has fewer frames, all of them are taken.
        max_frames: upper bound of the result's length.
        multiple: the length is padded to a multiple of it by repeating the last frame.

    Returns:
        int64 `[n]`, ascending frame numbers; all distinct but for the padding.

    Raises:
        ValueError: no times, times that do not ascend, or a setting out of its range.
    """
    clock = np.asarray(times, dtype=np.float64)
    if clock.ndim != 1 or not len(clock) or (np.diff(clock) <= 0).any():
        raise ValueError(f"times must be one ascending list of at least one value, got {len(clock)} values")
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    if not 1 <= multiple <= max_frames:
        raise ValueError(f"multiple must be in 1..max_frames ({max_frames}), got {multiple}")
    grid = clock[0] + np.arange(int((clock[-1] - clock[0]) * fps + 1e-6) + 1) / fps
    after = np.searchsorted(clock, grid).clip(1, max(1, len(clock) - 1))
    before = after - 1
    after = np.minimum(after, len(clock) - 1)
    nearest = np.where(grid - clock[before] <= clock[after] - grid, before, after)
    index = nearest[np.diff(nearest, prepend=-1) > 0]
    limit = max_frames - max_frames % multiple
    if len(index) > limit:
        index = index[np.linspace(0, len(index) - 1, limit).round().astype(np.int64)]
    padding = -len(index) % multiple
    return np.concatenate([index, np.repeat(index[-1:], padding)]).astype(np.int64)


def frames_inside(
    times: Sequence[float] | np.ndarray, interval: tuple[float, float], spatial_fps: float | None = None
) -> np.ndarray:
    """Positions of the frames in [start, end), thinned to `spatial_fps`; the nearest frame when none lies inside.

    Args:
        times: seconds of each frame, ascending, `[n]`.
        interval: seconds.
        spatial_fps: frames a second at most; None takes all.
    """
    seconds = np.asarray(times)
    inside = np.flatnonzero((seconds >= interval[0] - 1e-6) & (seconds < interval[1] - 1e-6))
    if not len(inside):
        return np.array([np.abs(seconds - sum(interval) / 2).argmin()])
    if spatial_fps is None:
        return inside
    slots = np.floor((seconds[inside] - seconds[inside[0]]) * spatial_fps + 1e-6)
    return inside[np.unique(slots, return_index=True)[1]]


def sample_spatial_frames(
    frame_count: int,
    interval: tuple[int, int],
    count: int,
    positive_ratio: float = 0.5,
    negatives: Literal["uniform", "boundary"] = "uniform",
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Draw frames inside the event (positive) and outside it (negative) for training the spatial decoder.

    Where one kind has too few frames, the other fills up; where the clip is shorter than `count`, all frames
    are taken and positives repeated.

    Args:
        frame_count: frames in the clip.
        interval: frames [start, end) of the event.
        count: frames to draw.
        positive_ratio: wanted share of positives, in [0, 1]; at least one positive is always drawn.
        negatives: "uniform" over the frames outside, or "boundary": likelier the nearer to the event, as the
            inverse of the distance in frames.
        rng: source of randomness; None means a fresh one.

    Returns:
        int64 `[count]`, ascending; distinct where the clip has enough frames.

    Raises:
        ValueError: an argument is out of its range.
    """
    start, end = interval
    if not 0 <= start < end <= frame_count:
        raise ValueError(f"interval must have 0 <= start < end <= {frame_count} (frames), got {interval}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not 0 <= positive_ratio <= 1:
        raise ValueError(f"positive_ratio must be in 0..1, got {positive_ratio}")
    if negatives not in ("uniform", "boundary"):
        raise ValueError(f"negatives must be uniform or boundary, got {negatives!r}")
    rng = rng or np.random.default_rng()
    inside = np.arange(start, end)
    outside = np.concatenate([np.arange(start), np.arange(end, frame_count)])
    wanted = max(1, round(count * positive_ratio))
    positive_count = min(len(inside), max(wanted, count - len(outside)))
    negative_count = min(len(outside), count - positive_count)
    weight = None
    if negatives == "boundary" and len(outside):
        distance = np.where(outside < start, start - outside, outside - end + 1)
        weight = (1 / distance) / (1 / distance).sum()
    chosen = [
        rng.choice(inside, positive_count, replace=False),
        rng.choice(outside, negative_count, replace=False, p=weight) if negative_count else outside[:0],
        rng.choice(inside, count - positive_count - negative_count),
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)
