"""Prune the visual tokens of a stock Qwen2.5-VL before its LLM, and the prefill time that it saves.

    python -m benchmarks.studies.prefill --keep 0.5 0.25 0.1

The model keeps its classes and its weights; `prune_visual_tokens` hooks its language model for one prefill.
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
    """Within this context the LLM of `model` reads the best `keep` share of the visual tokens of one prompt.

    Visual tokens are scored by their cosine with the text tokens behind the video (the question); no training is
    needed. Those that stay keep the mRoPE positions (t, h, w) that they had among all, and so does the text.

    Args:
        model: `Qwen2_5_VLForConditionalGeneration`.
        input_ids: [1, L], with one video.
        keep: share of the visual tokens to keep, in (0, 1].
    """
    visual = (input_ids[0] == model.config.video_token_id).nonzero().flatten()
    text = (input_ids[0] != model.config.video_token_id).nonzero().flatten()
    question = text[text > visual[-1] + 1]  # behind the end of the video

    def drop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeds = kwargs["inputs_embeds"]  # [1, L, D]
        count = max(1, round(keep * len(visual)))
        queries = torch.nn.functional.normalize(embeds[:, question], dim=-1)
        picked = prune_tokens(embeds[:, visual], queries, count, scoring="cosine")
        stay = torch.cat([text, visual[picked.index[0]]]).sort().values
        kwargs |= {"inputs_embeds": embeds[:, stay], "position_ids": kwargs["position_ids"][..., stay]}
        for name in ("attention_mask", "cache_position"):
            if isinstance(kwargs.get(name), Tensor):
                kwargs[name] = kwargs[name][..., : len(stay)]  # one prompt without padding: all ones, or 0, 1, 2...
        return args, kwargs

    hook = model.model.language_model.register_forward_pre_hook(drop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@torch.inference_mode()
def answer(model: Any, inputs: dict[str, Tensor], keep: float, tokens: int) -> Tensor:
    """Greedy continuation [tokens] of one prompt after pruning; decoding reads the shorter cache."""
    with prune_visual_tokens(model, inputs["input_ids"], keep):
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    position = inputs["input_ids"].shape[1] + model.model.rope_deltas  # [1, 1], as if nothing had been dropped
    found = []
    for _ in range(tokens):
        found.append(output.logits[:, -1].argmax(-1))
        embeds = model.get_input_embeddings()(found[-1][:, None])
        states = model.model.language_model(
            inputs_embeds=embeds,
            position_ids=position.expand(3, 1, 1),
            past_key_values=output.past_key_values,
            use_cache=True,
        ).last_hidden_state
        output.logits, position = model.lm_head(states), position + 1
    return torch.cat(found)


def stock_model(width: int, layers: int, patch_size: int = 14) -> Any:
    """A Qwen2.5-VL of random weights; its LLM has heads of 64, four to a key head, as the 3B and 7B have groups."""
    from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    heads = width // 64
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 1024,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 4),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": patch_size,
            "out_hidden_size": width,
            "fullatt_block_indexes": [0],
        },
        image_token_id=1000,
        video_token_id=1001,
        vision_start_token_id=1002,
        vision_end_token_id=1003,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def prompt(groups: int, rows: int, columns: int, patch_size: int = 14, device: str = "cpu") -> dict[str, Tensor]:
    """A prompt with one video of `groups` temporal groups of rows x columns merged tokens, and a question of ten."""
    generator = torch.Generator().manual_seed(1)
    visual = groups * rows * columns
    words = torch.randint(0, 999, (16,), generator=generator)
    ids = torch.cat([words[:4], torch.tensor([1002]), torch.full((visual,), 1001), torch.tensor([1003]), words[6:]])
    pixels = torch.randn(4 * visual, 6 * patch_size**2, generator=generator)
    inputs = {
        "input_ids": ids[None],
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "mm_token_type_ids": torch.where(ids == 1001, 2, 0)[None],
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([[groups, 2 * rows, 2 * columns]]),
        "second_per_grid_ts": torch.tensor([1.0]),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _prefill_seconds(model: Any, inputs: dict[str, Tensor], keep: float | None) -> float:
    """Seconds that the LLM and the pruning before it take; the vision tower is left out."""
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
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--groups", type=int, default=16, help="temporal groups of 8 x 12 merged tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = stock_model(options.width, options.layers).to(options.device, dtype)
    inputs = prompt(options.groups, 8, 12, device=options.device)
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
