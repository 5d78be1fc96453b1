"""Reading the configuration and the processor of a saved model, with one sentence for each fault."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from .configuration_bridge_stg import BridgeSTGConfig
from .model_files import one_line, read_json
from .processing_bridge_stg import BridgeSTGProcessor

LOADING = threading.RLock()
"""Lock to hold while `transformers` loads: it switches torch's default dtype and initialisers for all threads."""

# The first saved models lack these fields. If another one were missing, a default would silently replace what the
# model was trained with.
_LATER_FIELDS = ("separate_bridge_embeddings", "backbone_name", "backbone_fingerprint")
_PROCESSOR_FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")


def read_saved_config(folder: Path) -> BridgeSTGConfig:
    """Read the configuration of a saved model and check every field.

    Raises:
        ModelError: the file is missing or broken, it is of another kind of model, or a field is missing or wrong.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json.")
    values = read_json(path)
    if values.get("model_type", BridgeSTGConfig.model_type) != BridgeSTGConfig.model_type:
        kind = values["model_type"]
        raise ModelError(f"{folder} holds a {kind!r} model, not a {BridgeSTGConfig.model_type} one.")
    for name in ("model_type", *BridgeSTGConfig.field_names()):
        if values.get(name) is None and name not in _LATER_FIELDS:
            raise ModelError(f"{path} is incomplete: it has no {name}.")
    for name in ("dtype", "torch_dtype"):
        if (value := values.get(name)) is not None and not is_dtype(value):
            raise ModelError(f"{path} is wrong: {name} must be one of torch's, got {value!r}.")
    try:
        return BridgeSTGConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # ours is a ValueError; the backbone's classes raise a dozen kinds
        raise ModelError(f"{path} is wrong: {one_line(error)}.") from error


def read_saved_processor(folder: Path, config: BridgeSTGConfig) -> BridgeSTGProcessor:
    """Read the processor that was saved beside a model.

    Raises:
        ModelError: a file is missing or broken, or the processor belongs to another model.
    """
    for name in _PROCESSOR_FILES:
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is incomplete: it has no {name}.")
    processor = BridgeSTGProcessor.from_pretrained(folder, local_files_only=True)
    check_processor(processor, config, folder)
    return processor


def check_processor(processor: BridgeSTGProcessor, config: BridgeSTGConfig, source: Any) -> None:
    """Refuse a processor whose patches or tokens are not those of the model.

    Raises:
        ModelError: naming what differs.
    """
    vision, token_id = config.backbone_config.vision_config, processor.tokenizer.convert_tokens_to_ids
    pairs = {
        "patch_size": (processor.patch_size, vision.patch_size),
        "temporal_patch_size": (processor.temporal_patch_size, vision.temporal_patch_size),
        "merge_size": (processor.merge_size, vision.spatial_merge_size),
        "bridge_tokens": (processor.bridge_tokens, config.bridge_tokens),
        "id of <|bridge_0|>": (token_id("<|bridge_0|>"), config.bridge_token_id),
        "id of <|video_pad|>": (token_id("<|video_pad|>"), config.backbone_config.video_token_id),
        "id of <|vision_end|>": (token_id("<|vision_end|>"), config.backbone_config.vision_end_token_id),
    }
    for name, (found, wanted) in pairs.items():
        if found != wanted:
            raise ModelError(
                f"The processor in {source} is not that of the model: its {name} is {found!r}, the model's {wanted!r}."
            )


def is_dtype(name: Any) -> bool:
    return isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)
