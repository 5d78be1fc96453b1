"""Sizes of published checkpoints, as their config.json says: enough to count their parameters without them."""

from __future__ import annotations

from typing import Any


def _qwen25(
    hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int, tied: bool
) -> Any:
    return {
        "model_type": "qwen2_5_vl",
        "config": {
            "text_config": {
                "hidden_size": hidden,
                "intermediate_size": intermediate,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": key_heads,
                "vocab_size": vocabulary,
                "tie_word_embeddings": tied,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            },
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": hidden,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
            "tie_word_embeddings": tied,
        },
    }


def _qwen3(text: dict[str, Any], vision: dict[str, Any], tied: bool) -> dict[str, Any]:
    shared = {
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    }
    fixed = {"num_heads": 16, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return {
        "model_type": "qwen3_vl",
        "config": {
            "text_config": shared | text,
            "vision_config": fixed | vision | {"out_hidden_size": text["hidden_size"]},
            "tie_word_embeddings": tied,
        },
    }


PUBLISHED: dict[str, Any] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen25(2048, 11008, 36, 16, 2, 151936, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen25(3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3(
        {"hidden_size": 2560, "intermediate_size": 9728},
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]},
        True,
    ),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3(
        {"hidden_size": 4096, "intermediate_size": 12288},
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]},
        False,
    ),
}
