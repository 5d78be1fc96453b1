"""The model of a training run: tiny or on a backbone, with what the configuration freezes, adapts and starts from."""

from __future__ import annotations

import logging
from typing import Any

from transformers import set_seed

from ..data.scene import VOCABULARY
from ..errors import ConfigError
from ..models import BridgeSTGForVideoGrounding, BridgeSTGProcessor, load_model
from ..models.tiny import tiny_config, tiny_processor
from .config import TrainingConfig

SHIPPED = "tiny"
"""What `start_from` calls the checkpoint that comes with the package; a folder of that name is ./tiny."""

logger = logging.getLogger(__name__)


def build_model(config: TrainingConfig) -> tuple[BridgeSTGForVideoGrounding, BridgeSTGProcessor]:
    """A fresh model and its processor, tiny or on a backbone.

    `start_from` gives what trains its weights, wherever name and shape agree.

    A switch that changes the architecture can so be trained from the same start as its baseline.

    Raises:
        ConfigError: a field of `model` or `processor` is unknown or out of range.
        ModelError: `start_from` or the backbone cannot be loaded, or not be adapted as asked.
    """
    start = None
    if config.start_from is not None:
        start = load_model(None if config.start_from == SHIPPED else config.start_from)
    set_seed(config.seed)
    model, processor = _fresh_tiny(config) if config.backbone.name is None else _fresh_on_backbone(config)
    if config.backbone.liger:
        model.apply_liger()
    if config.backbone.freeze:
        model.freeze_backbone()
    if (lora := config.lora).rank > 0:
        model.add_lora(lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout)
    if start is not None:
        weights = model.state_dict()
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        known = {k: v for k, v in start.state_dict().items() if k in weights and v.shape == weights[k].shape}
        known = {k: v for k, v in known.items() if k not in frozen}
        model.load_state_dict(known, strict=False)
        if fresh := sorted(weights.keys() - known.keys() - frozen):
            logger.warning("%d tensors are not in %s and start fresh: %s", len(fresh), config.start_from, fresh)
    return model, processor


def _fresh_tiny(config: TrainingConfig) -> tuple[BridgeSTGForVideoGrounding, BridgeSTGProcessor]:
    bridge_tokens = config.model.get("bridge_tokens", 4)
    try:
        processor = tiny_processor(VOCABULARY, bridge_tokens=bridge_tokens, **config.processor)
        model = BridgeSTGForVideoGrounding(tiny_config(processor, **config.model))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The model cannot be built: {error}") from error
    model.processor = processor
    return model, processor


def _fresh_on_backbone(config: TrainingConfig) -> tuple[BridgeSTGForVideoGrounding, BridgeSTGProcessor]:
    backbone = config.backbone
    assert backbone.name is not None
    model = BridgeSTGForVideoGrounding.from_backbone(
        backbone.name,
        processor=config.processor,
        dtype=backbone.dtype,
        attn_implementation=backbone.attn_implementation,
        **config.model,
    )
    return model, model.processor


def checkpoint_activations(model: Any) -> None:
    """Have the layers of LLM and vision tower keep their inputs only, and compute the rest again when going back."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # or a frozen vision tower would go back for nothing, and keep what that takes
