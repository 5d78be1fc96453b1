"""The temporal half: the backbone as the model runs it, with tokens of its own for the bridging queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .adapters import BridgeSTGPreTrainedModel
from .configuration_bridge_stg import BridgeSTGConfig
from .visual_tokens import VisualTokens, pad_groups


class BackboneModel(BridgeSTGPreTrainedModel):
    """Token embeddings, vision tower, positions and language model.

    Args:
        config, backbone: see `BridgeSTGPreTrainedModel`.
    """

    def __init__(self, config: BridgeSTGConfig, backbone: Any = None) -> None:
        super().__init__(config, backbone)
        if config.separate_bridge_embeddings:
            width = config.backbone_config.text_config.hidden_size
            self.bridge_embeddings = nn.Parameter(torch.empty(config.bridge_tokens, width))

    # Embeddings -----------------------------------------------------------------------------------------------

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
        """Resize embedding, head and configuration as `PreTrainedModel.resize_token_embeddings` does.

        If that fails, all three are as before.

        Raises:
            ValueError: a number is not an integer of at least 1, or rows that the model reads would be cut off.
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

    def _own_vocabulary(self) -> None:
        """Clear the checkpoint's name: a backbone with other embeddings must be saved whole."""
        if self.has_lora:
            raise ModelError("The embeddings of a model with LoRA adapters cannot change; call merge_lora() first.")
        self.config.backbone_name = self.config.backbone_fingerprint = None

    @property
    def input_device(self) -> torch.device:
        """The device that inputs must be on; while accelerate offloads the weights, it is not theirs."""
        hook = getattr(self.get_input_embeddings(), "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        return self.device if device is None else torch.device(device)

    @property
    def bridge_token_ids(self) -> range:
        """Ids of the bridging tokens.

        Raises:
            ValueError: the configuration does not say which.
        """
        first = self.config.bridge_token_id
        if first is None:
            raise ValueError("bridge_token_id must be set in the configuration: the id of <|bridge_0|>, got None.")
        return range(first, first + self.config.bridge_tokens)

    def bridge_token_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """bool, True at the bridging tokens, shape of `input_ids`."""
        ids = self.bridge_token_ids
        return (input_ids >= ids.start) & (input_ids < ids.stop)

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings `[B, L, D]`; those of the bridging tokens may come from a parameter of their own."""
        embeds = self.get_input_embeddings()(input_ids)
        if not self.config.separate_bridge_embeddings:
            return embeds
        check_resident(self.bridge_embeddings, "bridge_embeddings", input_ids)
        ids = self.bridge_token_ids
        bridge = self.bridge_embeddings[(input_ids - ids.start).clamp(0, len(ids) - 1)].to(embeds.dtype)
        return torch.where(self.bridge_token_mask(input_ids)[..., None], bridge, embeds)

    def embed_prompt(self, input_ids: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        """Token embeddings `[B, L, D]` with the visual tokens `merged` `[..., D]` in place of their placeholders."""
        embeds = self.embed_text(input_ids)
        mask = (input_ids == self.config.backbone_config.video_token_id)[..., None].expand_as(embeds)
        return embeds.masked_scatter(mask, merged.to(embeds.dtype))

    # Vision ----------------------------------------------------------------------------------------------------

    def encode_video(self, pixel_values: torch.Tensor, video_grid_thw: torch.Tensor) -> VisualTokens:
        """Run the vision tower over clips whose frames have one size.

        Args:
            pixel_values: `[rows of all clips, 3*tp*P*P]` from `BridgeSTGProcessor`.
            video_grid_thw: int64 `[B, 3]`, (groups, rows, columns); rows and columns equal.

        Raises:
            ValueError: the clips differ in rows or columns.
        """
        grids = video_grid_thw.tolist()
        _, rows, columns = grids[0]
        if any(grid[1:] != [rows, columns] for grid in grids):
            raise ValueError(f"all clips of a batch must share one grid (rows, columns), got {grids}.")
        vision = self.config.backbone_config.vision_config
        encoded = self.family.encode(self.backbone.model.visual, pixel_values, video_grid_thw, vision)
        groups = tuple(grid[0] for grid in grids)
        patches, merged, *deepstack = (
            pad_groups(tokens.reshape(sum(groups), -1, tokens.shape[-1]), groups)
            for tokens in (encoded[0], encoded[1], *encoded[2])
        )
        return VisualTokens(patches, merged, (rows, columns), groups, tuple(deepstack))

    # Language --------------------------------------------------------------------------------------------------

    def position_ids(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, grid: tuple[int, int] | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """mRoPE positions of a prompt in which every temporal group is a visual block of its own.

        Text advances all three axes by one; a group of r x c merged tokens occupies (p, p + row, p + column) and the
        text goes on at p + max(r, c), as Qwen3-VL does, and Qwen2.5-VL for a video of a single group.

        Args:
            input_ids: `[B, L]`.
            attention_mask: `[B, L]`, 0 at padding on either side.
            grid: (rows, columns) of patches, of all clips or int64 `[B, 2]`.

        Returns:
            (`[3, B, L]` positions, `[B]` the next free position).
        """
        merge = self.config.backbone_config.vision_config.spatial_merge_size
        size = torch.as_tensor(grid, device=input_ids.device).reshape(-1, 2) // merge
        rows, columns = size[:, :1], size[:, 1:]  # [B or 1, 1]
        per_group = rows * columns
        visual = input_ids == self.config.backbone_config.video_token_id
        inside = (visual.cumsum(-1) - 1).clamp(min=0) % per_group
        last = visual & (inside == per_group - 1)
        step = torch.where(visual, last.long() * torch.maximum(rows, columns), 1) * attention_mask.long()
        start = step.cumsum(-1) - step
        offsets = torch.stack([torch.zeros_like(inside), inside // columns, inside % columns])
        return start + offsets * visual, start[:, -1] + step[:, -1]

    def run_language_model(
        self, inputs_embeds: torch.Tensor, *, all_states: bool = True, **kwargs: Any
    ) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Run the LLM.

        Returns:
            (hidden states, output): the states start with the embeddings and end with the normalised last one, or
            hold the last one alone if `all_states` is False; the output is the LLM's own, with `past_key_values`
            and, where asked for, `attentions`.
        """
        output = self.backbone.model.language_model(
            inputs_embeds=inputs_embeds, output_hidden_states=all_states, **kwargs
        )
        states = output.hidden_states if all_states else (output.last_hidden_state,)
        return states, output

    def read_prompt(
        self, input_ids: torch.Tensor, clips: Sequence[Sequence[torch.Tensor]], **kwargs: Any
    ) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Run the LLM on text and video, with the vision features that early layers of some families read.

        Args:
            input_ids: `[B, L]`.
            clips: `VisualTokens.tokens` of each clip.
            kwargs: arguments of `run_language_model`.

        Returns:
            See `run_language_model`.
        """
        merged, *deepstack = (torch.cat(level) for level in zip(*clips, strict=True))
        if deepstack:
            kwargs["visual_pos_masks"] = input_ids == self.config.backbone_config.video_token_id
            kwargs["deepstack_visual_embeds"] = deepstack
        return self.run_language_model(self.embed_prompt(input_ids, merged), **kwargs)


def check_resident(parameter: torch.Tensor, name: str, inputs: torch.Tensor) -> None:
    """Check that a parameter is not offloaded: accelerate loads it for `forward`, and not for `predict`.

    Raises:
        ModelError: the parameter is not in memory.
    """
    if parameter.is_meta and not inputs.is_meta:
        raise ModelError(f"{name} is offloaded; keep the model's own parameters in memory to ground with it.")


def _restorer(layer: Any) -> Callable[[], None]:
    """A function that restores the present rows of an embedding or a head, which transformers resizes in place."""
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
