"""The bytes of a batch's forward and backward pass beside weights and gradients, found on the meta device.

One layer of each kind runs forward and backward on the meta device, which holds shapes and no numbers. The bytes it
keeps for the backward pass, and the most that live during it, are so what the layer's own code allocates; formulas such
as those of Korthikanti et al. 2022 (arXiv 2205.05198) hold for one kind of layer only.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...errors import ConfigError
from ...models import BridgeSTGForVideoGrounding
from ...modules.spatial_decoder import SpatialDecoder
from ..config import TrainingConfig


@dataclass(frozen=True)
class BatchShape:
    """Sizes of the batch whose memory is asked for.

    Attributes:
        clips: clips that a rank takes at a time.
        groups: temporal groups of each clip.
        patches: patches of each group, before the merger.
        tokens: length of each clip's sequence in the LLM.
        aligned: whether sequences are multiples of 8 tokens. On a GPU, sdpa copies a mask of another length in every
            layer (`preprocess_mask` in torch's transformers/attention.cpp), and the backward pass keeps the copies.
    """

    clips: int
    groups: int
    patches: int
    tokens: int
    aligned: bool = False


@dataclass(frozen=True)
class _Stack:
    """Bytes of a stack of equal layers.

    Attributes:
        kept: what all layers keep until their backward pass.
        work: what the backward pass of one layer needs in addition.
    """

    kept: int = 0
    work: int = 0


def activation_bytes(config: TrainingConfig, model: BridgeSTGForVideoGrounding, batch: BatchShape) -> int:
    """The most bytes that live at once in one step's forward and backward pass, without weights and their gradients.

    The largest of three moments: the end of the forward pass; the backward pass of the LLM's last layer, when the
    gradients of the states that the bridge reads are waiting for theirs; that of the vision tower's last layer.

    Args:
        model: on the meta device, in training mode. With `scale.precision` bfloat16 its backbone is converted in place.

    Raises:
        ConfigError: the backbone is a mixture of experts in float32, for which torch has no grouped product on meta.
    """
    if config.scale.precision == "bfloat16":
        model.backbone.to(torch.bfloat16)  # the dtype that its layers compute in
        for name, parameter in model.backbone.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    checkpointing = config.scale.gradient_checkpointing
    backbone = model.config.backbone_config
    dtype, hidden = model.backbone.dtype, backbone.text_config.hidden_size
    if getattr(backbone.text_config, "num_experts", 0) and dtype == torch.float32:
        raise ConfigError(
            "A mixture of experts can be planned in bfloat16 only, got float32: set backbone.dtype or scale.precision."
        )
    states = batch.clips * batch.tokens * hidden * dtype.itemsize
    pixels = batch.clips * batch.groups * batch.patches * backbone.vision_config.hidden_size * dtype.itemsize
    # Batches of the loader say which answers are hidden, which sdpa and eager attention take as a dense mask.
    dense = "flash" not in (config.backbone.attn_implementation or "")
    mask = batch.clips * batch.tokens**2 * dtype.itemsize if dense else 0

    reached = any(p.requires_grad for p in model.backbone.model.visual.parameters())
    language = _language(model, batch, mask, checkpointing)
    vision = _vision(model, batch, checkpointing) if reached else _Stack()
    spatial = _spatial(config, model, batch, reached) + _answers(model, batch)
    both = mask + language.kept + vision.kept
    waiting = (model.config.bridge_layers - 1) * states if model.config.semantic_bridge else 0
    if reached:
        waiting += pixels
    return max(both + spatial, both + waiting + language.work, vision.kept + pixels + states + vision.work)


def _language(model: BridgeSTGForVideoGrounding, batch: BatchShape, mask: int, checkpointing: bool) -> _Stack:
    """Bytes of the LLM, whose layers share a mask of `mask` bytes."""
    text = model.backbone.model.language_model
    dtype, layers = model.backbone.dtype, len(text.layers)
    states = _meta(batch.clips, batch.tokens, text.config.hidden_size, dtype=dtype).requires_grad_()
    rotary = text.rotary_emb(states.detach(), _meta(3, batch.clips, batch.tokens, dtype=torch.long))
    hidden = _meta(batch.clips, 1, batch.tokens, batch.tokens, dtype=dtype) if mask else None
    given = [states, *rotary, *([] if hidden is None else [hidden])]
    layer = partial(text.layers[0], states, position_embeddings=rotary, attention_mask=hidden)
    kept, most = saved_bytes(model, layer, apart_from=given), peak_bytes(model, layer, apart_from=given)
    if not batch.aligned:
        kept, most = kept + mask, most + mask
    inputs = states.nbytes * (layers + 1)  # the forward pass returns the states of all layers
    return _Stack(inputs, most) if checkpointing else _Stack(inputs + kept * layers, most - kept)


def _vision(model: BridgeSTGForVideoGrounding, batch: BatchShape, checkpointing: bool) -> _Stack:
    """Bytes of a vision tower that gradients reach.

    A frozen tower keeps nothing, and its work is over before the LLM begins.
    """
    visual = model.backbone.model.visual
    width, frames = visual.config.hidden_size, batch.clips * batch.groups
    pixels = _meta(frames * batch.patches, width, dtype=model.backbone.dtype).requires_grad_()
    angles = tuple(_meta(frames * batch.patches, width // visual.config.num_heads) for _ in range(2))
    ends = torch.arange(frames + 1, dtype=torch.int32) * batch.patches
    given = [pixels, *angles]
    layer = partial(visual.blocks[0], pixels, cu_seqlens=ends, position_embeddings=angles)
    kept, most = saved_bytes(model, layer, apart_from=given), peak_bytes(model, layer, apart_from=given)
    mergers = (visual.merger, *getattr(visual, "deepstack_merger_list", ()))
    merged = sum(saved_bytes(model, partial(merger, pixels), apart_from=given) for merger in mergers)
    layers = len(visual.blocks)
    inputs = pixels.nbytes * layers + merged
    return _Stack(inputs, most) if checkpointing else _Stack(inputs + kept * layers, most - kept)


def _spatial(config: TrainingConfig, model: BridgeSTGForVideoGrounding, batch: BatchShape, reached: bool) -> int:
    """Bytes that the spatial half keeps: the memory of all groups, that of the sampled frames, and the decoder.

    Args:
        reached: whether gradients reach the vision tower.
    """
    backbone = model.config.backbone_config
    merge, hidden = backbone.vision_config.spatial_merge_size, backbone.text_config.hidden_size
    features, dtype = model.config.memory_features, model.backbone.dtype
    width = hidden if features == "merged" else backbone.vision_config.hidden_size
    count = batch.patches // merge**2 if features == "merged" else batch.patches
    dim, frames = model.config.decoder_dim, config.data.spatial_frames
    raw = _meta(batch.clips, batch.groups, count, width, dtype=dtype).requires_grad_(reached)
    states = _meta(batch.clips, batch.groups, batch.patches // merge**2, hidden, dtype=dtype).requires_grad_()

    def memory() -> torch.Tensor:
        found = model.memory_projection(model.memory_norm(raw.float()))
        if features == "vision+lm":
            lm = model.memory_lm_projection(model.memory_lm_norm(states.float()))
            found = found + lm.repeat_interleave(count // lm.shape[2], dim=2)
        return found

    # Gathering the states of visual tokens copies them, and so does averaging them for the dense alignment.
    total = saved_bytes(model, memory, apart_from=[raw, states]) + raw.nbytes + states.nbytes
    memory_bytes = batch.clips * batch.groups * count * dim * 4
    sampled = batch.clips * frames * count * dim * 4
    total += memory_bytes
    queries, layers = model.config.bridge_tokens, model.config.bridge_layers
    kept = count
    if model.config.pruning:
        total += 2 * sampled  # the frames' tokens as gathered, and again with their position embedding
        kept = math.ceil(model.config.keep * count)
    # The decoder's own kernels do not run on the meta device, so one frame of one clip runs for real.
    decoder = SpatialDecoder(dim, model.config.decoder_heads, model.config.decoder_ffn_dim, layers)
    interactive, tokens = torch.zeros(layers, 1, queries, dim), torch.zeros(1, 1, kept, dim, requires_grad=True)
    point = torch.full((1, 1, 2), 0.5)
    frame = saved_bytes(decoder, lambda: decoder(interactive, tokens, torch.zeros(1, 1), reference=point))
    return total + batch.clips * frames * frame


def _answers(model: BridgeSTGForVideoGrounding, batch: BatchShape) -> int:
    """Bytes of the logits at the answers' tokens, in the backbone's dtype and in float32, and of their gradient."""
    vocabulary = model.config.backbone_config.text_config.vocab_size
    return batch.clips * model.config.max_answer_tokens * vocabulary * (model.backbone.dtype.itemsize + 8)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# Measures ------------------------------------------------------------------------------------------------------------


def saved_bytes(model: torch.nn.Module, run: Callable[[], Any], *, apart_from: Sequence[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of `run`, each storage once.

    Parameters and buffers of `model`, and the tensors `apart_from`, are not counted.
    """
    known = _storages(model, apart_from)
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


def peak_bytes(model: torch.nn.Module, run: Callable[[], Any], *, apart_from: Sequence[torch.Tensor] = ()) -> int:
    """The most bytes that live at once during `run` and the backward pass from its (first) output.

    Parameters and buffers of `model`, and the tensors `apart_from`, are not counted; the gradient of a parameter counts
    until it is added to the one that is there.
    """

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad]
    try:
        with _lean_attention(), _Living(_storages(model, apart_from)) as living:
            output = run()
            first = output if isinstance(output, torch.Tensor) else output[0]
            torch.autograd.backward(first, torch.empty_like(first))
    finally:
        for hook in hooks:
            hook.remove()
        for tensor in apart_from:
            tensor.grad = None
    return living.most


def _storages(model: torch.nn.Module, tensors: Sequence[torch.Tensor]) -> set[int]:
    return {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *tensors)}


class _Living(TorchDispatchMode):
    """Counts the bytes of tensors as they are made and dropped, each storage once.

    Attributes:
        most: the most bytes that lived at once.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.living: dict[int, weakref.ref] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.living:
            return

        def gone(_: Any) -> None:
            del self.living[key]
            self.now -= size

        self.living[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


@contextmanager
def _lean_attention() -> Iterator[None]:
    """Let attention on the meta device keep what the kernels of a GPU keep, which is not the matrix of scores."""
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
    """Attention that keeps what flash attention keeps: inputs, output, and a number a row (Dao et al. 2022, 3.1)."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, out.new_empty(out.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
