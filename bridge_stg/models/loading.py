"""Loading a saved model, with errors a user can act on and switches for ablations."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ModelError
from ..settings import check_fields
from .adapters import is_adapter_folder
from .configuration_bridge_stg import MODEL_RULES, BridgeSTGConfig
from .grounding import BridgeSTGForVideoGrounding
from .model_files import one_line
from .saved_folder import read_saved_config, read_saved_processor


def shipped_model() -> Path:
    """The folder of the tiny checkpoint that comes with the package."""
    return Path(str(resources.files("bridge_stg") / "assets" / "tiny"))


def load_model(
    folder: str | os.PathLike[str] | None = None, settings: Mapping[str, Any] | None = None
) -> BridgeSTGForVideoGrounding:
    """Load a model with its processor, ready to ground.

    Args:
        folder: a folder that `save_pretrained` wrote, with a whole model or adapters; None takes the shipped model.
        settings: fields of `BridgeSTGConfig` to change at inference, such as {"keep": 1.0, "gate": False}.

    Raises:
        ModelError: the folder is missing, incomplete or of another kind.
        ConfigError: a setting is unknown, out of range, or needs weights that the folder does not have.
    """
    folder = Path(folder) if folder is not None else shipped_model()
    config = read_saved_config(folder)
    apply_settings(config, settings or {})
    if is_adapter_folder(folder):
        return BridgeSTGForVideoGrounding.load_adapters(folder, config=config)
    processor = read_saved_processor(folder, config)
    try:
        model, loading = BridgeSTGForVideoGrounding.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below, in one sentence
        )
    except Exception as error:  # transformers and safetensors raise a dozen kinds here
        raise ModelError(f"{folder} cannot be loaded as a Bridge-STG model: {one_line(error)}.") from error
    if missing := sorted(loading["missing_keys"]):
        if settings:
            raise ConfigError(f"The settings need weights that {folder} does not have, such as {missing[0]}.")
        raise ModelError(f"{folder} is incomplete: its weights lack {len(missing)} tensors, such as {missing[0]}.")
    if mismatched := sorted(loading["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        what = f"{name} of shape {list(found)} where the configuration asks for {list(wanted)}"
        if settings:
            raise ConfigError(f"The settings need other weights than {folder} has: {what}.")
        raise ModelError(f"{folder} has weights that do not fit its config.json: {what}.")
    model.processor = processor
    return model.eval()


def apply_settings(config: BridgeSTGConfig, settings: Mapping[str, Any]) -> None:
    """Set fields of a configuration, in place.

    Raises:
        ConfigError: a field is unknown, a value is out of range, or the number of heads is not the trained one.
    """
    trained_heads = config.decoder_heads
    for key, value in check_fields(settings, MODEL_RULES, "settings").items():
        setattr(config, key, value)
    try:
        config.check()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if (heads := config.decoder_heads) != trained_heads:  # they fit the weights, and make another model of them
        raise ConfigError(f"decoder_heads cannot be switched: the weights know {trained_heads}, got {heads}.")
