"""Tube completion latency: all boxes of a tube after the first answer token, coupled against decoupled.

Latency = time of the whole answer - time to the first token (Parallel Tube Decoding, arXiv 2608.28192), batch 1:
decoding and preparing the video, the vision tower and the prefill, which all of them share, are not in it.
What is left of Bridge-STG is the rest of the temporal answer, one forward of the bridging tokens and the spatial
decoder; of the coupled baseline, one forward for every further token of the interval and of T boxes.

Both run on the shipped tiny backbone, by the decoding that `predict` uses. The weights do not choose the length: every
token is computed, and then the one of the true answer is taken, which is from 0.0 s to the end of the clip with a box
for every frame. So all answers are as long as a well-formed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .harness import Benchmark, Case, Inputs, Prepared, Provider, Work

FPS = 4.0


def cases(device: str, quick: bool) -> list[Case]:
    frames = (8,) if quick else (64, 32, 16, 8)
    return [Case(f"T{count}", torch.float32, {"frames": count}, series="T", x=count) for count in frames]


@cache
def tiny_model(device: torch.device) -> Any:
    """Bridge-STG as shipped; the coupled baseline is its backbone alone."""
    from bridge_stg.models import load_model

    return load_model().to(device)


class Clip:
    """A clip of T frames after its prefill, and the true answers to it.

    Attributes:
        decoding: what is left of the prefill, on which both answer.
        interval, tube: tokens of the temporal answer, and of the interval with a box for every frame.
    """

    def __init__(self, model: Any, frames: int, seed: int) -> None:
        from bridge_stg.data import SyntheticTubes
        from bridge_stg.models.decoding import encode_clips
        from bridge_stg.models.processing_bridge_stg import answer_text

        from .baselines.coupled import tube_text

        clip = SyntheticTubes("test", seed=seed, count=1, frame_count=frames, fps=FPS, size=(64, 64))[0]
        tokenizer = model.processor.tokenizer
        self.model, self.count = model, frames
        times = [frame / FPS for frame in range(frames)]
        inputs = model.processor([clip.render()], [times], [clip.sentence]).to(model.device)
        self.times, self.ids = inputs["frame_times"], inputs["input_ids"]
        ((_, self.visual),) = encode_clips(model, inputs["pixel_values"], inputs["video_grid_thw"])
        grids = inputs["video_grid_thw"][:, 1:]
        self.decoding = told_decoding()(model, self.ids, inputs["attention_mask"], [self.visual.tokens(0)], grids)
        self.prefilled = self.decoding.mask, self.decoding.position, self.decoding.unread
        interval = answer_text((0.0, frames / FPS))
        self.interval = tokenizer(f"{interval}<|im_end|>")["input_ids"]
        self.tube = tokenizer(f"{interval}\n{tube_text(clip.boxes())}<|im_end|>")["input_ids"]

    def rewind(self, script: Sequence[int] = ()) -> Any:
        """The decoding as the prefill left it, to say `script`."""
        decoding = self.decoding
        if (extra := decoding.cache.get_seq_length() - decoding.prompt_length) > 0:
            decoding.cache.crop(-extra)
        decoding.mask, decoding.position, decoding.unread = self.prefilled
        decoding.script = iter(script)
        return decoding


@cache
def told_decoding() -> Any:
    """Greedy decoding that computes every token, and then takes the next one of `script`."""
    from .baselines.coupled import CoupledDecoding

    class ToldDecoding(CoupledDecoding):
        script: Iterator[int]

        def _logits(self, states: Tensor) -> Tensor:
            logits = super()._logits(states)
            logits[:, next(self.script)] = torch.inf
            return logits

    return ToldDecoding


def inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    seed = int(torch.randint(1 << 30, (1,), generator=generator, device=device))
    with torch.inference_mode():
        return {"clip": Clip(tiny_model(device), case.sizes["frames"], seed)}


def reference(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """A box for every frame; which one is not what is measured here."""
    return (torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(case.sizes["frames"], 4),)


def disagreement(case: Case, inputs: Inputs, outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    """A tube earns a time when it has a well-formed box inside of every frame."""
    boxes = outputs[0]
    good = ((boxes >= 0) & (boxes <= 1)).all(-1) & (boxes[:, :2] <= boxes[:, 2:]).all(-1)
    return None if bool(good.all()) else f"{int((~good).sum())} of {len(boxes)} boxes are none"


def work(case: Case, mode: str) -> Work:
    """The weights of the LLM and of the spatial half, read once, and their products with the bridging tokens."""
    model = tiny_model(torch.device("cpu"))
    count = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in model.backbone.model.visual.parameters()
    )
    return Work(count * case.dtype.itemsize, 2 * count * model.config.bridge_tokens)


def decoupled_tube(clip: Clip, *, text: bool) -> Tensor:
    """Boxes `[T, 4]` of Bridge-STG; without `text` the interval is read from the presence curve, as is the default."""
    from bridge_stg.models.decoding import SpatialPass

    model, decoding = clip.model, clip.rewind(clip.interval)
    if text:
        decoding.generate(model.processor.tokenizer)
    queries = decoding.bridge(torch.tensor([text], device=decoding.mask.device))
    states, ends = model.group_states(clip.ids, decoding.prompt_states, clip.visual)
    memory = model.visual_memory(clip.visual, states)
    spatial = SpatialPass(model, queries, memory, clip.visual, clip.times, [clip.count])
    _, best = spatial.presence()
    model.relevance_logits(states, ends).float().sigmoid().cpu()
    boxes, _ = spatial.boxes([np.arange(clip.count)], best)
    return torch.from_numpy(boxes[0])


def coupled_tube(clip: Clip) -> Tensor:
    """Boxes `[T, 4]` of the coupled baseline."""
    from .baselines.coupled import parse_tube

    (text,) = clip.rewind(clip.tube).write(clip.model.processor.tokenizer, len(clip.tube))
    return torch.from_numpy(parse_tube(text, clip.count)).float()


def _prepared(tube: Callable[..., Tensor], **options: bool) -> Callable[[Case, torch.device], Prepared]:
    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (tube(inputs["clip"], **options),)

    return lambda case, device: Prepared(call)


def providers(case: Case, device: torch.device) -> Sequence[Provider]:
    return [
        Provider("bridge_stg (interval as text)", _prepared(decoupled_tube, text=True), ours=True, subject=True),
        Provider("bridge_stg (interval from presence)", _prepared(decoupled_tube, text=False), ours=True),
        Provider("coupled, boxes as text", _prepared(coupled_tube)),
    ]


# A prefill leaves its cache warm, so that few clips will do.
BENCHMARK = Benchmark("tube_latency", cases, inputs, providers, reference, disagreement, work, input_sets=2)
