"""Inference: temporal answer, one forward for the bridging queries on the KV cache, then boxes inside the interval."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.frame_sampling import uniform_frame_index
from ..data.video import VideoInfo, decode_frames, probe
from ..modules.boxes import cxcywh_to_xyxy
from .processing_bridge_stg import BridgeSTGProcessor, parse_answer
from .result import GroundingResult, IntervalSource, KeptTokens, PresencePoint, TubeEntry

if TYPE_CHECKING:
    from ..modules.semantic_bridge import BridgeQueries
    from .modeling_bridge_stg import BridgeSTGForVideoGrounding, VisualTokens


@dataclass(frozen=True)
class ClipPrediction:
    """Prediction for one clip, in the frames the model was given.

    Attributes:
        answer: generated text, "" when none was asked for.
        interval: (start, end) in seconds.
        interval_source: "text" or "presence".
        presence: `[T]` in [0, 1] over the whole clip.
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


class GroundingMixin:
    """`ground` and `predict` of `BridgeSTGForVideoGrounding`."""

    _processor: BridgeSTGProcessor | None = None

    @property
    def processor(self: Any) -> BridgeSTGProcessor:
        """The processor saved beside the weights; set it for a model that was never saved."""
        if self._processor is None:
            self._processor = BridgeSTGProcessor.from_pretrained(self.name_or_path)
        return self._processor

    @processor.setter
    def processor(self: Any, value: BridgeSTGProcessor) -> None:
        self._processor = value

    def ground(
        self: Any, video: str | os.PathLike[str], sentence: str, *, spatial_fps: float | None = None
    ) -> GroundingResult:
        """Say when `sentence` happens in `video`, and where, in every source frame of that interval.

        Args:
            video: a video file.
            sentence: declarative or interrogative.
            spatial_fps: localise at most this many frames a second inside the interval, and interpolate between them;
                None localises every frame the MLLM saw.

        Raises:
            VideoError: the video cannot be read.
            SampleError: the sentence is empty or does not fit the context.
        """
        info = probe(video)
        processor = self.processor
        index = uniform_frame_index(info.times, processor.fps, processor.max_frames)
        frames = decode_frames(info, index)
        times = info.times[index]
        (prediction,) = self.predict(
            [frames], [times.tolist()], [sentence], durations=[info.duration], spatial_fps=spatial_fps
        )
        return _to_result(str(video), sentence, info, np.asarray(index), prediction)

    @torch.inference_mode()
    def predict(
        self: Any,
        frames: Sequence[torch.Tensor | np.ndarray],
        times: Sequence[Sequence[float]],
        sentences: Sequence[str],
        *,
        durations: Sequence[float],
        oracle_intervals: Sequence[tuple[float, float]] | None = None,
        spatial_fps: float | None = None,
    ) -> list[ClipPrediction]:
        """Ground a batch of decoded clips of equal frame count and size.

        Args:
            frames: B arrays uint8 `[T, H, W, 3]`.
            times: B lists of T seconds.
            sentences: B texts.
            durations: B, seconds; intervals are clamped to [0, duration].
            oracle_intervals: B true intervals; boxes for them are returned too (for gt_vIoU).
            spatial_fps: see `ground`.
        """
        self.eval()
        processor = self.processor
        inputs = processor(frames, times, sentences).to(self.device)
        visual = self.encode_video(inputs["pixel_values"], inputs["video_grid_thw"])
        prompt_ids, prompt_mask = inputs["input_ids"], inputs["attention_mask"]
        position_ids, next_position = self.position_ids(prompt_ids, prompt_mask, visual.grid)
        hidden_states, cache = self.run_language_model(
            self.embed_prompt(prompt_ids, visual.merged),
            position_ids=position_ids,
            attention_mask=prompt_mask,
            use_cache=True,
        )
        decoding = _Decoding(self, cache, prompt_mask, next_position)
        count = len(sentences)
        answers, texts = [""] * count, [None] * count
        if self.config.interval_source == "text":
            answers = decoding.generate(self.backbone.lm_head(hidden_states[-1][:, -1]), processor.tokenizer)
            texts = [_read_answer(*each) for each in zip(answers, times, durations, strict=True)]  # type: ignore[misc]
        # An answer that cannot be read is hidden from the bridging tokens, as answer dropout does in training.
        readable = torch.tensor([text is not None for text in texts], device=self.device)
        queries = decoding.bridge(readable)

        group_states, group_ends = self.group_states(prompt_ids, hidden_states[-1], visual)
        memory = self.visual_memory(visual, group_states)
        spatial = _Spatial(self, queries, memory, visual, inputs["frame_times"])
        lengths = [len(t) for t in times]
        presence, best = spatial.presence(max(lengths))
        relevance = None
        if self.config.dense_alignment:
            relevance = self.relevance_logits(group_states, group_ends).float().sigmoid().cpu().numpy()
        intervals: list[tuple[float, float]] = []
        sources: list[IntervalSource] = []
        curves = []
        for i, text in enumerate(texts):
            curve = presence[i, : lengths[i]]
            if relevance is not None:
                curve = (curve + relevance[i, : lengths[i]]) / 2
            curves.append(curve)
            intervals.append(text or presence_interval(curve, times[i], durations[i], self.config.presence_threshold))
            sources.append("presence" if text is None else "text")
        chosen = [_frames_inside(t, span, spatial_fps) for t, span in zip(times, intervals, strict=True)]
        boxes, kept = spatial.boxes(chosen, best)
        oracle_frames: list[Any] = [None] * count
        oracle_boxes: list[Any] = [None] * count
        if oracle_intervals is not None:
            oracle_frames = [_frames_inside(t, o, None) for t, o in zip(times, oracle_intervals, strict=True)]
            oracle_boxes, _ = spatial.boxes(oracle_frames, best)
        return [
            ClipPrediction(
                answer=answers[i],
                interval=intervals[i],
                interval_source=sources[i],
                presence=curves[i],
                frames=chosen[i],
                boxes=boxes[i],
                kept=kept[i],
                grid=spatial.grid,
                oracle_frames=oracle_frames[i],
                oracle_boxes=oracle_boxes[i],
            )
            for i in range(count)
        ]


class _Decoding:
    """Greedy answer and bridging forward on one KV cache; rows that end early are padded and masked."""

    def __init__(
        self, model: BridgeSTGForVideoGrounding, cache: Any, mask: torch.Tensor, position: torch.Tensor
    ) -> None:
        self.model, self.cache, self.mask, self.position = model, cache, mask, position
        self.prompt_length = mask.shape[1]

    def _step(self, ids: torch.Tensor, real: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run `ids` `[B, n]` (where `real`, else padding) seeing `visible` `[B, cached]`; advances the positions."""
        steps = real.long().cumsum(-1)
        positions = self.position[:, None] + steps - real.long()
        self.position = self.position + steps[:, -1]
        hidden, self.cache = self.model.run_language_model(
            self.model.get_input_embeddings()(ids),
            position_ids=positions.expand(3, -1, -1),
            attention_mask=torch.cat([visible, real.long()], dim=1),
            past_key_values=self.cache,
            use_cache=True,
        )
        return hidden

    def generate(self, logits: torch.Tensor, tokenizer: Any) -> list[str]:
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        running = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        generated = []
        for _ in range(self.model.config.max_answer_tokens):
            ids = torch.where(running, logits.argmax(-1), pad)
            generated.append(ids)
            hidden = self._step(ids[:, None], running[:, None], self.mask)
            self.mask = torch.cat([self.mask, running[:, None].long()], dim=1)
            running = running & (ids != end)
            if not bool(running.any()):
                break
            logits = self.model.backbone.lm_head(hidden[-1][:, -1])
        return [t.strip() for t in tokenizer.batch_decode(torch.stack(generated, 1), skip_special_tokens=True)]

    def bridge(self, answer_visible: torch.Tensor) -> BridgeQueries:
        config = self.model.config
        batch = len(self.mask)
        assert config.bridge_token_id is not None
        ids = torch.arange(config.bridge_tokens, device=self.mask.device) + config.bridge_token_id
        ids = ids.expand(batch, -1)
        visible = self.mask.clone()
        visible[:, self.prompt_length :] *= answer_visible[:, None].long()
        hidden = self._step(ids, torch.ones_like(ids, dtype=torch.bool), visible)
        return self.model.bridge_queries(hidden, torch.ones_like(ids, dtype=torch.bool))


class _Spatial:
    """The spatial half of one batch: memory and queries fixed, frames chosen per call."""

    def __init__(
        self,
        model: BridgeSTGForVideoGrounding,
        queries: BridgeQueries,
        memory: torch.Tensor,
        visual: VisualTokens,
        times: torch.Tensor,
    ) -> None:
        self.model, self.queries, self.memory, self.times = model, queries, memory, times
        self.centres = model.memory_centres(visual)
        scale = round((len(visual.centres) / len(self.centres)) ** 0.5)
        self.grid = (visual.grid[0] // scale, visual.grid[1] // scale)

    def _localise(self, frames: torch.Tensor) -> Any:
        return self.model.localise(self.queries, self.memory, self.centres, frames.to(self.memory.device), self.times)

    def presence(self, frame_count: int) -> tuple[np.ndarray, torch.Tensor]:
        """Presence `[B, T]` of each clip's best hypothesis (highest mean presence), and which one it is `[B]`."""
        frames = torch.arange(frame_count).expand(len(self.memory), -1)
        presence = self._localise(frames).tubes.presence[-1].float().sigmoid()  # [B, T, M]
        best = presence.mean(1).argmax(-1)
        chosen = presence.gather(2, best[:, None, None].expand(-1, frame_count, 1)).squeeze(-1)
        return chosen.cpu().numpy(), best

    def boxes(self, chosen: Sequence[np.ndarray], best: torch.Tensor) -> tuple[list[np.ndarray], list[Any]]:
        """xyxy boxes in [0, 1] and kept tokens at the chosen frames of every clip."""
        width = max(len(frames) for frames in chosen)
        index = torch.full((len(chosen), width), -1)
        for row, frames in zip(index, chosen, strict=True):
            row[: len(frames)] = torch.from_numpy(frames)
        located = self._localise(index)
        rows = torch.arange(len(chosen), device=best.device)
        boxes = cxcywh_to_xyxy(located.tubes.boxes[-1][rows, :, best].float()).clamp(0, 1).cpu().numpy()  # [B, S, 4]
        kept: list[Any] = [[] for _ in chosen]
        if located.kept_index is not None:
            place = ((self.centres * torch.tensor(self.grid[::-1], device=self.centres.device)).long()).cpu().numpy()
            row_major = place[:, 1] * self.grid[1] + place[:, 0]
            tokens, scores = located.kept_index.cpu().numpy(), located.kept_score.float().cpu().numpy()
            for i, frames in enumerate(chosen):
                for s in range(len(frames)):
                    places = row_major[tokens[i, s]]
                    order = places.argsort()
                    kept[i].append((places[order], scores[i, s][order]))
        return [boxes[i, : len(frames)] for i, frames in enumerate(chosen)], kept


def presence_interval(
    curve: np.ndarray, times: Sequence[float], duration: float, threshold: float
) -> tuple[float, float]:
    """The longest run of frames above `threshold`, in seconds; the frame of the peak when there is none.

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


def _read_answer(text: str, times: Sequence[float], duration: float) -> tuple[float, float] | None:
    """The interval in an answer, moved onto the frame times that its one decimal stands for; None if unreadable.

    A frame at 3.75 s is written 3.8 s; without the move, an event that starts there would lose its first frame.
    """
    if (interval := parse_answer(text, duration)) is None:
        return None
    edges = np.array([*times, duration])
    nearest = [edges[np.abs(edges - value).argmin()] for value in interval]
    start, end = (e if abs(e - v) <= 0.05 + 1e-9 else v for e, v in zip(nearest, interval, strict=True))
    return (float(start), float(end)) if start < end else interval


def _frames_inside(
    times: Sequence[float] | np.ndarray, interval: tuple[float, float], spatial_fps: float | None
) -> np.ndarray:
    """Positions of the frames in [start, end), thinned to `spatial_fps`; the nearest frame when none lies inside."""
    seconds = np.asarray(times)
    inside = np.flatnonzero((seconds >= interval[0] - 1e-6) & (seconds < interval[1] - 1e-6))
    if not len(inside):
        return np.array([np.abs(seconds - sum(interval) / 2).argmin()])
    if spatial_fps is None:
        return inside
    slots = np.floor((seconds[inside] - seconds[inside[0]]) * spatial_fps + 1e-6)
    return inside[np.unique(slots, return_index=True)[1]]


def source_tube(
    info: VideoInfo, interval: tuple[float, float], index: np.ndarray, positions: np.ndarray, boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes at every source frame of an interval, linear in time between the localised ones, held at the ends.

    Args:
        interval: (start, end) in seconds; the nearest frame is taken when it holds none.
        index: `[T]` source frames given to the model.
        positions: `[n]` which of them were localised.
        boxes: `[n, 4]` xyxy in [0, 1].

    Returns:
        (source frames `[F]`, boxes `[F, 4]` xyxy in original pixels).
    """
    source = _frames_inside(info.times, interval, None)
    known = info.times[index[positions]]
    pixels = boxes * np.array([info.width, info.height, info.width, info.height])
    tube = np.stack([np.interp(info.times[source], known, pixels[:, side]) for side in range(4)], axis=1)
    return source, tube


def _to_result(
    video: str, sentence: str, info: VideoInfo, index: np.ndarray, prediction: ClipPrediction
) -> GroundingResult:
    source, boxes = source_tube(info, prediction.interval, index, prediction.frames, prediction.boxes)
    decoded = index[prediction.frames]
    times = info.times[source]
    presence = np.interp(times, info.times[index], prediction.presence)
    tube = tuple(
        TubeEntry(
            frame=int(frame),
            time=float(time),
            box=(float(box[0]), float(box[1]), float(box[2]), float(box[3])),
            presence=float(value),
            interpolated=bool(frame not in decoded),
        )
        for frame, time, box, value in zip(source, times, boxes, presence, strict=True)
    )
    curve = tuple(
        PresencePoint(int(frame), float(info.times[frame]), float(value))
        for frame, value in dict(zip(index.tolist(), prediction.presence, strict=True)).items()
    )
    kept = tuple(
        KeptTokens(int(frame), prediction.grid, tuple(map(int, tokens)), tuple(map(float, scores)))
        for frame, (tokens, scores) in zip(decoded, prediction.kept, strict=False)
    )
    start, end = prediction.interval
    return GroundingResult(
        video=video,
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
    )
