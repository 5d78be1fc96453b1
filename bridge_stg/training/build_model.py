"""The model of a training run: tiny or on a backbone, with what the configuration freezes, adapts and starts from."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from transformers import set_seed

from ..data.scene import VOCABULARY
from ..errors import ConfigError
from ..models import BridgeSTGForVideoGrounding, BridgeSTGProcessor, load_model
from ..models.tiny import tiny_config, tiny_processor
from .config import TrainingConfig
from .memory_plan.checkpoint_sizes import backbone_config

SHIPPED = "tiny"
"""What `start_from` calls the checkpoint that comes with the package; a folder of that name is ./tiny."""

logger = logging.getLogger(__name__)


def build_model(
    config: TrainingConfig, device: Literal["cpu", "meta"] = "cpu"
) -> tuple[BridgeSTGForVideoGrounding, BridgeSTGProcessor]:
    """Build a fresh model, tiny or on a backbone, and its processor.

    `start_from` gives what trains its weights, wherever name and shape agree, so that a switch that changes the
    architecture can be trained from the same start as its baseline.

    Args:
        device: "meta" gives shapes without numbers, for the memory plan: nothing is read but the configuration of the
            backbone, and `start_from` and `backbone.liger`, which change no shape, are left out.

    Raises:
        ConfigError: a field of `model` or `processor` is unknown or out of range; on the meta device, the backbone is
            neither a folder nor a checkpoint whose sizes are known.
        ModelError: `start_from` or the backbone cannot be loaded, or not be adapted as asked.
    """
    start = None
    if config.start_from is not None and device != "meta":
        start = load_model(None if config.start_from == SHIPPED else config.start_from)
    set_seed(config.seed)
    try:
        model = _fresh_model(config, device)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The model cannot be built: {str(error).splitlines()[0]}") from error
    if config.backbone.liger and device != "meta":
        model.apply_liger()
    if config.backbone.freeze:
        model.freeze_backbone()
    if (lora := config.lora).rank > 0:
        model.add_lora(lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout)
    if start is not None:
        _take_weights(model, start, config.start_from)
    return model, model.processor


def _fresh_model(config: TrainingConfig, device: str) -> BridgeSTGForVideoGrounding:
    backbone = config.backbone
    if backbone.name is None:
        bridge_tokens = config.model.get("bridge_tokens", 4)
        processor = tiny_processor(VOCABULARY, bridge_tokens=bridge_tokens, **config.processor)
        with torch.device(device):
            model = BridgeSTGForVideoGrounding(tiny_config(processor, **config.model))
        model.processor = processor
        return model
    return BridgeSTGForVideoGrounding.from_backbone(
        backbone_config(backbone.name) if device == "meta" else backbone.name,
        processor=config.processor,
        dtype=backbone.dtype,
        attn_implementation=backbone.attn_implementation,
        **config.model,
    )


def _take_weights(model: BridgeSTGForVideoGrounding, start: BridgeSTGForVideoGrounding, name: str | None) -> None:
    """Copy what `model` trains from `start`, wherever name and shape agree; log what stays fresh."""
    weights = model.state_dict()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    known = {
        key: value
        for key, value in start.state_dict().items()
        if key in weights and key not in frozen and value.shape == weights[key].shape
    }
    model.load_state_dict(known, strict=False)
    if fresh := sorted(weights.keys() - known.keys() - frozen):
        logger.warning("%d tensors are not in %s and start fresh: %s", len(fresh), name, fresh)


def checkpoint_activations(model: Any) -> None:
    """Make the layers of LLM and vision tower keep their inputs only, and compute the rest again in the backward pass.

    Checkpoints are non-reentrant, as DDP and frozen inputs need them.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # or gradients would run through a frozen vision tower for nothing
