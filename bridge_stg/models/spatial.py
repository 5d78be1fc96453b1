"""The spatial half: from the LLM's states and the vision tower's features to boxes and presence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..modules.semantic_bridge import BridgeQueries
from ..modules.spatial_decoder import sinusoidal_embedding
from .outputs import BridgeSTGOutput, Localisation
from .visual_tokens import VisualTokens, pad_groups, patch_centres
from .vocabulary import check_resident


class SpatialMixin:
    """STSB, visual memory, ETA's heads and QGSL of `BridgeSTGForVideoGrounding`, on what the other half computed."""

    config: Any
    training: bool
    blind_queries: nn.Parameter
    semantic_bridge: Any
    memory_norm: nn.Module
    memory_projection: Any
    memory_position: nn.Module
    memory_phase: nn.Module
    memory_lm_norm: nn.Module
    memory_lm_projection: nn.Module
    pruner: Any
    spatial_decoder: Any
    dense_alignment: nn.Module
    frame_contrast: nn.Module
    bridge_token_mask: Any

    @property
    def spatial_dtype(self) -> torch.dtype:
        return self.memory_projection.weight.dtype

    def bridge_queries(self, hidden_states: tuple[torch.Tensor, ...], where: torch.Tensor) -> BridgeQueries:
        """STSB over the states at the bridging tokens.

        Args:
            hidden_states: of `run_language_model`, each `[B, L, D]`.
            where: `[B, L]` bool with M True entries a row.
        """
        batch = where.shape[0]
        if not self.config.semantic_bridge:
            check_resident(self.blind_queries, "blind_queries", where)
            states = [layer.expand(batch, -1, -1).to(self.spatial_dtype) for layer in self.blind_queries]
        else:
            if (found := where.sum(-1)).ne(self.config.bridge_tokens).any():
                raise ValueError(
                    f"Every row of input_ids must hold the {self.config.bridge_tokens} bridging tokens, got "
                    f"{found.tolist()}."
                )
            picked = (hidden_states[i] for i in self.config.bridge_layer_indices)
            states = [state[where].unflatten(0, (batch, -1)).to(self.spatial_dtype) for state in picked]
        return self.semantic_bridge(states)

    def visual_memory(self, visual: VisualTokens, lm_states: torch.Tensor | None) -> torch.Tensor:
        """Memory `[B, G, N, C]`: projected visual tokens, position, and LLM states `[B, G, n, D]` where configured."""
        features = visual.merged if self.config.memory_features == "merged" else visual.patches
        memory = self.memory_projection(self.memory_norm(features.to(self.spatial_dtype)))
        centres = self.memory_centres(visual.grid, memory.device)
        place = sinusoidal_embedding(8 * centres, self.config.decoder_dim).flatten(-2)
        memory = memory + self.memory_position(place.to(self.spatial_dtype))
        if self.config.memory_features == "vision+lm" and lm_states is not None:
            lm = self.memory_lm_projection(self.memory_lm_norm(lm_states.to(self.spatial_dtype)))
            memory = memory + lm.repeat_interleave(memory.shape[2] // lm.shape[2], dim=2)
        return memory

    def memory_centres(self, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """(x, y) of every memory token of a frame of (rows, columns) patches, `[N, 2]` in [0, 1]."""
        merge = self.config.backbone_config.vision_config.spatial_merge_size
        centres = patch_centres(*grid, merge).to(device)
        return centres.unflatten(0, (-1, merge * merge)).mean(1) if self.config.memory_features == "merged" else centres

    def localise(
        self,
        queries: BridgeQueries,
        memory: torch.Tensor,
        centres: torch.Tensor,
        frame_index: torch.Tensor,
        frame_times: torch.Tensor,
    ) -> Localisation:
        """QGSL on chosen frames: prune their tokens, decode boxes and presence.

        Args:
            queries: of `bridge_queries`.
            memory: `[B, G, N, C]`.
            centres: `[N, 2]`.
            frame_index: int64 `[B, S]`, frames of the clip; -1 is padding.
            frame_times: `[B, T]`, seconds.
        """
        group_size = self.config.backbone_config.vision_config.temporal_patch_size
        batch, frames = frame_index.shape
        frame_mask = frame_index >= 0
        safe = frame_index.clamp(min=0)
        rows = torch.arange(batch, device=memory.device)[:, None]
        tokens = memory[rows, safe // group_size] + self.memory_phase(safe % group_size)[:, :, None]  # [B, S, N, C]
        times = frame_times.gather(1, safe)
        mask = None if bool(frame_mask.all()) else frame_mask
        if not self.config.pruning:
            tubes = self.spatial_decoder(queries.interactive, tokens, times, frame_mask=mask)
            return Localisation(tubes, None, None, None)
        flat = tokens.flatten(0, 1)
        pruned = self.pruner(flat, queries.aggregated, return_scores=self.training)
        shape = (batch, frames)
        weight = pruned.score.float().softmax(-1)
        reference = (weight[..., None] * centres[pruned.index]).sum(-2)
        tubes = self.spatial_decoder(
            queries.interactive,
            pruned.tokens.unflatten(0, shape),
            times,
            reference=reference.unflatten(0, shape),
            bias=pruned.log_gate.unflatten(0, shape) if self.config.gate else None,
            frame_mask=mask,
        )
        scores = None if pruned.scores is None else pruned.scores.unflatten(0, shape)
        return Localisation(tubes, scores, pruned.index.unflatten(0, shape), pruned.score.unflatten(0, shape))

    def relevance_logits(self, group_states: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
        """Dense alignment `[B, T]` from the LLM states of each group `[B, G, n, D]` and at its end `[B, G, D]`."""
        pooled = torch.cat([group_states.mean(2), group_ends], dim=-1)
        return self.dense_alignment(pooled.to(self.spatial_dtype)).flatten(1)

    def group_states(
        self, input_ids: torch.Tensor, states: torch.Tensor, visual: VisualTokens
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """LLM states at the visual tokens `[B, G, n, D]` and at each group's `<|vision_end|>` `[B, G, D]`."""
        backbone = self.config.backbone_config
        inside = states[input_ids == backbone.video_token_id]
        if len(inside) != (wanted := sum(visual.groups) * visual.merged.shape[2]):
            raise ValueError(
                f"input_ids must hold a video token for each of {wanted} visual tokens, got {len(inside)}."
            )
        inside = inside.unflatten(0, (-1, visual.merged.shape[2]))
        ends = states[input_ids == backbone.vision_end_token_id]
        return pad_groups(inside, visual.groups), pad_groups(ends, visual.groups)

    def _locate(
        self,
        input_ids: torch.Tensor,
        hidden_states: tuple[torch.Tensor, ...],
        visual: VisualTokens,
        frame_index: torch.Tensor,
        frame_times: torch.Tensor,
    ) -> BridgeSTGOutput:
        """The spatial half of `forward`."""
        group_states, group_ends = self.group_states(input_ids, hidden_states[-1], visual)
        memory = self.visual_memory(visual, group_states)
        centres = self.memory_centres(visual.grid, memory.device)
        queries = self.bridge_queries(hidden_states, self.bridge_token_mask(input_ids))
        located = self.localise(queries, memory, centres, frame_index, frame_times)
        group_size = self.config.backbone_config.vision_config.temporal_patch_size
        output = BridgeSTGOutput(
            boxes=located.tubes.boxes,
            presence=located.tubes.presence,
            token_scores=located.token_scores,
            token_centres=centres,
            frame_mask=visual.frame_mask(group_size),
        )
        if self.config.dense_alignment:
            output.relevance = self.relevance_logits(group_states, group_ends)
        if self.config.frame_contrast:
            contrast = self.frame_contrast(queries.aggregated, memory.mean(2))
            output.contrast = contrast.repeat_interleave(group_size, dim=1)
        return output
