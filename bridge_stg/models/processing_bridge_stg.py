"""`BridgeSTGProcessor`: frames, times and a sentence to model inputs; the answer text and back."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from ..errors import SampleError
from .video_processing_bridge_stg import NO_TOTAL_BUDGET, BridgeSTGVideoProcessor

_NO_SETTINGS = ("self", "tokenizer", "kwargs")
_BOTH_TIMES = re.compile(r"\d\.\d\s*s\s*to\s*\d+\.\d$")
_ANSWER = re.compile(r"(\d+(?:\.\d+)?)\s*s?\s*to\s*(\d+(?:\.\d+)?)")


def answer_text(interval: tuple[float, float]) -> str:
    """The temporal answer for (start, end) in seconds: `From 3.0 s to 7.5 s.`"""
    return f"From {interval[0]:.1f} s to {interval[1]:.1f} s."


def parse_answer(text: str, duration: float) -> tuple[float, float] | None:
    """(start, end) in seconds, the end clamped to `duration`; None when the text holds no readable interval."""
    if (match := _ANSWER.search(text)) is None:
        return None
    start, end = float(match[1]), min(float(match[2]), duration)
    return (start, end) if start < end else None


def rest_of_answer(text: str) -> str | None:
    """How an answer ends that has come as far as `text`; None while its two times, of one decimal, are not there."""
    return " s." if _BOTH_TIMES.search(text) else None


class BridgeSTGProcessor(ProcessorMixin):
    """Text and pixels for `BridgeSTGForVideoGrounding`.

    The sentence comes before the video, each temporal patch group is preceded by its time as text, the answer reads
    `From 3.0 s to 7.5 s.`, and the bridging tokens close the sequence.

    Args:
        tokenizer: with the tokens `<|bridge_0|>`.. `<|bridge_{M-1}|>`, the chat and the vision tokens of Qwen2.5-VL.
        patch_size, temporal_patch_size, merge_size: of the vision tower.
        min_pixels, max_pixels: area budget of a resized frame.
        image_mean, image_std: per channel, for pixels in [0, 1].
        fps: frames a second the MLLM sees.
        max_frames: bound of their number; longer clips are thinned evenly.
        bridge_tokens: M.
        timestamp_format: format string of a group's time in seconds; "" leaves timestamps out.
        prompt_prefix, prompt_suffix: what the chat template writes around the user's turn.
    """

    attributes: ClassVar[list[str]] = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        patch_size: int = 14,
        temporal_patch_size: int = 2,
        merge_size: int = 2,
        min_pixels: int = 128 * 28 * 28,
        max_pixels: int = 768 * 28 * 28,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        fps: float = 2.0,
        max_frames: int = 64,
        bridge_tokens: int = 8,
        timestamp_format: str = "{:.1f} s",
        prompt_prefix: str = "<|im_start|>user\n",
        prompt_suffix: str = "<|im_end|>\n<|im_start|>assistant\n",
        **kwargs: Any,
    ) -> None:
        self.patch_size = patch_size
        self.temporal_patch_size = temporal_patch_size
        self.merge_size = merge_size
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.fps = fps
        self.max_frames = max_frames
        self.bridge_tokens = bridge_tokens
        self.timestamp_format = timestamp_format
        self.prompt_prefix = prompt_prefix
        self.prompt_suffix = prompt_suffix
        super().__init__(tokenizer, **kwargs)

    @classmethod
    def setting_names(cls) -> list[str]:
        """The constructor's arguments, the tokenizer aside."""
        return [name for name in inspect.signature(cls.__init__).parameters if name not in _NO_SETTINGS]

    def settings(self) -> dict[str, Any]:
        """What `BridgeSTGProcessor(tokenizer, **settings)` takes to build this processor again."""
        return {name: getattr(self, name) for name in self.setting_names()}

    # Pixels ----------------------------------------------------------------------------------------------------

    def pixel_values(
        self, frames: torch.Tensor | np.ndarray | Sequence[torch.Tensor | np.ndarray]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One clip uint8 `[T, H, W, 3]`, or several, to (pixel_values `[rows, 3*tp*P*P]` fp32, grid_thw `[clips, 3]`).

        Frames are resized to multiples of patch x merge, area within the budget, aspect nearly kept, by the rules of
        Qwen2-VL.
        """
        process = BridgeSTGVideoProcessor(
            patch_size=self.patch_size,
            temporal_patch_size=self.temporal_patch_size,
            merge_size=self.merge_size,
            size={"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            image_mean=self.image_mean,
            image_std=self.image_std,
            do_sample_frames=False,
        )
        clips = [frames] if isinstance(frames, (torch.Tensor, np.ndarray)) else list(frames)
        features = process(clips, input_data_format="channels_last", **NO_TOTAL_BUDGET)
        return features["pixel_values_videos"], features["video_grid_thw"]

    def frame_grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches that a frame of so many pixels is cut into.

        Raises:
            SampleError: the frame is too elongated for the rules of Qwen2-VL.
        """
        try:
            _, grids = self.pixel_values(np.zeros((1, height, width, 3), dtype=np.uint8))
        except ValueError as error:
            raise SampleError(f"Frames of {width} x {height} pixels cannot be resized: {error}.") from error
        return int(grids[0, 1]), int(grids[0, 2])

    # Text ------------------------------------------------------------------------------------------------------

    def prompt(self, sentence: str, group_times: Sequence[float], tokens_per_group: int) -> str:
        """The user turn: sentence, then time and placeholders of every temporal group; opens the assistant's turn.

        A sentence cannot write special tokens: its `<|` become `< |`.

        Raises:
            SampleError: the sentence is empty.
        """
        sentence = " ".join(sentence.split()).replace("<|", "< |")
        if not sentence:
            raise SampleError("The sentence must not be empty.")
        visual = "<|vision_start|>" + "<|video_pad|>" * tokens_per_group + "<|vision_end|>"
        groups = "".join(self.timestamp_format.format(time) + visual for time in group_times)
        return f"{self.prompt_prefix}{sentence}\n{groups}{self.prompt_suffix}"

    def bridge_text(self) -> str:
        return "".join(f"<|bridge_{i}|>" for i in range(self.bridge_tokens))

    def group_times(self, frame_times: Sequence[float]) -> list[float]:
        """Mean time of every temporal patch group; a missing last frame repeats."""
        size = self.temporal_patch_size
        times = list(frame_times) + [frame_times[-1]] * (-len(frame_times) % size)
        return [float(np.mean(times[i : i + size])) for i in range(0, len(times), size)]

    def __call__(
        self,
        frames: Sequence[torch.Tensor | np.ndarray],
        frame_times: Sequence[Sequence[float]],
        sentences: Sequence[str],
        answers: Sequence[str | None] | None = None,
        *,
        training: bool = False,
    ) -> BatchFeature:
        """Inputs of a batch of clips; frame counts and sizes may differ.

        Args:
            frames: B arrays uint8 `[T, H, W, 3]`.
            frame_times: B lists of T seconds; in the features, the last one repeats behind shorter clips.
            sentences: B texts.
            answers: B answer texts (None: no answer); used in training only.
            training: True closes every sequence with its answer and the bridging tokens (right padding)
                False stops where the answer begins (left padding).

        Returns:
            `input_ids`, `attention_mask`, `pixel_values`, `video_grid_thw`, `frame_times`; with `training` also
            `labels` and `answer_tokens` (bool).

        Raises:
            SampleError: an empty sentence, or one that does not fit the context.
        """
        pixels, grids = self.pixel_values(frames)
        texts = [
            self.prompt(sentence, self.group_times(times), int(grid[1:].prod()) // self.merge_size**2)
            for sentence, times, grid in zip(sentences, frame_times, grids, strict=True)
        ]
        prompts = [self.tokenizer(text)["input_ids"] for text in texts]
        frame_count = int(grids[:, 0].max()) * self.temporal_patch_size
        padded = [list(times) + [times[-1]] * (frame_count - len(times)) for times in frame_times]
        features: dict[str, Any] = {
            "pixel_values": pixels,
            "video_grid_thw": grids,
            "frame_times": torch.tensor(padded, dtype=torch.float32),
        }
        if training:
            features |= self._training_text(prompts, answers or [None] * len(prompts))
        else:
            features |= _pad(prompts, self.tokenizer.pad_token_id, left=True)
        limit = self.tokenizer.model_max_length
        if (longest := features["input_ids"].shape[1]) > limit:
            raise SampleError(
                f"The sentence and the video take {longest} tokens, the model's context holds {limit}: "
                "shorten the sentence or lower max_frames."
            )
        return BatchFeature(features)

    def _training_text(self, prompts: list[list[int]], answers: Sequence[str | None]) -> dict[str, torch.Tensor]:
        bridge = self.tokenizer(self.bridge_text())["input_ids"]
        sequences, labels, hidden = [], [], []
        for prompt, text in zip(prompts, answers, strict=True):
            answer = [] if text is None else self.tokenizer(text + "<|im_end|>")["input_ids"]
            sequences.append(prompt + answer + bridge)
            labels.append([-100] * len(prompt) + answer + [-100] * len(bridge))
            hidden.append([0] * len(prompt) + [1] * len(answer) + [0] * len(bridge))
        padded = _pad(sequences, self.tokenizer.pad_token_id)
        length = padded["input_ids"].shape[1]
        padded["labels"] = torch.tensor([row + [-100] * (length - len(row)) for row in labels])
        padded["answer_tokens"] = torch.tensor([row + [0] * (length - len(row)) for row in hidden]).bool()
        return padded


def _pad(rows: list[list[int]], pad: int, *, left: bool = False) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids, masks = [], []
    for row in rows:
        fill = length - len(row)
        ids.append([pad] * fill + row if left else row + [pad] * fill)
        masks.append([0] * fill + [1] * len(row) if left else [1] * len(row) + [0] * fill)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}
