"""`BridgeSTGForVideoGrounding`: a temporal MLLM, STSB, ETA and QGSL as one Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import can_return_tuple

from ..modules.frame_contrast import FrameContrast
from ..modules.query_guided_token_pruner import QueryGuidedTokenPruner
from ..modules.semantic_bridge import SemanticBridge
from ..modules.spatial_decoder import SpatialDecoder
from .adapters import BackboneMixin
from .backbones import family_of
from .configuration_bridge_stg import BridgeSTGConfig
from .grounding import GroundingMixin
from .losses import GroundingTargets, grounding_loss
from .outputs import BridgeSTGOutput
from .pickling import state_without_recorders
from .spatial import SpatialMixin
from .vision_attention import batch_vision_attention
from .visual_tokens import VisualTokens, pad_groups
from .vocabulary import VocabularyMixin


class BridgeSTGPreTrainedModel(PreTrainedModel):
    config_class = BridgeSTGConfig
    base_model_prefix = "bridge_stg"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    # Boxes in bf16 would be off by 0.4% of a frame; the spatial half is small beside a real backbone.
    _keep_in_fp32_modules_strict: list[str] = [  # noqa: RUF012 (transformers makes it the instance's)
        "semantic_bridge",
        "blind_queries",
        "bridge_embeddings",
        "memory_norm",
        "memory_projection",
        "memory_position",
        "memory_phase",
        "memory_lm_norm",
        "memory_lm_projection",
        "pruner",
        "spatial_decoder",
        "frame_contrast",
        "dense_alignment",
    ]

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the module's own weights as its constructor does; the backbone's classes see to theirs.

        `transformers` calls this for what a checkpoint lacks, with the functions of `torch.nn.init` guarded: they pass
        over what was loaded.
        """
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    def __getstate__(self) -> dict[str, Any]:
        return state_without_recorders(self.__dict__)


class BridgeSTGForVideoGrounding(
    BackboneMixin, VocabularyMixin, SpatialMixin, GroundingMixin, BridgeSTGPreTrainedModel
):
    """The model of the package: see `docs/model.md` for the parts and `BridgeSTGConfig` for their switches.

    Args:
        config: the architecture.
        backbone: a loaded backbone of `config.backbone_config`, taken as it is; None builds one with random weights.
    """

    def __init__(self, config: BridgeSTGConfig, backbone: Any = None) -> None:
        super().__init__(config)
        vision, text = config.backbone_config.vision_config, config.backbone_config.text_config
        dim = config.decoder_dim
        self.family = family_of(config.backbone_config.model_type)
        self.backbone: Any = self.family.network()(config.backbone_config) if backbone is None else backbone
        if backbone is not None:
            for module in backbone.modules():  # or post_init would draw its weights anew
                module.__dict__["_is_hf_initialized"] = True
        batch_vision_attention(self.backbone.model.visual)
        if config.separate_bridge_embeddings:
            self.bridge_embeddings = nn.Parameter(torch.empty(config.bridge_tokens, text.hidden_size))
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
        """Draw the parameters that belong to no part."""
        if self.config.separate_bridge_embeddings:
            nn.init.zeros_(self.bridge_embeddings)
        if not self.config.semantic_bridge:
            nn.init.normal_(self.blind_queries)

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
        """Hidden states (embeddings first, the last one normalised; only that with `all_states` off) and the output.

        The output is the LLM's own, with `past_key_values` and, where asked for, `attentions`.
        """
        output = self.backbone.model.language_model(
            inputs_embeds=inputs_embeds, output_hidden_states=all_states, **kwargs
        )
        states = output.hidden_states if all_states else (output.last_hidden_state,)
        return states, output

    def read_prompt(
        self, input_ids: torch.Tensor, clips: Sequence[Sequence[torch.Tensor]], **kwargs: Any
    ) -> tuple[tuple[torch.Tensor, ...], Any]:
        """`run_language_model` on text and video, vision features of early layers included.

        Args:
            input_ids: `[B, L]`.
            clips: `VisualTokens.tokens` of each clip.
            kwargs: of `run_language_model`.
        """
        merged, *deepstack = (torch.cat(level) for level in zip(*clips, strict=True))
        if deepstack:
            kwargs["visual_pos_masks"] = input_ids == self.config.backbone_config.video_token_id
            kwargs["deepstack_visual_embeds"] = deepstack
        return self.run_language_model(self.embed_prompt(input_ids, merged), **kwargs)

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
        """One teacher-forced pass: text, video, answer and bridging tokens in, everything the losses need out.

        With labels in `labels`, `targets` or both, `loss` is `self.loss_function(output, targets)`: `grounding_loss`
        with its default weights, until another function is assigned.

        Args:
            input_ids: int64 `[B, L]`, ending in M bridging tokens a row (right padding).
            attention_mask: `[B, L]`.
            pixel_values, video_grid_thw: see `encode_video`.
            frame_times: `[B, T]` seconds of the frames the MLLM sees; anything behind the last of a shorter clip.
            frame_index: int64 `[B, S]` frames the spatial decoder sees; -1 is padding.
            labels: `[B, L]`, -100 where no loss; None for no language-model loss.
            hidden_answer: bool `[B, L]`, tokens the bridging tokens must not see (answer dropout). Needs an attention
                implementation that takes a dense mask (sdpa or eager).
            targets: true times and boxes, `GroundingTargets` or its fields in a dict; None for the answer's loss alone.
            return_loss: False leaves `loss` out, for a caller that computes its own.
            output_hidden_states: whether to return those of the LLM, or which; None takes the configuration's choice.
            output_attentions: whether to return the LLM's; as in transformers, only the attention implementation
                "eager" has any.

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
    """All for True, None for False; else the tuple with None in place of those that were not asked for."""
    if isinstance(choice, bool):
        return states if choice else None
    wanted = {i % len(states) for i in ([choice] if isinstance(choice, int) else choice) if abs(i) <= len(states)}
    return tuple(state if i in wanted else None for i, state in enumerate(states))


class _SmallEmbedding(nn.Embedding):
    """An embedding that starts near zero: what it tells apart is nearly the same at first."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
