"""The memory of a GPU that a training run needs, worked out without a GPU.

Parameters are counted on the model of the run, built on the meta device, which holds shapes and no numbers;
`activations.py` has what a batch needs beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError, ModelError
from ...models import BridgeSTGForVideoGrounding, BridgeSTGProcessor
from ..arguments import check_scale
from ..build_model import build_model
from ..config import TrainingConfig, check_config
from ..data.annotated import GROUP_TOKENS, TEXT_TOKENS
from .activations import BatchShape, activation_bytes

ALLOWANCE = 2 * 2**30
"""Bytes of the CUDA context, communication buffers and libraries' workspaces: a flat guess."""

FRAGMENTATION = 0.1
"""Share that is added to the activations for blocks that the allocator cannot fill: a guess, too."""

DEEPSPEED_BUCKET = 500_000_000
"""Numbers in the buffer that ZeRO reduces gradients in: the default of `reduce_bucket_size`."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one GPU needs, item by item.

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


def memory_plan(config: TrainingConfig, world_size: int) -> MemoryPlan:
    """Plan the most that one of `world_size` GPUs needs, for clips of `max_frames` frames of `max_pixels`.

    DeepSpeed is taken to be ZeRO stage 2 with its default buffers, whatever `scale.deepspeed` says.

    Raises:
        ConfigError: the batch does not fit the number of GPUs, a field of the model or the processor is unknown or out
            of range, or the backbone is neither a folder nor a checkpoint whose sizes are known here.
    """
    config = check_config(config)
    clips = check_scale(config, world_size)
    try:
        model, processor = build_model(config, device="meta")
    except ModelError as error:
        raise ConfigError(str(error)) from error
    if config.scale.precision == "bfloat16":  # trained weights are kept in float32
        for parameter in model.backbone.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    model.train()
    groups = max(1, processor.max_frames // processor.temporal_patch_size)
    patches = _patches(processor)
    merged = patches // processor.merge_size**2
    tokens = groups * (merged + GROUP_TOKENS) + TEXT_TOKENS + processor.bridge_tokens
    if config.data.max_tokens is not None:
        clips = min(clips, max(1, config.data.max_tokens // tokens))
    items = _states(config, model, world_size)
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


def _states(config: TrainingConfig, model: BridgeSTGForVideoGrounding, world_size: int) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW's two moments, and of what the strategy keeps beside them, by name."""
    strategy = config.scale.strategy if world_size > 1 or config.scale.strategy == "deepspeed" else "ddp"
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    shards = world_size // config.scale.replicas if strategy == "fsdp2" else 1
    spread = world_size if strategy == "deepspeed" else shards
    items = {
        "weights": weights // shards,
        "gradients": trained // spread,
        "AdamW": 2 * trained // spread,
    }
    halved = 2 if config.scale.precision == "bfloat16" else 1
    if strategy == "fsdp2":
        # FSDP2 gathers two layers at a time, the one in use and the next; embeddings, head and the rest may stay. It
        # sums the gradients of one layer, or of the head, in float32.
        backbone = model.backbone.model
        layers = [*backbone.language_model.layers, *backbone.visual.blocks]
        sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
        summed = max(*sizes, model.backbone.get_output_embeddings().weight.nbytes)
        items["gathered weights"] = (2 * max(sizes) + weights - sum(sizes)) // halved + summed
    elif strategy == "deepspeed":
        items["ZeRO shards and buffer"] = trained // spread + 4 * DEEPSPEED_BUCKET
    elif world_size > 1:
        items["gradient buckets"] = trained
    if strategy == "ddp" and halved == 2:
        items["weights in bfloat16"] = sum(p.nbytes for p in model.backbone.parameters() if p.requires_grad) // 2
    return items
