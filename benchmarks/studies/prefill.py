"""The prefill time that pruning the video tokens of a stock Qwen2.5-VL or Qwen3-VL saves.

    python -m benchmarks.studies.prefill --keep 0.5 0.25 0.1

The model keeps its classes and its weights; `prune_visual_tokens` hooks its language model, as docs/prune_tokens.md
shows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bridge_stg import prune_tokens


@contextmanager
def prune_visual_tokens(model: Any, input_ids: Tensor, keep: float) -> Iterator[None]:
    """Within this context the LLM of `model` reads the best share `keep` of the video tokens of each prompt.

    Args:
        model: `Qwen2_5_VLForConditionalGeneration` or `Qwen3VLForConditionalGeneration`, with a dynamic cache.
        input_ids: [B, L] prompts as the calls inside get them, padded or not.
        keep: share of the video tokens to keep, in (0, 1].
    """
    length = input_ids.shape[1]
    read: list[Tensor] = []  # the attention mask of what the LLM read

    def choose(embeds: Tensor, ids: Tensor, stay: Tensor) -> None:
        """Score the video tokens of one row by their cosine with the question; those kept join `stay`."""
        video = (ids == model.config.video_token_id).nonzero().flatten()
        if not len(video):
            return
        text = stay & (ids != model.config.vision_end_token_id)
        question = text & (torch.arange(len(ids), device=ids.device) > video[-1])
        queries = embeds[question if question.any() else text]
        queries = torch.nn.functional.normalize(queries, dim=-1)
        kept = prune_tokens(embeds[None, video], queries[None], max(1, round(keep * len(video))), scoring="cosine")
        stay[video[kept.index[0]]] = True

    def drop(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        if embeds.shape[1] < length:  # decoding: the cache holds what was read, and what was written since
            new = kwargs["past_key_values"].get_seq_length() + embeds.shape[1] - read[0].shape[1]
            kwargs["attention_mask"] = torch.nn.functional.pad(read[0], (0, new), value=1)
            return args, kwargs
        ids = input_ids.repeat_interleave(len(embeds) // len(input_ids), 0)  # beams
        there = torch.ones_like(embeds[..., 0], dtype=torch.bool) if mask is None else mask.bool()
        stay = there.clone()
        stay[:, :length] &= ids != model.config.video_token_id
        for row in range(len(embeds)):
            choose(embeds[row, :length], ids[row], stay[row, :length])
        order = stay.int().argsort(dim=1, stable=True)[:, -int(stay.sum(1).max()) :]  # what stays comes last, in order
        read[:] = [stay.gather(1, order).long()]
        positions = kwargs["position_ids"]
        kwargs["inputs_embeds"] = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]))
        kwargs["position_ids"] = positions.gather(2, order.expand(len(positions), -1, -1))
        kwargs["attention_mask"] = read[0]
        if (visual := kwargs.get("visual_pos_masks")) is not None:  # Qwen3-VL: what DeepStack adds to visual tokens
            planes = kwargs["deepstack_visual_embeds"]
            kwargs["deepstack_visual_embeds"] = [plane[stay[visual]] for plane in planes]
            kwargs["visual_pos_masks"] = visual.gather(1, order) & read[0].bool()
        return args, kwargs

    hook = model.model.language_model.register_forward_pre_hook(drop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def stock_model(width: int, layers: int, family: str = "qwen2_5_vl", patch_size: int = 14) -> Any:
    """A stock model of random weights, whose LLM has heads of 64 dimensions, four to a key head.

    Args:
        family: "qwen2_5_vl" or "qwen3_vl".
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    heads, deep = width // 64, family == "qwen3_vl"
    text = {
        "vocab_size": 1024,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": patch_size,
        "out_hidden_size": width,
        **({"deepstack_visual_indexes": [0, 1]} if deep else {"fullatt_block_indexes": [0]}),
    }
    tokens = {"image": 1000, "video": 1001, "vision_start": 1002, "vision_end": 1003, "bos": None, "eos": None}
    ids = {f"{name}_token_id": number for name, number in tokens.items()}
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


def prompt(
    groups: int, rows: int, columns: int, family: str = "qwen2_5_vl", patch_size: int = 14, seed: int = 1
) -> dict[str, Tensor]:
    """A prompt with one video of `groups` temporal groups of rows x columns merged tokens, and a question of ten.

    Qwen3-VL has the time of each group before it, here as one token.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 999, (15 + groups,), generator=generator)
    parts, size = (groups, 1) if family == "qwen3_vl" else (1, groups)
    start, end = torch.tensor([1002]), torch.tensor([1003])
    segment = [start, torch.full((size * rows * columns,), 1001), end]
    video = [part for i in range(parts) for part in (words[15 + i : 16 + i], *segment)][1:]
    ids = torch.cat([words[:4], *video, words[5:15]])
    inputs = {
        "input_ids": ids[None],
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "mm_token_type_ids": torch.where(ids == 1001, 2, 0)[None],
        "pixel_values_videos": torch.randn(4 * groups * rows * columns, 6 * patch_size**2, generator=generator),
        "video_grid_thw": torch.tensor([[groups, 2 * rows, 2 * columns]]),
    }
    return inputs | ({} if family == "qwen3_vl" else {"second_per_grid_ts": torch.tensor([1.0])})


def _prefill_seconds(model: Any, inputs: dict[str, Tensor], keep: float | None) -> float:
    """Time the LLM and the pruning before it, in seconds, without the vision tower."""
    marks: list[float] = []

    def mark(*_: Any, **__: Any) -> None:
        if inputs["input_ids"].is_cuda:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    language = model.model.language_model
    hooks = [language.register_forward_pre_hook(mark), language.register_forward_hook(mark)]
    try:
        if keep is None:
            model(**inputs, use_cache=True, logits_to_keep=1)
        else:
            with prune_visual_tokens(model, inputs["input_ids"], keep):
                model(**inputs, use_cache=True, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return marks[1] - marks[0]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=["qwen2_5_vl", "qwen3_vl"], default="qwen2_5_vl")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--groups", type=int, default=16, help="temporal groups of 8 x 12 merged tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = stock_model(options.width, options.layers, options.family).to(options.device, dtype)
    inputs = prompt(options.groups, 8, 12, options.family)
    inputs = {name: tensor.to(options.device) for name, tensor in inputs.items()}
    shares: list[float | None] = [None, *options.keep]
    for share in shares:  # warm up
        _prefill_seconds(model, inputs, share)
    rounds = [{share: _prefill_seconds(model, inputs, share) for share in shares} for _ in range(options.rounds)]
    length, visual = inputs["input_ids"].shape[1], options.groups * 96
    print("| visual tokens kept | prompt | prefill ms | times faster |\n|---|---|---|---|")
    for share in shares:
        kept = visual if share is None else max(1, round(share * visual))
        milliseconds = 1e3 * statistics.median(times[share] for times in rounds)
        gain = statistics.median(times[None] / times[share] for times in rounds)
        print(f"| {kept} of {visual} | {length - visual + kept} | {milliseconds:.1f} | {gain:.2f} |")


if __name__ == "__main__":
    main()
