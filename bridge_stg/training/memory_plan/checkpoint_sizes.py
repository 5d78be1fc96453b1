"""Sizes of checkpoints on the Hub, as their config.json says: enough to count their parameters without them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ...errors import ConfigError
from ...models.backbones import FAMILIES


def backbone_config(name: str) -> PreTrainedConfig:
    """The configuration of a backbone: that of a folder, or of a checkpoint whose sizes are listed here.

    Raises:
        ConfigError: it is neither, or of no family that the model can stand on.
    """
    if Path(name).is_dir():
        found = AutoConfig.from_pretrained(name, local_files_only=True)
    elif name in CHECKPOINTS:
        found = CHECKPOINTS[name]()
    else:
        known = ", ".join(CHECKPOINTS)
        raise ConfigError(f"{name} is neither a folder nor one of {known}, whose sizes are known here.")
    if found.model_type not in FAMILIES:
        raise ConfigError(f"{name} is a {found.model_type} model; backbones are {', '.join(FAMILIES)}.")
    return found


_TEXT_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "vocab_size",
)


def _qwen25(*sizes: int, tied: bool) -> PreTrainedConfig:
    """A Qwen2.5-VL whose LLM has these `_TEXT_SIZES`; all sizes have one vision tower."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = dict(zip(_TEXT_SIZES, sizes, strict=True)) | {"tie_word_embeddings": tied, "rope_parameters": rope}
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return AutoConfig.for_model("qwen2_5_vl", text_config=text, vision_config=vision, tie_word_embeddings=tied)


def _qwen3(*sizes: int, tied: bool, **vision: Any) -> PreTrainedConfig:
    """A Qwen3-VL whose LLM has these `_TEXT_SIZES`, and the sizes of its vision tower that differ between models."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    text = dict(zip(_TEXT_SIZES, sizes, strict=True)) | {"tie_word_embeddings": tied, "rope_parameters": rope}
    vision |= {"num_heads": 16, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return AutoConfig.for_model(
        "qwen3_vl",
        text_config=text | {"head_dim": 128},
        vision_config=vision | {"out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=tied,
    )


_TOWER_4B = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_TOWER_8B = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
CHECKPOINTS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": partial(_qwen25, 2048, 11008, 36, 16, 2, 151936, tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": partial(_qwen25, 3584, 18944, 28, 28, 4, 152064, tied=False),
    "Qwen/Qwen3-VL-4B-Instruct": partial(_qwen3, 2560, 9728, 36, 32, 8, 151936, tied=True, **_TOWER_4B),
    "Qwen/Qwen3-VL-8B-Instruct": partial(_qwen3, 4096, 12288, 36, 32, 8, 151936, tied=False, **_TOWER_8B),
}
