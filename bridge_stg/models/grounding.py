"""`BridgeSTGForVideoGrounding`: the temporal answer, the bridging queries on the same KV cache, then the boxes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from numbers import Real
from typing import Any

import numpy as np
import torch

from ..data.clip import Clip, load_clip
from ..data.frame_sampling import frames_inside
from ..data.video import VideoInfo
from ..errors import SampleError
from ..modules.semantic_bridge import BridgeQueries
from .decoding import CachedDecoding, SpatialPass, encode_clips, tokens_by_clip
from .modeling_bridge_stg import BridgeSTGModel
from .processing_bridge_stg import parse_answer
from .result import GroundingResult, IntervalSource, KeptTokens, PresencePoint, TubeEntry


@dataclass(frozen=True)
class ClipPrediction:
    """Prediction for one clip, in the frames the model was given.

    Attributes:
        answer: generated text, "" when none was asked for.
        interval: (start, end) in seconds.
        interval_source: "text" or "presence".
        presence: `[T]` in [0, 1] over the whole clip, without frames that only repeat the last one.
        frames: positions of the given frames inside the interval that were localised, ascending.
        boxes: `[n, 4]` xyxy in [0, 1], one per entry of `frames`.
        kept: per entry of `frames`, (row-major token index, score); empty without pruning.
        grid: (rows, columns) of the memory tokens.
        oracle_frames, oracle_boxes: the same for the interval given as `oracle_intervals`, when one was.
    """

    answer: str
    interval: tuple[float, float]
    interval_source: IntervalSource
    presence: np.ndarray
    frames: np.ndarray
    boxes: np.ndarray
    kept: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    grid: tuple[int, int] = (0, 0)
    oracle_frames: np.ndarray | None = None
    oracle_boxes: np.ndarray | None = None


class BridgeSTGForVideoGrounding(BridgeSTGModel):
    """The model that users load: it says when a sentence happens in a video, and where.

    Args:
        config, backbone: see `BridgeSTGModel`.
    """

    def ground(
        self, video: str | os.PathLike[str] | VideoInfo, sentence: str, *, spatial_fps: float | None = None
    ) -> GroundingResult:
        """Say when `sentence` happens in `video`, and where, in every source frame of that interval.

        Args:
            video: a video file, or what `probe` returned for it, which saves looking at the file again.
            sentence: declarative or interrogative.
            spatial_fps: localise at most this many frames a second inside the interval, and interpolate between them;
                None localises every frame the MLLM saw.

        Raises:
            ValueError: `spatial_fps` is not a rate.
            VideoError: the video cannot be read.
            SampleError: the sentence is not a text, is empty or does not fit the context, or what the model computes is
                not finite.
        """
        return self.ground_batch([video], [sentence], spatial_fps=spatial_fps)[0]

    def ground_batch(
        self,
        videos: Sequence[str | os.PathLike[str] | VideoInfo],
        sentences: Sequence[str],
        *,
        spatial_fps: float | None = None,
    ) -> list[GroundingResult]:
        """Ground several videos of any lengths and sizes in one batch, with the results that `ground` gives for each.

        All videos are in memory at once, so split a long list.

        Args:
            videos: B video files, see `ground`.
            sentences: B texts.
            spatial_fps: see `ground`.

        Raises:
            ValueError: `spatial_fps` is not a rate, or a text stands in place of a list.
            VideoError: a video cannot be read.
            SampleError: a sentence is empty or does not fit the context, there are not as many as videos, or what the
                model computes for one is not finite.
        """
        _check_spatial_fps(spatial_fps)
        for name, value in (("videos", videos), ("sentences", sentences)):
            if isinstance(value, str):
                raise ValueError(f"{name} must be a list, got the text {value!r}.")
        if len(videos) != len(sentences):
            raise SampleError(f"Every video needs a sentence, got {len(videos)} videos and {len(sentences)} sentences.")
        if not videos:
            return []
        processor = self.processor
        clips = [load_clip(video, fps=processor.fps, max_frames=processor.max_frames) for video in videos]
        predictions = self.predict(
            [clip.frames for clip in clips],
            [clip.times.tolist() for clip in clips],
            sentences,
            durations=[clip.duration for clip in clips],
            spatial_fps=spatial_fps,
        )
        return [_to_result(*each) for each in zip(clips, sentences, predictions, strict=True)]

    @torch.inference_mode()
    def predict(
        self,
        frames: Sequence[torch.Tensor | np.ndarray],
        times: Sequence[Sequence[float]],
        sentences: Sequence[str],
        *,
        durations: Sequence[float],
        oracle_intervals: Sequence[tuple[float, float]] | None = None,
        spatial_fps: float | None = None,
    ) -> list[ClipPrediction]:
        """Ground a batch of decoded clips; frame counts and sizes may differ.

        Leaves the model in evaluation mode. Several threads may call it on one model.

        Args:
            frames: B arrays uint8 `[T, H, W, 3]`.
            times: B lists of T ascending seconds, from 0 on; frames at the time of the last one are padding.
            sentences: B texts.
            durations: B, seconds, each behind its last frame; intervals are clamped to [0, duration].
            oracle_intervals: B true intervals; boxes for them are returned too (for gt_vIoU).
            spatial_fps: see `ground`.

        Raises:
            ValueError: the arguments do not fit each other, times do not ascend from 0 on, an interval is not one, or
                `spatial_fps` is not a rate.
            SampleError: see `ground`.
        """
        _check_clips(frames, times, sentences, durations)
        _check_oracle_intervals(len(sentences), oracle_intervals)
        _check_spatial_fps(spatial_fps)
        if self.training:
            self.eval()
        if not len(sentences):
            return []
        counts = [1 + int(np.count_nonzero(np.diff(clip))) for clip in times]
        frames = [clip[:count] for clip, count in zip(frames, counts, strict=True)]
        times = [clip[:count] for clip, count in zip(times, counts, strict=True)]
        inputs = self.processor(frames, times, sentences).to(self.input_device)
        ids, grids = inputs["input_ids"], inputs["video_grid_thw"]
        encoded = encode_clips(self, inputs["pixel_values"], grids)
        decoding = CachedDecoding(self, ids, inputs["attention_mask"], tokens_by_clip(encoded), grids[:, 1:])
        answers = [""] * len(sentences)
        intervals: list[tuple[float, float] | None] = [None] * len(sentences)
        if self.config.interval_source == "text":
            answers = decoding.generate(self.processor.tokenizer)
            intervals = [read_answer(*each) for each in zip(answers, times, durations, strict=True)]
        # An answer that cannot be read is hidden from the bridging tokens, as answer dropout does in training.
        queries = decoding.bridge(torch.tensor([interval is not None for interval in intervals], device=ids.device))
        oracle = repeat(None) if oracle_intervals is None else oracle_intervals
        clips = [_AnsweredClip(*each) for each in zip(times, durations, answers, intervals, oracle, strict=False)]
        predictions: dict[int, ClipPrediction] = {}
        for members, visual in encoded:
            group_states, group_ends = self.group_states(ids[members], decoding.prompt_states[members], visual)
            spatial = SpatialPass(
                self,
                BridgeQueries(queries.interactive[:, members], queries.aggregated[members]),
                self.visual_memory(visual, group_states),
                visual,
                inputs["frame_times"][members],
                [len(times[clip]) for clip in members],
            )
            relevance = None
            if self.config.dense_alignment:
                relevance = self.relevance_logits(group_states, group_ends).float().sigmoid().cpu().numpy()
            threshold = self.config.presence_threshold
            found = _localise_clips([clips[i] for i in members], spatial, relevance, threshold, spatial_fps)
            predictions |= dict(zip(members, found, strict=True))
        return [predictions[i] for i in range(len(sentences))]


@dataclass(frozen=True)
class _AnsweredClip:
    """A clip of a batch after the text pass.

    Attributes:
        times: seconds of its frames.
        duration: seconds.
        answer: generated text.
        interval: what the answer says, seconds; None if it says none.
        oracle: the true interval, seconds, if one was given.
    """

    times: Sequence[float]
    duration: float
    answer: str
    interval: tuple[float, float] | None
    oracle: tuple[float, float] | None


def _localise_clips(
    clips: Sequence[_AnsweredClip],
    spatial: SpatialPass,
    relevance: np.ndarray | None,
    threshold: float,
    spatial_fps: float | None,
) -> list[ClipPrediction]:
    """Predict intervals and boxes for clips of one frame size.

    The presence curve is averaged with `relevance` `[B, T]`, the probabilities of dense alignment, if it is given.

    Raises:
        SampleError: presence or boxes are not finite.
    """
    curves, best = spatial.presence()
    if relevance is not None:
        curves = [(curve + row[: len(curve)]) / 2 for curve, row in zip(curves, relevance, strict=True)]
    _check_finite("presence values", curves)
    intervals = [
        clip.interval or presence_interval(curve, clip.times, clip.duration, threshold)
        for clip, curve in zip(clips, curves, strict=True)
    ]
    chosen = [frames_inside(clip.times, each, spatial_fps) for clip, each in zip(clips, intervals, strict=True)]
    boxes, kept = spatial.boxes(chosen, best)
    _check_finite("boxes", boxes)
    predictions = [
        ClipPrediction(
            answer=clip.answer,
            interval=intervals[i],
            interval_source="presence" if clip.interval is None else "text",
            presence=curves[i],
            frames=chosen[i],
            boxes=boxes[i],
            kept=kept[i],
            grid=spatial.grid,
        )
        for i, clip in enumerate(clips)
    ]
    oracle = [frames_inside(clip.times, clip.oracle) for clip in clips if clip.oracle is not None]
    if oracle:
        boxes, _ = spatial.boxes(oracle, best)
        each = zip(predictions, oracle, boxes, strict=True)
        predictions = [replace(p, oracle_frames=frames, oracle_boxes=found) for p, frames, found in each]
    return predictions


def _check_clips(
    frames: Sequence[Any], times: Sequence[Sequence[float]], sentences: Sequence[str], durations: Sequence[float]
) -> None:
    if isinstance(sentences, str):
        raise ValueError(f"sentences must be a list of texts, got the text {sentences!r}.")
    if not len(frames) == len(times) == len(sentences) == len(durations):
        raise ValueError(
            "frames, times, sentences and durations must be as many, "
            f"got {len(frames)}, {len(times)}, {len(sentences)} and {len(durations)}."
        )
    for i, (clip, seconds, duration) in enumerate(zip(frames, times, durations, strict=True)):
        if not 1 <= len(clip) == len(seconds):
            raise ValueError(f"times[{i}] must have one time for each of {len(clip)} frames, got {len(seconds)}.")
        steps = np.diff(seconds)
        rising = np.count_nonzero(steps > 0)
        if not (np.isfinite(seconds).all() and (steps[:rising] > 0).all() and (steps[rising:] == 0).all()):
            raise ValueError(f"times[{i}] must ascend and be finite, got {list(seconds)}.")
        if seconds[0] < 0:
            raise ValueError(f"times[{i}] must begin at 0 s or later, got {seconds[0]}.")
        if not seconds[-1] < duration < math.inf:
            raise ValueError(f"durations[{i}] must be behind the last frame at {seconds[-1]} s, got {duration}.")


def _check_oracle_intervals(count: int, intervals: Sequence[tuple[float, float]] | None) -> None:
    if intervals is None:
        return
    if len(intervals) != count:
        raise ValueError(f"oracle_intervals must be as many as the {count} sentences, got {len(intervals)}.")
    for i, interval in enumerate(intervals):
        if len(interval) != 2 or not -math.inf < interval[0] <= interval[1] < math.inf:
            raise ValueError(f"oracle_intervals[{i}] must be (start, end) in seconds, got {interval!r}.")


def _check_spatial_fps(value: float | None) -> None:
    """Raise ValueError unless `value` is None or a rate: a finite number above 0."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"spatial_fps must be a finite number above 0 or None, got {value!r}.")


def _check_finite(what: str, values: Sequence[np.ndarray]) -> None:
    """Raise SampleError for NaN, which would pass for a result: comparisons with it are false."""
    if not all(np.isfinite(array).all() for array in values):
        raise SampleError(
            f"The model's {what} for this clip and sentence are not finite numbers: its weights hold NaN or values too "
            "large for their dtype."
        )


def presence_interval(
    curve: np.ndarray, times: Sequence[float], duration: float, threshold: float
) -> tuple[float, float]:
    """The longest run of frames whose presence is above `threshold`, in seconds; without any, the frame of the peak.

    Args:
        curve: `[T]` in [0, 1].
        times: T seconds.
        duration: seconds, the end of the last frame.
    """
    above = np.concatenate([[False], np.asarray(curve) > threshold, [False]])
    edges = np.flatnonzero(above[1:] != above[:-1]).reshape(-1, 2)
    if len(edges):
        start, end = edges[(edges[:, 1] - edges[:, 0]).argmax()]
    else:
        start = int(np.argmax(curve))
        end = start + 1
    return float(times[start]), float(times[end]) if end < len(times) else float(duration)


def read_answer(text: str, times: Sequence[float], duration: float) -> tuple[float, float] | None:
    """Read the interval of an answer and move its ends onto the frame times that their one decimal stands for.

    A frame at 3.75 s is written 3.8 s; without the move, an event that starts there would lose its first frame.

    Returns:
        (start, end) in seconds; None if the answer holds no interval.
    """
    if (interval := parse_answer(text, duration)) is None:
        return None
    edges = np.array([*times, duration])
    nearest = [edges[np.abs(edges - value).argmin()] for value in interval]
    start, end = (e if abs(e - v) <= 0.05 + 1e-9 else v for e, v in zip(nearest, interval, strict=True))
    return (float(start), float(end)) if start < end else interval


def source_tube(
    clock: np.ndarray, size: tuple[int, int], interval: tuple[float, float], known: np.ndarray, boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes at every source frame of an interval: linear in time between localised frames, constant outside them.

    Args:
        clock: `[F]`, seconds of every source frame.
        size: (width, height) in pixels.
        interval: (start, end) in seconds; the nearest frame is taken when it holds none.
        known: `[n]`, seconds of the localised frames.
        boxes: `[n, 4]` xyxy in [0, 1].

    Returns:
        (source frames `[f]`, boxes `[f, 4]` xyxy in pixels).
    """
    source = frames_inside(clock, interval)
    pixels = boxes * np.array([*size, *size])
    tube = np.stack([np.interp(clock[source], known, pixels[:, side]) for side in range(4)], axis=1)
    return source, tube


def _to_result(clip: Clip, sentence: str, prediction: ClipPrediction) -> GroundingResult:
    """Convert a prediction to source frames and to the file's own clock; the model's clock starts at 0."""
    info, index = clip.info, np.unique(clip.source_frames)
    decoded = index[prediction.frames]
    size = info.width, info.height
    source, boxes = source_tube(info.times, size, prediction.interval, info.times[decoded], prediction.boxes)
    times = info.times[source]
    presence = np.interp(times, info.times[index], prediction.presence)
    tube = tuple(
        TubeEntry(
            frame=int(frame),
            time=float(time) + info.start_time,
            box=(float(box[0]), float(box[1]), float(box[2]), float(box[3])),
            presence=float(value),
            interpolated=bool(frame not in decoded),
        )
        for frame, time, box, value in zip(source, times, boxes, presence, strict=True)
    )
    curve = tuple(
        PresencePoint(int(frame), float(info.times[frame]) + info.start_time, float(value))
        for frame, value in zip(index, prediction.presence, strict=True)
    )
    kept = tuple(
        KeptTokens(int(frame), prediction.grid, tuple(map(int, tokens)), tuple(map(float, scores)))
        for frame, (tokens, scores) in zip(decoded, prediction.kept, strict=False)
    )
    start, end = (edge + info.start_time for edge in prediction.interval)
    return GroundingResult(
        video=info.path,
        sentence=sentence,
        interval=(float(start), float(end)),
        interval_source=prediction.interval_source,
        confidence=float(np.mean([entry.presence for entry in tube])),
        answer=prediction.answer,
        fps=info.fps,
        width=info.width,
        height=info.height,
        frame_count=info.frame_count,
        tube=tube,
        presence=curve,
        kept_tokens=kept,
        start_time=info.start_time,
    )
