"""What a training run needs of a GPU's memory, worked out before there is a GPU.

Parameters are counted on the real classes, and what a layer keeps for the backward pass is what its own code keeps:
both are run on the meta device, which holds shapes and no numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..data.scene import VOCABULARY
from ..errors import ConfigError
from ..models import BridgeSTGConfig, BridgeSTGForVideoGrounding, BridgeSTGProcessor
from ..models.backbones import FAMILIES
from ..models.tiny import tiny_config, tiny_processor
from ..modules.spatial_decoder import SpatialDecoder
from .arguments import check_scale
from .config import TrainingConfig
from .published import PUBLISHED
from .stream import GROUP_TOKENS, TEXT_TOKENS

ALLOWANCE = 2 * 2**30
"""CUDA context, communication buffers and libraries' workspaces, bytes: a flat guess."""

FRAGMENTATION = 0.1
"""Of the activations, added: blocks that the allocator cannot fill. A guess, too."""


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

    Raises:
        ConfigError: the batch does not fit the processes, or the backbone is neither a folder nor a checkpoint whose
            architecture is known here.
    """
    clips = check_scale(config, processes)
    model, processor = meta_model(config)
    model.train()
    groups = -(-processor.max_frames // processor.temporal_patch_size)
    patches = _patches(processor)
    merged = patches // processor.merge_size**2
    tokens = groups * (merged + GROUP_TOKENS) + TEXT_TOKENS + processor.bridge_tokens
    if config.data.max_tokens is not None:
        clips = min(clips, max(1, config.data.max_tokens // tokens))
    items = _states(config, model, processes)
    items["activations"] = int(activation_bytes(config, model, clips, groups, patches, tokens) * (1 + FRAGMENTATION))
    pixels = groups * patches * 3 * processor.temporal_patch_size * processor.patch_size**2
    items["batch"] = 4 * clips * pixels
    items["context, buffers (guess)"] = ALLOWANCE
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return MemoryPlan(clips, tokens, sum(p.numel() for p in parameters), trained, items)


def _patches(processor: BridgeSTGProcessor) -> int:
    """Patches of the largest frame."""
    unit = processor.patch_size * processor.merge_size
    return int(processor.max_pixels / unit**2) * processor.merge_size**2


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
    """The model of a run on the meta device, with what is frozen and adapted, in its dtypes; and its processor."""
    if config.backbone.name is None:
        processor = tiny_processor(VOCABULARY, bridge_tokens=config.model.get("bridge_tokens", 4), **config.processor)
        with torch.device("meta"):
            return BridgeSTGForVideoGrounding(tiny_config(processor, **config.model)), processor
    found = backbone_config(config.backbone.name)
    # Flash attention and sdpa keep the same; and the package for the former need not be here.
    found._attn_implementation = "sdpa"
    vision = found.vision_config
    area = (vision.patch_size * vision.spatial_merge_size) ** 2
    settings = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "max_pixels": 768 * area,
    }
    processor = tiny_processor((), **(settings | dict(config.processor)))
    processor.bridge_tokens = config.model.get("bridge_tokens", 8)
    if "max_frames" not in config.processor:
        processor.max_frames = 64
    layers = found.text_config.num_hidden_layers
    fields = {"bridge_layers": min(6, layers), "bridge_token_id": 0, "separate_bridge_embeddings": True}
    with torch.device("meta"):
        model = BridgeSTGForVideoGrounding(BridgeSTGConfig(backbone_config=found, **(fields | dict(config.model))))
    dtype = "bfloat16" if config.backbone.dtype == "auto" else config.backbone.dtype
    model.backbone.to(getattr(torch, dtype))
    if config.backbone.freeze or config.lora.rank > 0:
        model.backbone.requires_grad_(False)
    if config.lora.rank > 0:
        import peft

        names = "|".join(config.lora.targets)
        target = rf".*language_model\.layers\.\d+\..*\.({names})"
        settings = peft.LoraConfig(r=config.lora.rank, target_modules=target, lora_dropout=config.lora.dropout)
        peft.inject_adapter_in_model(settings, model.backbone)
        for name, parameter in model.backbone.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    if config.scale.precision == "bfloat16":  # trained weights are kept in float32
        for parameter in model.backbone.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model, processor


def _states(config: TrainingConfig, model: Any, processes: int) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW's two moments, and of what the strategy keeps beside them."""
    strategy = config.scale.strategy if processes > 1 else "ddp"
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
    backbone = model.backbone.model
    if strategy == "fsdp2":
        # Two layers are gathered at a time, one in use and one to come; embeddings, head and the rest stay gathered.
        layers = [*backbone.language_model.layers, *backbone.visual.blocks]
        sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
        largest = max(sizes)
        items["gathered weights"] = (2 * largest + weights - sum(sizes)) // halved + largest
    elif processes > 1 and strategy == "ddp":
        items["gradient buckets"] = trained
    if strategy == "ddp" and halved == 2:
        items["weights in bfloat16"] = sum(p.nbytes for p in model.backbone.parameters() if p.requires_grad) // 2
    return items


# Activations ---------------------------------------------------------------------------------------------------------


def activation_bytes(config: TrainingConfig, model: Any, clips: int, groups: int, patches: int, tokens: int) -> int:
    """Bytes kept for the backward pass, and at its largest moment, of a batch of the longest clips."""
    checkpointing = config.scale.gradient_checkpointing
    if config.scale.precision == "bfloat16":
        model.backbone.to(torch.bfloat16)  # how its layers compute
        for name, parameter in model.backbone.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    dtype = model.backbone.dtype
    text, vision = model.backbone.model.language_model, model.backbone.model.visual
    visual_grad = any(p.requires_grad for p in vision.parameters())

    states = _meta(clips, tokens, text.config.hidden_size, dtype=dtype).requires_grad_()
    positions = _meta(3, clips, tokens, dtype=torch.long)
    rotary = text.rotary_emb(states.detach(), positions)
    layer = text.layers[0]
    one = saved_bytes(model, lambda: layer(states, position_embeddings=rotary), apart_from=[states, *rotary])
    kept = states.nbytes * (len(text.layers) + 1)  # the states of all layers, which the bridge chooses from
    total = kept + (one if checkpointing else one * len(text.layers))

    frames = clips * groups
    pixels = _meta(frames * patches, vision.config.hidden_size, dtype=dtype).requires_grad_(visual_grad)
    heads = vision.config.hidden_size // vision.config.num_heads
    angles = tuple(_meta(frames * patches, heads, dtype=torch.float32) for _ in range(2))
    ends = torch.arange(frames + 1, dtype=torch.int32) * patches
    block = vision.blocks[0]
    run = saved_bytes(
        model, lambda: block(pixels, cu_seqlens=ends, position_embeddings=angles), apart_from=[pixels, *angles]
    )
    if visual_grad:
        total += pixels.nbytes * len(vision.blocks) + (run if checkpointing else run * len(vision.blocks))
        for merger in (vision.merger, *getattr(vision, "deepstack_merger_list", ())):
            total += saved_bytes(model, partial(merger, pixels), apart_from=[pixels])
    else:  # the working set of one block, which keeps nothing
        total += _mlp_width(block) * pixels.shape[0] * pixels.element_size() * 3 + pixels.nbytes
    if config.data.answer_dropout > 0 and "flash" not in (config.backbone.attn_implementation or ""):
        total += clips * tokens**2 * dtype.itemsize  # the mask that hides answers
    return total + _spatial(config, model, clips, groups, patches, visual_grad) + _answer(model, clips)


def _spatial(config: TrainingConfig, model: Any, clips: int, groups: int, patches: int, visual_grad: bool) -> int:
    """The memory of all groups, the sampled frames' share of it, and the decoder over their kept tokens."""
    merge = model.config.backbone_config.vision_config.spatial_merge_size
    dtype, hidden = model.backbone.dtype, model.config.backbone_config.text_config.hidden_size
    features = model.config.memory_features
    width = hidden if features == "merged" else model.config.backbone_config.vision_config.hidden_size
    count = patches // merge**2 if features == "merged" else patches
    dim, frames = model.config.decoder_dim, config.data.spatial_frames
    raw = _meta(clips, groups, count, width, dtype=dtype).requires_grad_(visual_grad)
    states = _meta(clips, groups, patches // merge**2, hidden, dtype=dtype).requires_grad_()

    def memory() -> torch.Tensor:
        found = model.memory_projection(model.memory_norm(raw.float()))
        if features == "vision+lm":
            lm = model.memory_lm_projection(model.memory_lm_norm(states.float()))
            found = found + lm.repeat_interleave(count // lm.shape[2], dim=2)
        return found

    total = saved_bytes(model, memory, apart_from=[raw, states]) + raw.nbytes
    sampled = clips * frames * count * dim * 4
    queries, layers = model.config.bridge_tokens, model.config.bridge_layers
    kept = count
    if model.config.pruning:
        total += 2 * sampled  # the frames' tokens, gathered, and with the embedding of their place
        kept = math.ceil(model.config.keep * count)
    # The decoder's own kernels do not run on the meta device; one frame of one clip is quickly run for real.
    decoder = SpatialDecoder(dim, model.config.decoder_heads, model.config.decoder_ffn_dim, layers)
    interactive, tokens = torch.zeros(layers, 1, queries, dim), torch.zeros(1, 1, kept, dim, requires_grad=True)
    point = torch.full((1, 1, 2), 0.5)
    frame = saved_bytes(decoder, lambda: decoder(interactive, tokens, torch.zeros(1, 1), reference=point))
    return total + clips * frames * frame


def _answer(model: Any, clips: int) -> int:
    """Logits at the tokens of the answers, as they come and in float32, and their gradient."""
    vocabulary = model.config.backbone_config.text_config.vocab_size
    return clips * model.config.max_answer_tokens * vocabulary * (model.backbone.dtype.itemsize + 8)


def _mlp_width(block: Any) -> int:
    return max(module.out_features for module in block.modules() if isinstance(module, torch.nn.Linear))


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def saved_bytes(model: torch.nn.Module, run: Callable[[], Any], *, apart_from: list[torch.Tensor] | None = None) -> int:
    """Bytes that autograd keeps for the backward pass of `run`, each storage once; not parameters, nor `apart_from`."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *(apart_from or ()))}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _lean_attention():
        output = run()
        total = sum(storage.nbytes() for storage in kept.values())
        del output
    return total


@contextmanager
def _lean_attention() -> Iterator[None]:
    """On the meta device attention would keep its matrix of scores, which the kernels of a GPU do not."""
    functional: Any = torch.nn.functional
    real = functional.scaled_dot_product_attention

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if query.device.type != "meta":
            return real(query, key, value, *args, **kwargs)
        return _KeepsInputs.apply(query, key, value)

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = real


class _KeepsInputs(torch.autograd.Function):
    """What flash attention keeps: its inputs, its output, and a number a row (Dao et al. 2022, section 3.1)."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, out.new_empty(out.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
