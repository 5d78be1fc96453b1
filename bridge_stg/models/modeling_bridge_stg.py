"""`BridgeSTGForVideoGrounding`: a temporal MLLM, STSB, ETA and QGSL as one Hugging Face model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.utils import ModelOutput

from ..modules.frame_contrast import FrameContrast
from ..modules.query_guided_token_pruner import QueryGuidedTokenPruner
from ..modules.semantic_bridge import BridgeQueries, SemanticBridge
from ..modules.spatial_decoder import DecodedTubes, SpatialDecoder, sinusoidal_embedding
from .configuration_bridge_stg import BridgeSTGConfig
from .grounding import GroundingMixin
from .vision_attention import batch_vision_attention


class VisualTokens(NamedTuple):
    """Vision tower output of a batch of clips with one grid.

    Attributes:
        patches: `[B, G, N, Dv]`, patch features before the merger, in merge-block order.
        merged: `[B, G, N / merge^2, D]`, what the LLM reads.
        centres: `[N, 2]`, (x, y) of every patch in [0, 1].
        grid: (rows, columns) of patches.
    """

    patches: torch.Tensor
    merged: torch.Tensor
    centres: torch.Tensor
    grid: tuple[int, int]


class Localisation(NamedTuple):
    """What the spatial half returns for S frames.

    Attributes:
        tubes: boxes and presence of every decoder layer.
        token_scores: `[B, S, N]` fp32, pruning score of every token, or None without pruning.
        kept_index: `[B, S, K]` tokens kept, in memory order.
        kept_score: `[B, S, K]`.
    """

    tubes: DecodedTubes
    token_scores: torch.Tensor | None
    kept_index: torch.Tensor | None
    kept_score: torch.Tensor | None


@dataclass
class BridgeSTGOutput(ModelOutput):
    """Training-time outputs. B clips, T frames, G temporal groups, S spatial frames, M hypotheses, L layers.

    Attributes:
        answer_logits: `[n, V]`, at the positions whose label is not -100, or None without labels.
        answer_targets: `[n]`, the labels at these positions.
        relevance: `[B, T]` logits of dense alignment: is frame t inside the event?
        contrast: `[B, T]` logits of the frame contrast (one value per group, repeated for its frames).
        boxes: `[L, B, S, M, 4]` cxcywh in [0, 1].
        presence: `[L, B, S, M]` logits.
        token_scores: `[B, S, N]`, pruning scores.
        token_centres: `[N, 2]`, (x, y) in [0, 1].
    """

    answer_logits: torch.Tensor | None = None
    answer_targets: torch.Tensor | None = None
    relevance: torch.Tensor | None = None
    contrast: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    presence: torch.Tensor | None = None
    token_scores: torch.Tensor | None = None
    token_centres: torch.Tensor | None = None


class BridgeSTGPreTrainedModel(PreTrainedModel):
    config_class = BridgeSTGConfig
    base_model_prefix = "bridge_stg"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules: ClassVar[list[str]] = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"]

    def _init_weights(self, module: nn.Module) -> None:
        """The backbone initialises itself; our own modules keep the initialisation of their constructors."""


class BridgeSTGForVideoGrounding(BridgeSTGPreTrainedModel, GroundingMixin):
    """The model of the package: see `docs/model.md` for the parts and `BridgeSTGConfig` for their switches.

    All clips of a batch share one grid (rows, columns, groups): `BridgeSTGProcessor` pads the text, not the video.
    """

    def __init__(self, config: BridgeSTGConfig) -> None:
        super().__init__(config)
        vision, text = config.backbone_config.vision_config, config.backbone_config.text_config
        dim = config.decoder_dim
        self.backbone = Qwen2_5_VLForConditionalGeneration(config.backbone_config)
        batch_vision_attention(self.backbone.model.visual)
        multi_layer = config.interactive_queries == "multi"
        self.semantic_bridge = SemanticBridge(text.hidden_size, dim, config.bridge_layers, multi_layer=multi_layer)
        if not config.semantic_bridge:
            blind = torch.randn(config.bridge_layers, config.bridge_tokens, text.hidden_size)
            self.blind_queries = nn.Parameter(blind)
        frame_dim = text.hidden_size if config.memory_features == "merged" else vision.hidden_size
        self.memory_norm = nn.LayerNorm(frame_dim)
        self.memory_projection = nn.Linear(frame_dim, dim)
        self.memory_position = nn.Linear(2 * dim, dim)
        self.memory_phase = nn.Embedding(vision.temporal_patch_size, dim)
        nn.init.normal_(self.memory_phase.weight, std=0.02)
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
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    # Vision ----------------------------------------------------------------------------------------------------

    def encode_video(self, pixel_values: torch.Tensor, video_grid_thw: torch.Tensor) -> VisualTokens:
        """Run the vision tower.

        Args:
            pixel_values: `[B*G*rows*cols, 3*tp*P*P]` from `BridgeSTGProcessor`.
            video_grid_thw: int64 `[B, 3]`, all rows equal.

        Raises:
            ValueError: the clips differ in grid.
        """
        grids = video_grid_thw.tolist()
        if any(grid != grids[0] for grid in grids):
            raise ValueError(f"all clips of a batch must share one grid (groups, rows, columns), got {grids}.")
        visual = self.backbone.model.visual
        groups, rows, columns = grids[0]
        merge = visual.spatial_merge_size
        captured: list[torch.Tensor] = []
        hook = visual.merger.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
        try:
            merged = visual(pixel_values.to(visual.dtype), grid_thw=video_grid_thw).pooler_output
        finally:
            hook.remove()
        order = _window_order(groups * len(grids), rows, columns, self.config.backbone_config.vision_config)
        patches = captured[0].unflatten(0, (-1, merge * merge))
        if order is not None:
            patches = patches[order.to(patches.device)]
        shape = (len(grids), groups)
        patches = patches.reshape(*shape, rows * columns, -1)
        centres = _patch_centres(rows, columns, merge).to(patches.device)
        return VisualTokens(patches, merged.reshape(*shape, -1, merged.shape[-1]), centres, (rows, columns))

    # Language --------------------------------------------------------------------------------------------------

    def position_ids(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, grid: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """mRoPE positions of a prompt in which every temporal group is a visual block of its own.

        Text advances all three axes by one; a group of r x c merged tokens occupies (p, p + row, p + column) and the
        text goes on at p + max(r, c), as Qwen3-VL does for timestamped groups.

        Args:
            input_ids: `[B, L]`.
            attention_mask: `[B, L]`, 0 at padding on either side.
            grid: (rows, columns) of patches.

        Returns:
            (`[3, B, L]` positions, `[B]` the next free position).
        """
        merge = self.config.backbone_config.vision_config.spatial_merge_size
        rows, columns = grid[0] // merge, grid[1] // merge
        per_group = rows * columns
        visual = input_ids == self.config.backbone_config.video_token_id
        inside = (visual.cumsum(-1) - 1).clamp(min=0) % per_group
        last = visual & (inside == per_group - 1)
        step = torch.where(visual, last.long() * max(rows, columns), 1) * attention_mask.long()
        start = step.cumsum(-1) - step
        offsets = torch.stack([torch.zeros_like(inside), inside // columns, inside % columns])
        return start + offsets * visual, start[:, -1] + step[:, -1]

    def embed_prompt(self, input_ids: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        """Token embeddings `[B, L, D]` with the visual placeholders replaced by `merged` `[B, G, n, D]`."""
        embeds = self.get_input_embeddings()(input_ids)
        mask = (input_ids == self.config.backbone_config.video_token_id)[..., None].expand_as(embeds)
        return embeds.masked_scatter(mask, merged.to(embeds.dtype))

    def run_language_model(self, inputs_embeds: torch.Tensor, **kwargs: Any) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Hidden states (embeddings first, the last one normalised) and the cache of the LLM."""
        output = self.backbone.model.language_model(inputs_embeds=inputs_embeds, output_hidden_states=True, **kwargs)
        return output.hidden_states, output.past_key_values

    def bridge_queries(self, hidden_states: tuple[torch.Tensor, ...], where: torch.Tensor) -> BridgeQueries:
        """STSB over the states at the bridging tokens.

        Args:
            hidden_states: of `run_language_model`, each `[B, L, D]`.
            where: `[B, L]` bool with M True entries a row.
        """
        batch = where.shape[0]
        if not self.config.semantic_bridge:
            states = [layer.expand(batch, -1, -1) for layer in self.blind_queries]
        else:
            picked = (hidden_states[i] for i in self.config.bridge_layer_indices)
            states = [state[where].unflatten(0, (batch, -1)) for state in picked]
        return self.semantic_bridge(states)

    # Space -----------------------------------------------------------------------------------------------------

    def visual_memory(self, visual: VisualTokens, lm_states: torch.Tensor | None) -> torch.Tensor:
        """Memory `[B, G, N, C]`: projected visual tokens, position, and LLM states `[B, G, n, D]` where configured."""
        features = visual.merged if self.config.memory_features == "merged" else visual.patches
        memory = self.memory_projection(self.memory_norm(features))
        centres = self.memory_centres(visual)
        memory = memory + self.memory_position(sinusoidal_embedding(8 * centres, self.config.decoder_dim).flatten(-2))
        if self.config.memory_features == "vision+lm" and lm_states is not None:
            lm = self.memory_lm_projection(self.memory_lm_norm(lm_states))
            memory = memory + lm.repeat_interleave(memory.shape[2] // lm.shape[2], dim=2)
        return memory

    def memory_centres(self, visual: VisualTokens) -> torch.Tensor:
        """(x, y) of every memory token, `[N, 2]` in [0, 1]."""
        if self.config.memory_features != "merged":
            return visual.centres
        merge = self.config.backbone_config.vision_config.spatial_merge_size
        return visual.centres.unflatten(0, (-1, merge * merge)).mean(1)

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
        reference = (weight[..., None] * centres[pruned.index]).sum(-2).to(memory.dtype)
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
        return self.dense_alignment(pooled).flatten(1)

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
    ) -> BridgeSTGOutput:
        """One teacher-forced pass: text, video, answer and bridging tokens in, everything the losses need out.

        Args:
            input_ids: int64 `[B, L]`, ending in M bridging tokens a row (right padding).
            attention_mask: `[B, L]`.
            pixel_values, video_grid_thw: see `encode_video`.
            frame_times: `[B, T]` seconds of the frames the MLLM sees.
            frame_index: int64 `[B, S]` frames the spatial decoder sees; -1 is padding.
            labels: `[B, L]`, -100 where no loss; None for no language-model loss.
            hidden_answer: bool `[B, L]`, tokens the bridging tokens must not see (answer dropout). Needs an attention
                implementation that takes a dense mask (sdpa or eager).
        """
        visual = self.encode_video(pixel_values, video_grid_thw)
        bridge = self.bridge_token_mask(input_ids)
        position_ids, _ = self.position_ids(input_ids, attention_mask, visual.grid)
        mask: Any = attention_mask
        if hidden_answer is not None:
            mask = {"full_attention": _bridge_mask(attention_mask, bridge, hidden_answer)}
        hidden_states, _ = self.run_language_model(
            self.embed_prompt(input_ids, visual.merged), position_ids=position_ids, attention_mask=mask, use_cache=False
        )
        group_states, group_ends = self.group_states(input_ids, hidden_states[-1], visual)
        memory = self.visual_memory(visual, group_states)
        centres = self.memory_centres(visual)
        queries = self.bridge_queries(hidden_states, bridge)
        located = self.localise(queries, memory, centres, frame_index, frame_times)
        output = BridgeSTGOutput(
            boxes=located.tubes.boxes,
            presence=located.tubes.presence,
            token_scores=located.token_scores,
            token_centres=centres,
        )
        if self.config.dense_alignment:
            output.relevance = self.relevance_logits(group_states, group_ends)
        if self.config.frame_contrast:
            group_size = self.config.backbone_config.vision_config.temporal_patch_size
            contrast = self.frame_contrast(queries.aggregated, memory.mean(2))
            output.contrast = contrast.repeat_interleave(group_size, dim=1)
        if labels is not None:
            target = F.pad(labels[:, 1:], (0, 1), value=-100)
            chosen = target != -100
            output.answer_logits = self.backbone.lm_head(hidden_states[-1][chosen])
            output.answer_targets = target[chosen]
        return output

    def bridge_token_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """True at the bridging tokens, same shape as `input_ids`."""
        first = self.config.bridge_token_id
        if first is None:
            raise ValueError("bridge_token_id must be set in the configuration: the id of <|bridge_0|>, got None.")
        return (input_ids >= first) & (input_ids < first + self.config.bridge_tokens)

    def group_states(
        self, input_ids: torch.Tensor, states: torch.Tensor, visual: VisualTokens
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """LLM states at the visual tokens `[B, G, n, D]` and at each group's `<|vision_end|>` `[B, G, D]`."""
        backbone = self.config.backbone_config
        shape = visual.merged.shape[:3]
        inside = states[input_ids == backbone.video_token_id].unflatten(0, shape)
        ends = states[input_ids == backbone.vision_end_token_id].unflatten(0, shape[:2])
        return inside, ends


def _bridge_mask(attention_mask: torch.Tensor, bridge: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Causal mask `[B, 1, L, L]` in which bridging tokens do not see `hidden`; padding rows see themselves."""
    length = attention_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    visible = causal & attention_mask.bool()[:, None]
    visible = visible & ~(bridge[:, :, None] & hidden[:, None])
    visible = visible | torch.eye(length, dtype=torch.bool, device=attention_mask.device)
    return visible[:, None]


def _patch_centres(rows: int, columns: int, merge: int) -> torch.Tensor:
    """(x, y) in [0, 1] of every patch in the processor's merge-block order, `[rows * columns, 2]`."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    centres = torch.stack([(x + 0.5) / columns, (y + 0.5) / rows], dim=-1)
    blocks = centres.reshape(rows // merge, merge, columns // merge, merge, 2)
    return blocks.permute(0, 2, 1, 3, 4).reshape(-1, 2)


def _window_order(frames: int, rows: int, columns: int, vision: Any) -> torch.Tensor | None:
    """Where each merged token stands in the vision tower's window order, or None when the order is unchanged.

    Qwen2.5-VL groups merged tokens into square windows, row by row, each window read row by row.
    """
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
