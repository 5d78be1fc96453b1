"""`BridgeSTGProcessor` makes model inputs of frames, times and a sentence; the text of answers is written and read."""

from __future__ import annotations

import copy
import os
import re
import threading
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize  # the one without torchvision

from ..errors import BridgeSTGError, ModelError, SampleError
from ..ops import patchify_videos
from ..settings import show
from .model_files import PROCESSOR_FILE, check_template, save_whole, unreadable
from .processor_settings import PROCESSOR_RULES, check_processor_settings, is_slip

# Fields that `transformers` writes into processor_config.json beside the constructor's arguments.
_FOREIGN = ("processor_class", "auto_map", "chat_template", "transformers_version", "tokenizer", "audio_tokenizer")
_LATER = ("prompt_prefix", "prompt_suffix")  # files of the first versions lack them
_VISION_TOKENS = ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>")
_BOTH_TIMES = re.compile(r"\d\.\d\s*s\s*to\s*\d+\.\d$")
_ANSWER = re.compile(r"(\d+(?:\.\d+)?)\s*s?\s*to\s*(\d+(?:\.\d+)?)")


def answer_text(interval: tuple[float, float]) -> str:
    """The temporal answer for (start, end) in seconds: `From 3.0 s to 7.5 s.`"""
    return f"From {interval[0]:.1f} s to {interval[1]:.1f} s."


def parse_answer(text: str, duration: float) -> tuple[float, float] | None:
    """Read (start, end) in seconds, the end clamped to `duration`; None if the text holds no interval."""
    if (match := _ANSWER.search(text)) is None:
        return None
    start, end = float(match[1]), min(float(match[2]), duration)
    return (start, end) if start < end else None


def rest_of_answer(text: str) -> str | None:
    """The rest of an answer that begins with `text`; None until both its times, with one decimal, are in the text."""
    return " s." if _BOTH_TIMES.search(text) else None


class BridgeSTGProcessor(ProcessorMixin):
    """Makes the inputs of `BridgeSTGForVideoGrounding`: token ids and pixels.

    The sentence comes before the video, each temporal patch group is preceded by its time as text, the answer reads
    `From 3.0 s to 7.5 s.`, and the bridging tokens close the sequence.

    Args:
        tokenizer: a tokenizer that has the tokens `<|bridge_0|>`.. `<|bridge_{M-1}|>`, and the chat and vision tokens
            of Qwen2.5-VL.
        patch_size, temporal_patch_size, merge_size: sizes of the vision tower's patches.
        min_pixels, max_pixels: area budget of a resized frame.
        image_mean, image_std: per channel, for pixels in [0, 1].
        fps: frames a second that the MLLM sees.
        max_frames: most frames that it sees; longer clips are thinned evenly.
        bridge_tokens: M, number of bridging tokens.
        timestamp_format: format string of a group's time in seconds; "" leaves timestamps out.
        prompt_prefix, prompt_suffix: what the chat template writes around the user's turn.

    Threads may share a processor: a call depends on its arguments alone, whatever padding or truncation another thread
    sets on the tokenizer.

    Raises:
        ConfigError: a setting is of the wrong type or out of range.
    """

    attributes: ClassVar[list[str]] = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    image_mean: list[float]
    image_std: list[float]
    fps: float
    max_frames: int
    bridge_tokens: int
    timestamp_format: str
    prompt_prefix: str
    prompt_suffix: str

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
        given = locals()
        for name, value in check_processor_settings({name: given[name] for name in PROCESSOR_RULES}).items():
            setattr(self, name, value)
        super().__init__(tokenizer, **kwargs)

    def settings(self) -> dict[str, Any]:
        """The arguments with which `BridgeSTGProcessor(tokenizer, **settings)` builds this processor again."""
        return {name: getattr(self, name) for name in PROCESSOR_RULES}

    # Files -----------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save as in `transformers`; each file appears whole or not at all, processor_config.json last.

        Raises:
            OutputError: the folder cannot be written.
        """
        if push_to_hub:
            kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
        save = super().save_pretrained
        return save_whole(lambda stage: save(stage, push_to_hub=push_to_hub, **kwargs), save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load as in `transformers`.

        Raises:
            ModelError: a file is missing or torn, a field in it is missing, unknown, or of the wrong type or range, or
                the tokenizer lacks a token.
            ConfigError: a field among the arguments is unknown, or of the wrong type or range.
        """
        check_processor_settings({name: kwargs[name] for name in kwargs if name in PROCESSOR_RULES or is_slip(name)})
        try:
            check_template(os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
            found = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except BridgeSTGError:
            raise
        except Exception as error:  # transformers and tokenizers raise a dozen kinds here
            raise unreadable(pretrained_model_name_or_path, error) from error
        processor, rest = found if isinstance(found, tuple) else (found, None)
        processor.check_tokens(str(pretrained_model_name_or_path))
        return found if rest is None else (processor, rest)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Read the settings as in `transformers`, and check every field.

        Raises:
            ModelError: see `from_pretrained`.
        """
        values, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        place = f"{pretrained_model_name_or_path}/{PROCESSOR_FILE}"
        if not set(values) - {"chat_template"}:
            raise ModelError(f"{pretrained_model_name_or_path} is incomplete: it has no {PROCESSOR_FILE}.")
        own = {name: value for name, value in values.items() if name not in _FOREIGN}
        checked = check_processor_settings(own, place, error=ModelError)
        if missing := [name for name in PROCESSOR_RULES if name not in own and name not in _LATER]:
            raise ModelError(f"{place} is incomplete: it must have {missing[0]}, {PROCESSOR_RULES[missing[0]]}.")
        return values | checked, rest

    def check_tokens(self, place: str) -> None:
        """Raise ModelError, which names `place`, if the tokenizer lacks a token that the model's inputs need."""
        wanted = [*_VISION_TOKENS, "<|im_end|>", *(f"<|bridge_{i}|>" for i in range(self.bridge_tokens))]
        known = self.tokenizer.get_vocab()
        if missing := [token for token in wanted if token not in known]:
            raise ModelError(f"The tokenizer in {place} is incomplete: it must have the token {missing[0]}.")
        if self.tokenizer.pad_token_id is None:
            raise ModelError(f"The tokenizer in {place} is incomplete: it must have a padding token.")

    # Pixels ----------------------------------------------------------------------------------------------------

    def pixel_values(
        self, frames: torch.Tensor | np.ndarray | Sequence[torch.Tensor | np.ndarray]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut clips into patches.

        Args:
            frames: one clip uint8 `[T, H, W, 3]`, or several.

        Returns:
            (pixel_values float32 `[rows, 3*tp*P*P]`, grid_thw int64 `[clips, 3]`).

        Frames are resized to multiples of patch x merge, area within the budget, aspect nearly kept, by the rules of
        Qwen2-VL.
        """
        clips = [frames] if isinstance(frames, (torch.Tensor, np.ndarray)) else list(frames)
        videos = [torch.as_tensor(np.ascontiguousarray(c) if isinstance(c, np.ndarray) else c) for c in clips]
        unit = self.patch_size
        grids = [self.frame_grid(*video.shape[1:3]) for video in videos]
        return patchify_videos(
            videos,
            size=[(rows * unit, columns * unit) for rows, columns in grids],
            patch_size=unit,
            temporal_patch_size=self.temporal_patch_size,
            merge_size=self.merge_size,
            mean=self.image_mean,
            std=self.image_std,
            layout="THWC",
        )

    def frame_grid(self, height: int, width: int) -> tuple[int, int]:
        """Numbers (rows, columns) of patches that a frame of this height and width in pixels is cut into.

        Raises:
            SampleError: the frame is empty, or too elongated for the rules of Qwen2-VL.
        """
        factor = self.patch_size * self.merge_size
        try:
            rows, columns = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
        except (ValueError, ZeroDivisionError) as error:
            raise SampleError(f"Frames of {width} x {height} pixels cannot be resized: {error}.") from error
        return rows // self.patch_size, columns // self.patch_size

    # Text ------------------------------------------------------------------------------------------------------

    def prompt(self, sentence: str, group_times: Sequence[float], tokens_per_group: int) -> str:
        """Write the prompt: sentence, time and placeholders of every temporal group, start of the answer's turn.

        In the sentence `<|` becomes `< |`, so that it cannot hold special tokens.

        Raises:
            SampleError: the sentence is not a text, is empty, or holds a lone surrogate, which no tokenizer takes.
        """
        if not isinstance(sentence, str):
            raise SampleError(f"The sentence must be a text, got {type(sentence).__name__}.")
        sentence = " ".join(sentence.split()).replace("<|", "< |")
        if not sentence:
            raise SampleError("The sentence must not be empty.")
        try:
            sentence.encode()
        except UnicodeEncodeError as error:
            raise SampleError(f"The sentence must be UTF-8 text, got {show(sentence)}.") from error
        visual = "<|vision_start|>" + "<|video_pad|>" * tokens_per_group + "<|vision_end|>"
        groups = "".join(self.timestamp_format.format(time) + visual for time in group_times)
        return f"{self.prompt_prefix}{sentence}\n{groups}{self.prompt_suffix}"

    def bridge_text(self) -> str:
        return "".join(f"<|bridge_{i}|>" for i in range(self.bridge_tokens))

    def group_times(self, frame_times: Sequence[float]) -> list[float]:
        """Mean time of every temporal group; the last frame repeats in a group that is not full."""
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
        """Make the inputs of a batch of clips, whose frame counts and sizes may differ.

        Args:
            frames: B arrays uint8 `[T, H, W, 3]`.
            frame_times: B lists of T seconds; in the features, the last one repeats behind shorter clips.
            sentences: B texts.
            answers: B answer texts, None for no answer; used in training only.
            training: True closes every sequence with its answer and the bridging tokens, padded on the right; False
                stops where the answer begins, padded on the left.

        Returns:
            `input_ids`, `attention_mask`, `pixel_values`, `video_grid_thw`, `frame_times`; with `training` also
            `labels` and `answer_tokens` (bool).

        Raises:
            ValueError: there are not as many frames, times, sentences and answers, or a time is not finite.
            SampleError: a sentence is empty, or does not fit the context.
        """
        _check_batch(frames, frame_times, sentences, answers)
        pixels, grids = self.pixel_values(frames)
        texts = [
            self.prompt(sentence, self.group_times(times), int(grid[1:].prod()) // self.merge_size**2)
            for sentence, times, grid in zip(sentences, frame_times, grids, strict=True)
        ]
        prompts = [self._token_ids(text) for text in texts]
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

    def _token_ids(self, text: str) -> list[int]:
        """The ids of a text, without padding or truncation.

        A fast tokenizer keeps the padding and truncation of its last call as a state that all threads share. The copy
        used here has neither.
        """
        tokenizer = self.tokenizer
        if not tokenizer.is_fast:
            return list(tokenizer(text)["input_ids"])
        with _LOCK:
            size, encoder = _ENCODERS.get(tokenizer, (0, None))
            if encoder is None or size != len(tokenizer):  # tokens were added
                size, encoder = len(tokenizer), copy.deepcopy(tokenizer.backend_tokenizer)
                encoder.no_padding()
                encoder.no_truncation()
                _ENCODERS[tokenizer] = size, encoder
        return list(encoder.encode(text).ids)

    def _training_text(self, prompts: list[list[int]], answers: Sequence[str | None]) -> dict[str, torch.Tensor]:
        bridge = self._token_ids(self.bridge_text())
        sequences, labels, hidden = [], [], []
        for prompt, text in zip(prompts, answers, strict=True):
            answer = [] if text is None else self._token_ids(text + "<|im_end|>")
            sequences.append(prompt + answer + bridge)
            labels.append([-100] * len(prompt) + answer + [-100] * len(bridge))
            hidden.append([0] * len(prompt) + [1] * len(answer) + [0] * len(bridge))
        padded = _pad(sequences, self.tokenizer.pad_token_id)
        length = padded["input_ids"].shape[1]
        padded["labels"] = torch.tensor([row + [-100] * (length - len(row)) for row in labels])
        padded["answer_tokens"] = torch.tensor([row + [0] * (length - len(row)) for row in hidden]).bool()
        return padded


_LOCK = threading.Lock()
_ENCODERS: weakref.WeakKeyDictionary[Any, tuple[int, Any]] = weakref.WeakKeyDictionary()


def _check_batch(frames: Any, times: Any, sentences: Any, answers: Any) -> None:
    frames = [frames] if isinstance(frames, (torch.Tensor, np.ndarray)) else frames
    for name, values in (("frame_times", times), ("sentences", sentences), ("answers", answers)):
        if isinstance(values, str):
            raise ValueError(f"{name} must be a list, got the text {values!r}.")
        if values is not None and len(values) != len(frames):
            raise ValueError(f"{name} must be as many as the {len(frames)} clips, got {len(values)}.")
    for i, (clip, seconds) in enumerate(zip(frames, times, strict=True)):
        if len(seconds) != len(clip) or not np.isfinite(seconds).all():
            rule = f"must be finite, one for each of {len(clip)} frames"
            raise ValueError(f"frame_times[{i}] {rule}, got {list(seconds)}.")


def _pad(rows: list[list[int]], pad: int, *, left: bool = False) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids, masks = [], []
    for row in rows:
        fill = length - len(row)
        ids.append([pad] * fill + row if left else row + [pad] * fill)
        masks.append([0] * fill + [1] * len(row) if left else [1] * len(row) + [0] * fill)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}
