"""`BridgeSTGModel`: a temporal MLLM, STSB, ETA and QGSL as one Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import can_return_tuple

from ..modules.frame_contrast import FrameContrast
from ..modules.query_guided_token_pruner import QueryGuidedTokenPruner
from ..modules.semantic_bridge import BridgeQueries, SemanticBridge
from ..modules.spatial_decoder import SpatialDecoder, sinusoidal_embedding
from .backbone_model import BackboneModel, check_resident
from .configuration_bridge_stg import BridgeSTGConfig
from .losses import GroundingTargets, grounding_loss
from .outputs import BridgeSTGOutput, Localisation
from .visual_tokens import VisualTokens, frame_mask, pad_groups, patch_centres


class BridgeSTGModel(BackboneModel):
    """The parts of the model and their forward pass.

    `docs/model.md` describes the parts, `BridgeSTGConfig` their switches.

    Args:
        config: the architecture.
        backbone: a loaded backbone of `config.backbone_config`, taken as it is; None builds one with random weights.
    """

    def __init__(self, config: BridgeSTGConfig, backbone: Any = None) -> None:
        super().__init__(config, backbone)
        vision, text = config.backbone_config.vision_config, config.backbone_config.text_config
        dim = config.decoder_dim
        multi_layer = config.interactive_queries == "multi"
        self.semantic_bridge = SemanticBridge(text.hidden_size, dim, config.bridge_layers, multi_layer=multi_layer)
        if not config.semantic_bridge:
            blind = torch.empty(config.bridge_layers, config.bridge_tokens, text.hidden_size)
            self.blind_queries = nn.Parameter(blind)
        frame_dim = text.hidden_size if config.memory_features == "merged" else vision.hidden_size
        self.memory_norm = nn.LayerNorm(frame_dim)
        self.memory_projection = nn.Linear(frame_dim, dim)
        self.memory_position = nn.Linear(2 * dim, dim)
        self.memory_phase = _SmallEmbedding(vision.temporal_patch_size, dim)
        if config.memory_features == "vision+lm":
            self.memory_lm_norm = nn.LayerNorm(text.hidden_size)
            self.memory_lm_projection = nn.Linear(text.hidden_size, dim)
        if config.pruning:
            self.pruner = QueryGuidedTokenPruner(dim, dim, config.score_dim, config.keep)
        learned = config.reference_points == "learned" or not config.pruning
        self.spatial_decoder = SpatialDecoder(
            dim, config.decoder_heads, config.decoder_ffn_dim, config.bridge_layers, learned_reference=learned
        )
        if config.frame_contrast:
            self.frame_contrast = FrameContrast(dim, dim, config.contrast_temperature)
        if config.dense_alignment:
            width = 2 * text.hidden_size
            self.dense_alignment = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, vision.temporal_patch_size)
            )
        self.loss_function = grounding_loss
        kept = type(self)._keep_in_fp32_modules_strict
        self._keep_in_fp32_modules_strict = [name for name in kept if getattr(self, name, None) is not None]
        self.post_init()

    def reset_parameters(self) -> None:
        """Initialise the parameters that belong to no part."""
        if self.config.separate_bridge_embeddings:
            nn.init.zeros_(self.bridge_embeddings)
        if not self.config.semantic_bridge:
            nn.init.normal_(self.blind_queries)

    # Spatial half ---------------------------------------------------------------------------------------------

    @property
    def spatial_dtype(self) -> torch.dtype:
        return self.memory_projection.weight.dtype

    def bridge_queries(self, hidden_states: tuple[torch.Tensor, ...], where: torch.Tensor) -> BridgeQueries:
        """Apply STSB to the LLM's states at the bridging tokens.

        Args:
            hidden_states: states from `run_language_model`, each `[B, L, D]`.
            where: `[B, L]` bool with M True entries a row.

        Raises:
            ValueError: a row of `where` has another number of bridging tokens.
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
        """Memory `[B, G, N, C]` of projected visual tokens, positions, and `lm_states` `[B, G, n, D]` if configured."""
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
        """Centre (x, y) of every memory token of a frame of (rows, columns) patches, `[N, 2]` in [0, 1]."""
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
        """Apply QGSL to chosen frames: prune their tokens, then decode boxes and presence.

        Args:
            queries: what `bridge_queries` returned.
            memory: `[B, G, N, C]`.
            centres: `[N, 2]`, see `memory_centres`.
            frame_index: int64 `[B, S]`, frames of the clip; -1 is padding.
            frame_times: `[B, T]`, seconds.
        """
        group_size = self.config.backbone_config.vision_config.temporal_patch_size
        batch, frames = frame_index.shape
        real = frame_index >= 0
        safe = frame_index.clamp(min=0)
        rows = torch.arange(batch, device=memory.device)[:, None]
        tokens = memory[rows, safe // group_size] + self.memory_phase(safe % group_size)[:, :, None]  # [B, S, N, C]
        times = frame_times.gather(1, safe)
        mask = None if bool(real.all()) else real
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
        """Logits of dense alignment `[B, T]`.

        Args:
            group_states: `[B, G, n, D]`, LLM states at the visual tokens of each group.
            group_ends: `[B, G, D]`, LLM states at the end of each group.
        """
        pooled = torch.cat([group_states.mean(2), group_ends], dim=-1)
        return self.dense_alignment(pooled.to(self.spatial_dtype)).flatten(1)

    def group_states(
        self, input_ids: torch.Tensor, states: torch.Tensor, visual: VisualTokens
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """LLM states at the visual tokens `[B, G, n, D]` and at each group's `<|vision_end|>` `[B, G, D]`.

        Raises:
            ValueError: `input_ids` has another number of video tokens than there are visual tokens.
        """
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
        """Run the spatial half of `forward`."""
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
            frame_mask=frame_mask(visual.groups, group_size, memory.device),
        )
        if self.config.dense_alignment:
            output.relevance = self.relevance_logits(group_states, group_ends)
        if self.config.frame_contrast:
            contrast = self.frame_contrast(queries.aggregated, memory.mean(2))
            output.contrast = contrast.repeat_interleave(group_size, dim=1)
        return output

    # Both halves ----------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        video_grid_thw: torch.Tensor,
        frame_times: torch.Tensor,
        frame_index: torch.Tensor,
        labels: torch.Tensor | None = None,
        hidden_answer: torch.Tensor | None = None,
        targets: GroundingTargets | Mapping[str, torch.Tensor] | None = None,
        *,
        return_loss: bool = True,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
    ) -> BridgeSTGOutput:
        """Run one teacher-forced pass over text, video, answer and bridging tokens; return all that the losses need.

        With labels in `labels`, `targets` or both, `loss` is `self.loss_function(output, targets)`: `grounding_loss`
        with its default weights, until another function is assigned.

        Args:
            input_ids: int64 `[B, L]`, ending in M bridging tokens a row (right padding).
            attention_mask: `[B, L]`.
            pixel_values, video_grid_thw: see `encode_video`.
            frame_times: `[B, T]`, seconds of the frames that the MLLM sees; values behind a shorter clip are ignored.
            frame_index: int64 `[B, S]`, frames that the spatial decoder sees; -1 is padding.
            labels: `[B, L]`, -100 where there is no loss; None for no language-model loss.
            hidden_answer: bool `[B, L]`, tokens the bridging tokens must not see (answer dropout). Needs an attention
                implementation that takes a dense mask (sdpa or eager).
            targets: true times and boxes, `GroundingTargets` or its fields in a dict; None for the answer's loss alone.
            return_loss: False leaves `loss` out, for a caller that computes its own.
            output_hidden_states: whether to return the LLM's hidden states, or which of them; None takes the
                configuration's choice.
            output_attentions: whether to return the LLM's attentions; as in transformers, only the attention
                implementation "eager" has any.

        Raises:
            ValueError: the clips differ in rows or columns, `input_ids` lacks bridging tokens in a row or a token for
                each visual token of the clips, or `hidden_answer` hides anything from flash attention.
        """
        attention = self.config.backbone_config.text_config._attn_implementation
        want_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        want_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        visual = self.encode_video(pixel_values, video_grid_thw)
        bridge = self.bridge_token_mask(input_ids)
        position_ids, _ = self.position_ids(input_ids, attention_mask, visual.grid)
        mask: Any = attention_mask
        if hidden_answer is not None and ("flash" not in attention or bool(hidden_answer.any())):
            visible = _bridge_mask(attention_mask, bridge, hidden_answer)
            mask = self.family.dense_mask(visible, attention, visual.merged.dtype)
        clips = [visual.tokens(clip) for clip in range(len(input_ids))]
        options = {"output_attentions": True} if want_attentions else {}
        hidden_states, language = self.read_prompt(
            input_ids, clips, position_ids=position_ids, attention_mask=mask, use_cache=False, **options
        )
        with torch.autocast(input_ids.device.type, enabled=False):  # the spatial half stays in its own dtype
            output = self._locate(input_ids, hidden_states, visual, frame_index, frame_times)
        if labels is not None:
            target = F.pad(labels[:, 1:], (0, 1), value=-100)
            chosen = target != -100
            output.answer_logits = self.backbone.lm_head(hidden_states[-1][chosen])
            output.answer_targets = target[chosen]
        if return_loss and (labels is not None or targets is not None):
            wanted = GroundingTargets(**targets) if isinstance(targets, Mapping) else targets
            output.loss = self.loss_function(output, wanted)
        output.hidden_states = _chosen_states(hidden_states, want_states)
        output.attentions = language.attentions if want_attentions else None
        return output


def _bridge_mask(attention_mask: torch.Tensor, bridge: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Causal mask `[B, 1, L, L]` in which bridging tokens do not see `hidden`; padding rows see themselves."""
    length = attention_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    visible = causal & attention_mask.bool()[:, None]
    visible = visible & ~(bridge[:, :, None] & hidden[:, None])
    visible = visible | torch.eye(length, dtype=torch.bool, device=attention_mask.device)
    return visible[:, None]


def _chosen_states(states: tuple[torch.Tensor, ...], choice: bool | int | Sequence[int]) -> Any:
    """Select hidden states: all for True, None for False; for indices, a tuple with None in the other places."""
    if isinstance(choice, bool):
        return states if choice else None
    wanted = {i % len(states) for i in ([choice] if isinstance(choice, int) else choice) if abs(i) <= len(states)}
    return tuple(state if i in wanted else None for i, state in enumerate(states))


class _SmallEmbedding(nn.Embedding):
    """An embedding that starts near zero, so that its rows differ little at first."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
