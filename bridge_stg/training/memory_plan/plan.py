"""What a training run needs of a GPU's memory, worked out before there is a GPU.

Parameters are counted on the real classes, on the meta device, which holds shapes and no numbers; `activations.py`
has what a batch needs beside them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ...data.scene import VOCABULARY
from ...errors import ConfigError
from ...models import BridgeSTGConfig, BridgeSTGForVideoGrounding, BridgeSTGProcessor
from ...models.backbones import FAMILIES
from ...models.tiny import tiny_config, tiny_processor
from ..arguments import check_scale
from ..config import TrainingConfig, check_config
from ..data.annotated import GROUP_TOKENS, TEXT_TOKENS
from .activations import BatchShape, activation_bytes
from .checkpoint_sizes import PUBLISHED

ALLOWANCE = 2 * 2**30
"""CUDA context, communication buffers and libraries' workspaces, bytes: a flat guess."""

FRAGMENTATION = 0.1
"""Of the activations, added: blocks that the allocator cannot fill. A guess, too."""

DEEPSPEED_BUCKET = 500_000_000
"""Numbers in the buffer that ZeRO reduces gradients in: the default of `reduce_bucket_size`."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes one GPU needs, item by item.

    Attributes:
        clips: of a batch.
        tokens: of the longest sequence of the LLM.
        parameters: all, and those that are trained.
        items: what takes how many bytes.
    """

    clips: int
    tokens: int
    parameters: int
    trained: int
    items: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.items.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "clips": self.clips,
            "tokens": self.tokens,
            "parameters": self.parameters,
            "trained": self.trained,
            "bytes": self.items | {"total": self.total},
        }

    def text(self) -> str:
        """A line for each item, gigabytes (2^30 bytes)."""
        lines = [f"{name:<28}{size / 2**30:8.1f} GB" for name, size in (*self.items.items(), ("total", self.total))]
        head = (
            f"{self.parameters / 1e9:.2f} B parameters, {self.trained / 1e6:,.1f} M of them trained; "
            f"{self.clips} clip{'s' * (self.clips > 1)} of {self.tokens:,} tokens a GPU at a time"
        )
        return "\n".join([head, *lines])


def memory_plan(config: TrainingConfig, processes: int) -> MemoryPlan:
    """The most that one of so many GPUs needs: clips of `max_frames` frames of `max_pixels`, as many as a batch takes.

    DeepSpeed is taken to be ZeRO stage 2 with its default buffers, whatever `scale.deepspeed` says.

    Raises:
        ConfigError: the batch does not fit the processes, a field of the model or the processor is unknown or out of
            range, or the backbone is neither a folder nor a checkpoint whose architecture is known here.
    """
    clips = check_scale(check_config(config), processes)
    model, processor = meta_model(config)
    model.train()
    groups = max(1, processor.max_frames // processor.temporal_patch_size)
    patches = _patches(processor)
    merged = patches // processor.merge_size**2
    tokens = groups * (merged + GROUP_TOKENS) + TEXT_TOKENS + processor.bridge_tokens
    if config.data.max_tokens is not None:
        clips = min(clips, max(1, config.data.max_tokens // tokens))
    items = _states(config, model, processes)
    batch = BatchShape(clips, groups, patches, tokens)
    items["activations"] = int(activation_bytes(config, model, batch) * (1 + FRAGMENTATION))
    pixels = groups * patches * 3 * processor.temporal_patch_size * processor.patch_size**2
    items["batch"] = 4 * clips * pixels
    items["context, buffers (guess)"] = ALLOWANCE
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return MemoryPlan(clips, tokens, sum(p.numel() for p in parameters), trained, items)


def _patches(processor: BridgeSTGProcessor) -> int:
    """Patches of the largest frame."""
    area = (processor.patch_size * processor.merge_size) ** 2
    if processor.max_pixels < area:
        raise ConfigError(f"processor.max_pixels must be at least {area} (one token), got {processor.max_pixels}.")
    return int(processor.max_pixels / area) * processor.merge_size**2


# Parameters ----------------------------------------------------------------------------------------------------------


def backbone_config(name: str) -> Any:
    """The configuration of a backbone: of a folder, or of a published checkpoint that is known here.

    Raises:
        ConfigError: neither.
    """
    if Path(name).is_dir():
        found = AutoConfig.from_pretrained(name, local_files_only=True)
    elif name in PUBLISHED:
        found = AutoConfig.for_model(PUBLISHED[name]["model_type"], **PUBLISHED[name]["config"])
    else:
        raise ConfigError(f"{name} is neither a folder nor one of {', '.join(PUBLISHED)}, whose sizes are known here.")
    if found.model_type not in FAMILIES:
        raise ConfigError(f"{name} is a {found.model_type} model; no backbone of ours.")
    return found


def meta_model(config: TrainingConfig) -> tuple[Any, BridgeSTGProcessor]:
    """The model of a run on the meta device, with what is frozen and adapted, in its dtypes; and its processor.

    Raises:
        ConfigError: a field of the model or the processor is unknown or out of range, or see `backbone_config`.
    """
    config = check_config(config)
    try:
        return _meta_tiny(config) if config.backbone.name is None else _meta_on_backbone(config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The model cannot be built: {str(error).splitlines()[0]}") from error


def _meta_tiny(config: TrainingConfig) -> tuple[Any, BridgeSTGProcessor]:
    processor = tiny_processor(VOCABULARY, bridge_tokens=config.model.get("bridge_tokens", 4), **config.processor)
    with torch.device("meta"):
        return BridgeSTGForVideoGrounding(tiny_config(processor, **config.model)), processor


def _meta_on_backbone(config: TrainingConfig) -> tuple[Any, BridgeSTGProcessor]:
    name, dtype = config.backbone.name, config.backbone.dtype
    assert name is not None
    found = backbone_config(name)
    kept_in = getattr(found, "dtype", None) or torch.bfloat16 if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(kept_in, torch.dtype):
        raise ConfigError(f"backbone.dtype must be auto or a dtype of torch such as bfloat16, got {dtype!r}.")
    vision = found.vision_config
    area = (vision.patch_size * vision.spatial_merge_size) ** 2
    settings = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "max_pixels": 768 * area,
        "max_frames": inspect.signature(BridgeSTGProcessor).parameters["max_frames"].default,
    }
    processor = tiny_processor((), **(settings | dict(config.processor)))
    processor.bridge_tokens = config.model.get("bridge_tokens", 8)
    layers = found.text_config.num_hidden_layers
    fields = {"bridge_layers": min(6, layers), "bridge_token_id": 0, "separate_bridge_embeddings": True}
    settled = BridgeSTGConfig(backbone_config=found, **(fields | dict(config.model)))
    # Flash attention and sdpa keep the same; and the package for the former need not be here.
    settled._attn_implementation = "eager" if config.backbone.attn_implementation == "eager" else "sdpa"
    with torch.device("meta"):
        model = BridgeSTGForVideoGrounding(settled)
    model.backbone.to(kept_in)
    if config.backbone.freeze or config.lora.rank > 0:
        model.backbone.requires_grad_(False)
    if config.lora.rank > 0:
        import peft

        names = "|".join(config.lora.targets)
        target = rf".*language_model\.layers\.\d+\..*\.({names})"
        adapters = peft.LoraConfig(r=config.lora.rank, target_modules=target, lora_dropout=config.lora.dropout)
        peft.inject_adapter_in_model(adapters, model.backbone)
        for parameter_name, parameter in model.backbone.named_parameters():
            if "lora_" in parameter_name:
                parameter.data = parameter.data.float()
    if config.scale.precision == "bfloat16":  # trained weights are kept in float32
        for parameter in model.backbone.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model, processor


def _states(config: TrainingConfig, model: Any, processes: int) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW's two moments, and of what the strategy keeps beside them."""
    strategy = config.scale.strategy if processes > 1 or config.scale.strategy == "deepspeed" else "ddp"
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    shards = processes // config.scale.replicas if strategy == "fsdp2" else 1
    spread = processes if strategy == "deepspeed" else shards
    items = {
        "weights": weights // shards,
        "gradients": trained // spread,
        "AdamW": 2 * trained // spread,
    }
    halved = 2 if config.scale.precision == "bfloat16" else 1
    if strategy == "fsdp2":
        # Two layers are gathered at a time, one in use and one to come; embeddings, head and the rest may stay. The
        # gradients of one part are summed in float32, at most those of the head.
        backbone = model.backbone.model
        layers = [*backbone.language_model.layers, *backbone.visual.blocks]
        sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
        summed = max(*sizes, model.backbone.get_output_embeddings().weight.nbytes)
        items["gathered weights"] = (2 * max(sizes) + weights - sum(sizes)) // halved + summed
    elif strategy == "deepspeed":
        items["ZeRO shards and buffer"] = trained // spread + 4 * DEEPSPEED_BUCKET
    elif processes > 1:
        items["gradient buckets"] = trained
    if strategy == "ddp" and halved == 2:
        items["weights in bfloat16"] = sum(p.nbytes for p in model.backbone.parameters() if p.requires_grad) // 2
    return items
