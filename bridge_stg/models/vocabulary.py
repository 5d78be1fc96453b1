"""The token embeddings of the model: its backbone's, with rows for the bridging tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import ModelError


class VocabularyMixin:
    """Reading, replacing and resizing the embeddings of `BridgeSTGForVideoGrounding`, and looking tokens up."""

    config: Any
    backbone: Any
    bridge_embeddings: nn.Parameter

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._own_vocabulary()
        self.backbone.set_input_embeddings(value)

    def set_output_embeddings(self, value: nn.Module) -> None:
        self._own_vocabulary()
        self.backbone.set_output_embeddings(value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As `PreTrainedModel.resize_token_embeddings`, head and configuration included; all of it or nothing.

        Raises:
            ValueError: a number is no integer or below 1, or rows that the model reads would be cut off.
            ModelError: the model has LoRA adapters, which are saved apart from a backbone that must not change.
        """
        for name, value in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1 or None, got {value!r}.")
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        backbone = self.config.backbone_config
        last = max(backbone.video_token_id, backbone.vision_end_token_id)
        if self.config.bridge_token_id is not None:
            last = max(last, self.config.bridge_token_id + self.config.bridge_tokens - 1)
        if new_num_tokens is not None and new_num_tokens <= last:
            raise ValueError(
                f"new_num_tokens must be at least {last + 1}, to keep the rows of the vision and bridging tokens, "
                f"got {new_num_tokens}."
            )
        embedding, head, rows = (
            self.get_input_embeddings(),
            self.get_output_embeddings(),
            backbone.text_config.vocab_size,
        )
        undo = _restorer(embedding), _restorer(head)
        self._own_vocabulary()
        try:
            return self.backbone.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        except BaseException:
            for restore in undo:
                restore()
            self.backbone.set_input_embeddings(embedding)
            self.backbone.set_output_embeddings(head)
            backbone.text_config.vocab_size = rows
            raise

    def _own_vocabulary(self: Any) -> None:
        """A backbone with other embeddings is no longer the checkpoint that it came from, and is saved whole."""
        if self.has_lora:
            raise ModelError("The embeddings of a model with LoRA adapters cannot change; call merge_lora() first.")
        self.config.backbone_name = self.config.backbone_fingerprint = None

    @property
    def input_device(self: Any) -> torch.device:
        """Where inputs go; not the device of the weights while accelerate offloads them."""
        hook = getattr(self.get_input_embeddings(), "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        return self.device if device is None else torch.device(device)

    # Looking up ------------------------------------------------------------------------------------------------

    def bridge_token_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """True at the bridging tokens, same shape as `input_ids`."""
        first = self.config.bridge_token_id
        if first is None:
            raise ValueError("bridge_token_id must be set in the configuration: the id of <|bridge_0|>, got None.")
        return (input_ids >= first) & (input_ids < first + self.config.bridge_tokens)

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[B, L, D]`; the bridging tokens from their own parameter where the configuration has one."""
        embeds = self.get_input_embeddings()(input_ids)
        if not self.config.separate_bridge_embeddings:
            return embeds
        check_resident(self.bridge_embeddings, "bridge_embeddings", input_ids)
        bridge = self.bridge_token_mask(input_ids)
        index = (input_ids - self.config.bridge_token_id).clamp(0, self.config.bridge_tokens - 1)
        return torch.where(bridge[..., None], self.bridge_embeddings[index].to(embeds.dtype), embeds)

    def embed_prompt(self, input_ids: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        """Token embeddings `[B, L, D]` with the visual placeholders replaced by `merged` `[..., D]`, clip by clip."""
        embeds = self.embed_text(input_ids)
        mask = (input_ids == self.config.backbone_config.video_token_id)[..., None].expand_as(embeds)
        return embeds.masked_scatter(mask, merged.to(embeds.dtype))


def check_resident(parameter: torch.Tensor, name: str, inputs: torch.Tensor) -> None:
    """accelerate brings a module's own parameters back for its `forward`, and `predict` is another method.

    Raises:
        ModelError: the parameter is not in memory.
    """
    if parameter.is_meta and not inputs.is_meta:
        raise ModelError(f"{name} is offloaded; keep the model's own parameters in memory to ground with it.")


def _restorer(layer: Any) -> Callable[[], None]:
    """A function that gives an embedding or a head its present rows back; transformers resizes them in place."""
    weight, data = layer.weight, layer.weight.data
    bias = getattr(layer, "bias", None)
    bias_data = None if bias is None else bias.data
    count = "num_embeddings" if isinstance(layer, nn.Embedding) else "out_features"
    rows = getattr(layer, count)

    def restore() -> None:
        layer.weight, layer.weight.data = weight, data
        if bias is not None:
            layer.bias, layer.bias.data = bias, bias_data
        setattr(layer, count, rows)

    return restore
