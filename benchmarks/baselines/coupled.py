"""The coupled baseline: the same backbone writes the interval and one box a frame as text, token by token.

An answer reads

    From 3.0 s to 4.0 s.
    512,431,640,587
    515,431,643,587

with one line x1,y1,x2,y2 in thousandths of the frame for every frame of the interval that the MLLM was given, after
the way Qwen2.5-VL and the relatives of the paper write boxes. `bridge_stg.training.train` trains it with
`build=build_coupled, collate=collate_coupled`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bridge_stg.data.frame_sampling import frames_inside
from bridge_stg.models import BridgeSTGConfig, BridgeSTGForVideoGrounding, BridgeSTGProcessor
from bridge_stg.models.decoding import CachedDecoding, encode_clips
from bridge_stg.models.grounding import ClipPrediction, read_answer
from bridge_stg.models.outputs import BridgeSTGOutput
from bridge_stg.models.processing_bridge_stg import answer_text
from bridge_stg.training import TrainingBatch, TrainingConfig, TrainingItem, build_model, collate_grounding

_BOX = re.compile(r"(\d{1,4}),(\d{1,4}),(\d{1,4}),(\d{1,4})")


def tube_text(boxes: np.ndarray) -> str:
    """Boxes `[n, 4]` xyxy in [0, 1] as n lines of four numbers in 0..1000."""
    return "\n".join(",".join(map(str, row)) for row in np.clip(np.rint(boxes * 1000), 0, 1000).astype(int).tolist())


def parse_tube(text: str, count: int) -> np.ndarray:
    """Read the boxes of an answer, xyxy in [0, 1], for `count` frames; missing ones are filled in.

    Corners in the wrong order are swapped and lines that hold no box are skipped. Boxes that are too many are left
    out, the last one stands in for those that are missing, and the whole frame where there is none at all.

    Returns:
        float64 `[count, 4]`.
    """
    lines = (_BOX.fullmatch("".join(line.split())) for line in text.split("\n"))
    found = np.array([[int(value) for value in match.groups()] for match in lines if match], dtype=np.float64)
    if not len(found):
        found = np.array([[0.0, 0.0, 1000.0, 1000.0]])
    found = found[np.minimum(np.arange(count), len(found) - 1)] / 1000
    low, high = np.minimum(found[:, :2], found[:, 2:]), np.maximum(found[:, :2], found[:, 2:])
    return np.concatenate([low, high], axis=1).clip(0, 1)


def training_answer(item: TrainingItem) -> str:
    """Write all labels of a training item as text: the interval or another answer, and the boxes."""
    times, interval = item.times, item.interval
    lines = []
    if item.answer is not None:
        lines.append(item.answer)
    elif interval is not None:
        edges = [*times, 2 * times[-1] - times[-2]]
        lines.append(answer_text((edges[interval[0]], edges[interval[1]])))
    start, end = (0, len(times)) if interval is None else interval
    boxes = item.boxes[start:end]
    if len(boxes) and not np.isnan(boxes).any():
        lines.append(tube_text(boxes))
    return "\n".join(lines)


def collate_coupled(groups: Sequence[Sequence[TrainingItem]], processor: BridgeSTGProcessor) -> TrainingBatch:
    """`collate_grounding` with the whole tube in the answer, and nothing for a spatial decoder."""
    items = [replace(item, answer=training_answer(item), hide_answer=False) for group in groups for item in group]
    batch = collate_grounding([items], processor)
    spatial = ("hidden_answer", "frame_index", "frame_times")
    return replace(batch, inputs={name: value for name, value in batch.inputs.items() if name not in spatial})


def build_coupled(config: TrainingConfig) -> tuple[CoupledForVideoGrounding, BridgeSTGProcessor]:
    """`build_model` for the baseline: the backbone of the same configuration, seed and start."""
    bridged, processor = build_model(config)
    return CoupledForVideoGrounding.around(bridged), processor


class CoupledForVideoGrounding(BridgeSTGForVideoGrounding):
    """A backbone that answers with text alone; reads, trains, saves and predicts like `BridgeSTGForVideoGrounding`.

    It has no bridging tokens in its sequences and no spatial half.
    """

    def __init__(self, config: BridgeSTGConfig, backbone: Any = None) -> None:
        super().__init__(config, backbone)
        for name in [name for name, _ in self.named_children() if name != "backbone"]:
            delattr(self, name)

    @classmethod
    def around(cls, bridged: BridgeSTGForVideoGrounding) -> CoupledForVideoGrounding:
        """The baseline on the backbone and the processor of another model, which it shares and changes."""
        model = cls(bridged.config, bridged.backbone)
        model.processor = bridged.processor
        model.processor.bridge_tokens = 0
        return model

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> CoupledForVideoGrounding:
        """A saved baseline with its processor."""
        model = cls.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        model.processor = BridgeSTGProcessor.from_pretrained(folder, local_files_only=True)
        return model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        video_grid_thw: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        return_loss: bool = False,
    ) -> BridgeSTGOutput:
        """One teacher-forced pass over text, video and answer; arguments as in `BridgeSTGForVideoGrounding`.

        The trainer computes the loss: there is none in the output.
        """
        visual = self.encode_video(pixel_values, video_grid_thw)
        positions, _ = self.position_ids(input_ids, attention_mask, visual.grid)
        clips = [visual.tokens(clip) for clip in range(len(input_ids))]
        (states,), _ = self.read_prompt(
            input_ids, clips, all_states=False, position_ids=positions, attention_mask=attention_mask, use_cache=False
        )
        if labels is None:
            return BridgeSTGOutput()
        target = F.pad(labels[:, 1:], (0, 1), value=-100)
        chosen = target != -100
        return BridgeSTGOutput(answer_logits=self.backbone.lm_head(states[chosen]), answer_targets=target[chosen])

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
        """As `BridgeSTGForVideoGrounding.predict`.

        An interval that cannot be read is the whole clip, and then `interval_source` is "presence". For the oracle
        the true interval is put into the answer, and the boxes are written after it.
        """
        self.eval()
        processor = self.processor
        inputs = processor(frames, times, sentences).to(self.device)
        grids = inputs["video_grid_thw"]
        clips: dict[int, list[torch.Tensor]] = {}
        for members, visual in encode_clips(self, inputs["pixel_values"], grids):
            clips |= {clip: visual.tokens(place) for place, clip in enumerate(members)}
        in_order = [clips[clip] for clip in range(len(sentences))]
        decoding = CoupledDecoding(self, inputs["input_ids"], inputs["attention_mask"], in_order, grids[:, 1:])
        limit = answer_limit(processor.tokenizer, max(map(len, times)))
        answers = decoding.write(processor.tokenizer, limit)
        oracle = [""] * len(sentences)
        if oracle_intervals is not None:
            heads = [answer_text(interval) + "\n" for interval in oracle_intervals]
            oracle = decoding.write(processor.tokenizer, limit, heads)
        found = []
        for clip, answer in enumerate(answers):
            read = read_answer(answer, times[clip], durations[clip])
            interval = read or (float(times[clip][0]), float(durations[clip]))
            inside = frames_inside(times[clip], interval, None)
            chosen = frames_inside(times[clip], interval, spatial_fps)
            presence = np.zeros(len(times[clip]))
            presence[inside] = 1.0
            prediction = ClipPrediction(
                answer=answer,
                interval=interval,
                interval_source="presence" if read is None else "text",
                presence=presence,
                frames=chosen,
                boxes=parse_tube(answer, len(inside))[np.isin(inside, chosen)],
            )
            if oracle_intervals is not None:
                true = frames_inside(times[clip], oracle_intervals[clip], None)
                prediction = replace(prediction, oracle_frames=true, oracle_boxes=parse_tube(oracle[clip], len(true)))
            found.append(prediction)
        return found


class CoupledDecoding(CachedDecoding):
    """One prefill, then as many greedy answers on its KV cache as are asked for."""

    def write(self, tokenizer: Any, limit: int, heads: Sequence[str] | None = None) -> list[str]:
        """Greedy text of at most `limit` tokens a row, after `heads` where they are given (not in the result)."""
        end, pad = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.pad_token_id
        mask, position = self.mask, self.position
        states = self.prompt_states
        if heads is not None:
            rows = [tokenizer(head)["input_ids"] for head in heads]
            width = max(map(len, rows))
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=mask.device)
            real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=mask.device)
            states = self._step(ids, real.bool(), self.mask)[-1]
            self.mask = torch.cat([self.mask, real], dim=1)
        running = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
        generated = []
        for _ in range(limit):
            ids = torch.where(running, self._logits(states).argmax(-1), pad)
            generated.append(ids)
            running = running & (ids != end)
            if not bool(running.any()):
                break
            states = self._step(ids[:, None], running[:, None], self.mask)[-1]
            self.mask = torch.cat([self.mask, running[:, None].long()], dim=1)
        self.cache.crop(self.prompt_length - self.cache.get_seq_length())  # a negative number is taken off the end
        self.mask, self.position = mask, position
        return tokenizer.batch_decode(torch.stack(generated, 1), skip_special_tokens=True)


def answer_limit(tokenizer: Any, frames: int) -> int:
    """Tokens of the longest answer for a clip of so many frames, and one more."""
    box = tube_text(np.array([[0.1, 0.1, 1.0, 1.0]]))
    longest = "\n".join([answer_text((10.5, 20.5)), *[box] * frames])
    return len(tokenizer(longest)["input_ids"]) + 1
