"""What forward and backward pass of a batch need beside weights and gradients, found on the meta device.

One layer of each kind goes forth and back without numbers: what it keeps, and the most that lives while it goes back,
are what its own code allocates, and not what a formula of Korthikanti et al. 2022 (arXiv 2205.05198) says of another.
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
from ...modules.spatial_decoder import SpatialDecoder
from ..config import TrainingConfig


@dataclass(frozen=True)
class BatchShape:
    """The batch that is asked about.

    Attributes:
        clips: of a process at a time.
        groups: temporal patch groups of each clip.
        patches: of each group's frame, before the merger.
        tokens: of each clip's sequence in the LLM.
        aligned: whether sequences are multiples of 8 tokens. Of another mask sdpa makes a copy in every layer on a GPU
            (`preprocess_mask` in torch's transformers/attention.cpp), which the backward pass keeps.
    """

    clips: int
    groups: int
    patches: int
    tokens: int
    aligned: bool = False


@dataclass(frozen=True)
class _Stack:
    """A stack of equal layers: bytes kept until its backward pass, and those that one layer of it then adds."""

    kept: int = 0
    work: int = 0


def activation_bytes(config: TrainingConfig, model: Any, batch: BatchShape) -> int:
    """The most bytes that live at once in one step's forward and backward pass: no weights, no gradients of them.

    The largest of three moments: the end of the forward pass; the backward pass of the LLM's last layer, when the
    gradients of the states that the bridge reads are waiting for theirs; that of the vision tower's last layer.

    Args:
        model: of `meta_model`, in training mode. With `scale.precision` bfloat16 its backbone is converted, in place.

    Raises:
        ConfigError: a mixture of experts in float32, whose product of groups has no meta kernel.
    """
    if config.scale.precision == "bfloat16":
        model.backbone.to(torch.bfloat16)  # how its layers compute
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
    dense = "flash" not in (config.backbone.attn_implementation or "")  # the loader's batches say what is hidden
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


def _language(model: Any, batch: BatchShape, mask: int, checkpointing: bool) -> _Stack:
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


def _vision(model: Any, batch: BatchShape, checkpointing: bool) -> _Stack:
    """Of a tower that gradients reach; another keeps nothing, and is through before the LLM begins."""
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


def _spatial(config: TrainingConfig, model: Any, batch: BatchShape, reached: bool) -> int:
    """The memory of all groups, the sampled frames' share of it, and the decoder over their kept tokens."""
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

    # The states that the memory gathers are a copy of their own, and so are their means for the dense alignment.
    total = saved_bytes(model, memory, apart_from=[raw, states]) + raw.nbytes + states.nbytes
    memory_bytes = batch.clips * batch.groups * count * dim * 4
    sampled = batch.clips * frames * count * dim * 4
    total += memory_bytes
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
    return total + batch.clips * frames * frame


def _answers(model: Any, batch: BatchShape) -> int:
    """Logits at the tokens of the answers, as they come and in float32, and their gradient."""
    vocabulary = model.config.backbone_config.text_config.vocab_size
    return batch.clips * model.config.max_answer_tokens * vocabulary * (model.backbone.dtype.itemsize + 8)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# Measures ------------------------------------------------------------------------------------------------------------


def saved_bytes(model: torch.nn.Module, run: Callable[[], Any], *, apart_from: Sequence[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of `run`, each storage once; not parameters, nor `apart_from`."""
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
    """The most bytes that live at once while `run` goes forth and its (first) output back.

    Not parameters, nor `apart_from`; a parameter's gradient only until it would be added to what there is.
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
        most: bytes that lived at once.
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
