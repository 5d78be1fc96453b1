"""The tiny default model: a Qwen2.5-VL configuration of 1.2 M parameters, and a word tokenizer."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig

from .configuration_bridge_stg import BridgeSTGConfig
from .processing_bridge_stg import BridgeSTGProcessor

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|unk|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def tiny_tokenizer(words: tuple[str, ...], *, bridge_tokens: int, longest_s: float = 30.0) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer; lower-cased words, punctuation, digits and times with one decimal are tokens.

    Args:
        words: the vocabulary of sentences.
        bridge_tokens: M, number of bridging tokens.
        longest_s: times below this many seconds are one token (`3.5`); longer ones are spelt in digits.
    """
    times = [f"{tenth / 10:.1f}" for tenth in range(int(longest_s * 10))]
    chat = ["user", "assistant", "from", "to", "s", ".", "?", ",", "\n", *"0123456789"]
    specials = [*SPECIAL_TOKENS, *(f"<|bridge_{i}|>" for i in range(bridge_tokens))]
    vocabulary = dict.fromkeys([*specials, *chat, *times, *words])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    # A time below the bound stays whole; everything else splits into words, single digits and punctuation.
    short_time = rf"(?<![\d.])[0-{int(longest_s) // 10 - 1}]?\d\.\d(?!\d)"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{short_time}|[a-z]+|\n|[^\sa-z]"), "removed", invert=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|unk|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[token for token in specials if token not in ("<|unk|>", "<|endoftext|>")],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    return fast


def tiny_processor(words: tuple[str, ...], *, bridge_tokens: int = 4, **overrides: Any) -> BridgeSTGProcessor:
    """Build the tiny model's processor: frames of 64 x 64 pixels, patches of 8, 4 frames a second, at most 24."""
    settings: dict[str, Any] = {
        "patch_size": 8,
        "min_pixels": 64 * 64,
        "max_pixels": 64 * 64,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.25, 0.25, 0.25),
        "fps": 4.0,
        "max_frames": 24,
        "timestamp_format": "{:.1f}",
    }
    tokenizer = tiny_tokenizer(words, bridge_tokens=bridge_tokens)
    return BridgeSTGProcessor(tokenizer, bridge_tokens=bridge_tokens, **(settings | overrides))


def tiny_config(processor: BridgeSTGProcessor, **overrides: Any) -> BridgeSTGConfig:
    """Build the tiny model's configuration; `overrides` are fields of `BridgeSTGConfig`.

    At these widths weights need `initializer_range` 0.08; with the stock 0.02, made for wide models, activations
    vanish.
    """
    token_id = processor.tokenizer.convert_tokens_to_ids
    backbone = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "initializer_range": 0.08,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": processor.tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": processor.patch_size,
            "spatial_merge_size": processor.merge_size,
            "temporal_patch_size": processor.temporal_patch_size,
            "window_size": 512,
            "fullatt_block_indexes": [0, 1],
            "out_hidden_size": 128,
            "initializer_range": 0.08,
        },
        video_token_id=token_id("<|video_pad|>"),
        image_token_id=token_id("<|image_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    settings: dict[str, Any] = {
        "bridge_tokens": processor.bridge_tokens,
        "bridge_layers": 3,
        "bridge_token_id": token_id("<|bridge_0|>"),
        "decoder_dim": 96,
        "decoder_heads": 4,
        "decoder_ffn_dim": 256,
        "score_dim": 32,
        "interval_source": "text",
    }
    return BridgeSTGConfig(backbone_config=backbone, **(settings | overrides))
