"""The families of backbones: one class each for what differs in classes, timestamps, vision features and masks."""

from __future__ import annotations

import hashlib
import importlib
import math
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import ModelError


class BackboneFamily:
    """What all families share; a subclass overrides what differs in its family.

    Attributes:
        model_type: `model_type` of its configuration.
        label: its name in messages.
        model_class: name of its class in `transformers.models.<model_type>`.
        timestamp_format: how the time of a temporal patch group (seconds) is written before its tokens.
        liger_patch: function of `liger_kernel.transformers` that patches an instance.
    """

    model_type: ClassVar[str]
    label: ClassVar[str]
    model_class: ClassVar[str]
    timestamp_format: ClassVar[str]
    liger_patch: ClassVar[str]

    def network(self) -> Any:
        """The class with the language-model head."""
        return getattr(importlib.import_module(f"transformers.models.{self.model_type}"), self.model_class)

    def patch_order(self, frames: int, rows: int, columns: int, vision: Any) -> torch.Tensor | None:
        """Place of each merged token in the vision tower's output; None if that has the processor's order."""
        return None

    def encode(
        self, visual: nn.Module, pixel_values: torch.Tensor, grid_thw: torch.Tensor, vision: Any
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Run the vision tower over clips of one grid (rows, columns).

        Returns:
            Patch features before the merger `[n, merge^2, Dv]`, merged tokens `[n, D]`, and deepstack features, one
            `[n, D]` per early LLM layer that they are added to; all in the processor's order.
        """
        output = visual(pixel_values.to(merger_dtype(visual)), grid_thw=grid_thw)
        patches = output.last_hidden_state.unflatten(0, (-1, vision.spatial_merge_size**2))
        frames, (rows, columns) = int(grid_thw[:, 0].sum()), grid_thw[0, 1:].tolist()
        order = self.patch_order(frames, rows, columns, vision)
        if order is not None:
            patches = patches[order.to(patches.device)]
        return patches, output.pooler_output, self.deepstack(output)

    def deepstack(self, vision_output: Any) -> list[torch.Tensor]:
        return []

    def dense_mask(self, visible: torch.Tensor, attn_implementation: str, dtype: torch.dtype) -> Any:
        """The attention mask of the LLM for `visible` bool `[B, 1, L, L]`, as numbers that are added to the scores.

        From a bool mask sdpa would make an additive one in every layer, and keep each of them for the backward pass.

        Args:
            visible: True where a query sees a key.
            attn_implementation: name of the LLM's attention.
            dtype: dtype of the queries.

        Raises:
            ValueError: the attention implementation takes no dense mask.
        """
        if "flash" in attn_implementation:
            raise ValueError(
                f"Answer dropout needs an attention that takes a dense mask (sdpa or eager), got {attn_implementation}."
            )
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


class Qwen25VL(BackboneFamily):
    """Qwen2.5-VL: times are written by us; the vision tower attends in windows and orders its tokens by window."""

    model_type = "qwen2_5_vl"
    label = "Qwen2.5-VL"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    timestamp_format = "{:.1f} s"
    liger_patch = "apply_liger_kernel_to_qwen2_5_vl"

    def patch_order(self, frames: int, rows: int, columns: int, vision: Any) -> torch.Tensor | None:
        """Merged tokens are grouped into square windows, row by row, each window read row by row."""
        merge = vision.spatial_merge_size
        side = vision.window_size // merge // vision.patch_size
        height, width = rows // merge, columns // merge
        if height <= side and width <= side:
            return None
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        windows_across = math.ceil(width / side)
        window = (y // side) * windows_across + x // side
        key = window * height * width + y * width + x
        place = key.flatten().argsort().argsort()  # merged token -> place in its frame's window order
        return (torch.arange(frames)[:, None] * height * width + place).flatten()

    def dense_mask(self, visible: torch.Tensor, attn_implementation: str, dtype: torch.dtype) -> Any:
        return {"full_attention": super().dense_mask(visible, attn_implementation, dtype)}


class Qwen3VL(BackboneFamily):
    """Qwen3-VL: its own format writes `<3.0 seconds>` before every group; early LLM layers read vision features."""

    model_type = "qwen3_vl"
    label = "Qwen3-VL"
    model_class = "Qwen3VLForConditionalGeneration"
    timestamp_format = "<{:.1f} seconds>"
    liger_patch = "apply_liger_kernel_to_qwen3_vl"

    def deepstack(self, vision_output: Any) -> list[torch.Tensor]:
        return list(vision_output.deepstack_features)


class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL with a mixture of experts in the LLM."""

    model_type = "qwen3_vl_moe"
    label = "Qwen3-VL-MoE"
    model_class = "Qwen3VLMoeForConditionalGeneration"
    liger_patch = "apply_liger_kernel_to_qwen3_vl_moe"


FAMILIES: dict[str, BackboneFamily] = {family.model_type: family for family in (Qwen25VL(), Qwen3VL(), Qwen3VLMoe())}


def family_of(model_type: str | None, source: Any = "The backbone") -> BackboneFamily:
    """The family of a configuration's `model_type`.

    Args:
        source: what holds the configuration; begins the message.

    Raises:
        ModelError: the family is not supported.
    """
    if model_type not in FAMILIES:
        labels = [family.label for family in FAMILIES.values()]
        raise ModelError(
            f"{source} holds a {model_type} model; a backbone must be {', '.join(labels[:-1])} or {labels[-1]}."
        )
    return FAMILIES[model_type]


def fingerprint(backbone: Any) -> str | None:
    """Sixteen hex digits of a backbone: its family, its size and a sample of its weights, rounded to bf16.

    The same weights in fp32 and in bf16 agree; another size, another family or a copy that was fine-tuned as a whole do
    not. A backbone on the meta device has no weights, and None for a fingerprint.
    """
    text, inner = backbone.config.text_config, backbone.model
    first, last = inner.language_model.layers[0], inner.language_model.layers[-1]
    sample = (
        inner.visual.patch_embed.proj.weight[0],
        first.self_attn.q_proj.weight[0],
        last.self_attn.o_proj.weight[-1],
        inner.language_model.norm.weight,
    )
    if any(tensor.is_meta for tensor in sample):
        return None
    digest = hashlib.sha256(f"{backbone.config.model_type} {text.num_hidden_layers} {text.hidden_size}".encode())
    for tensor in sample:
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def merger_dtype(visual: nn.Module) -> torch.dtype:
    """dtype of a vision tower's weights; its own `dtype` property would count float32 LoRA weights too."""
    patch_embed: Any = visual.patch_embed
    return patch_embed.proj.weight.dtype
