"""`BridgeSTGConfig`: every choice of the architecture, each part switchable."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig

from .backbones import family_of


class BridgeSTGConfig(PreTrainedConfig):
    """Configuration of `BridgeSTGForVideoGrounding`.

    The paper's public text (arXiv 2604.08014) fixes the parts; the numbers below are this project's choices.

    Args:
        backbone_config: a configuration of one of the families in `models/backbones.py`, or its dict. Default: the
            stock Qwen2.5-VL.
        bridge_tokens: M, learned bridging queries appended after the temporal answer; one tube hypothesis each.
        bridge_layers: L, LLM layers read by the bridge, evenly spaced with the last included; equals decoder layers.
        bridge_token_id: id of `<|bridge_0|>`; the M tokens have consecutive ids.
        decoder_dim: C, width of the spatial decoder.
        decoder_heads: attention heads of the decoder.
        decoder_ffn_dim: hidden width of its feed-forward blocks.
        interactive_queries: "multi" gives decoder layer l the queries of LLM layer l; "last" gives every layer the
            queries of the last LLM layer (the ablation of multi-layer interactive queries).
        semantic_bridge: False replaces the LLM's bridging states by learned embeddings that know nothing of the
            sentence (the ablation of STSB).
        memory_features: "vision" (patch features before the merger), "merged" (after it) or "vision+lm" (before the
            merger, plus the LLM states at the same tokens).
        pruning: whether the decoder sees pruned tokens.
        keep: rho, the share of tokens a frame keeps; k = ceil(keep * N).
        score_dim: width of the space in which tokens are scored against the aggregated query.
        gate: whether the pruning score enters the attention as an additive bias log sigmoid(score).
        reference_points: "score" starts a frame's box at the score-weighted centre of its kept tokens; "learned"
            starts it at a learned point.
        frame_contrast, dense_alignment: two of the three parts of ETA; the third, times as text, is the processor's
            `timestamp_format`.
        contrast_temperature: tau of the frame contrast.
        interval_source: which source `ground` asks first, "text" (the generated answer; the presence curve when it
            cannot be read) or "presence".
        presence_threshold: level above which a frame counts as inside.
        max_answer_tokens: bound of the generated answer.
        separate_bridge_embeddings: the bridging tokens have a parameter of their own instead of rows of the LLM's
            embedding, so that they learn while the backbone is frozen.
        backbone_name: name or folder of the checkpoint that the backbone came from; None for one of our own.
        backbone_fingerprint: of its weights, see `models/adapters.py`.
    """

    model_type = "bridge_stg"
    sub_configs: ClassVar[dict[str, type]] = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        bridge_tokens: int = 8,
        bridge_layers: int = 6,
        bridge_token_id: int | None = None,
        decoder_dim: int = 256,
        decoder_heads: int = 8,
        decoder_ffn_dim: int = 1024,
        interactive_queries: str = "multi",
        semantic_bridge: bool = True,
        memory_features: str = "vision+lm",
        pruning: bool = True,
        keep: float = 0.25,
        score_dim: int = 64,
        gate: bool = True,
        reference_points: str = "score",
        frame_contrast: bool = True,
        dense_alignment: bool = True,
        contrast_temperature: float = 0.1,
        interval_source: str = "text",
        presence_threshold: float = 0.5,
        max_answer_tokens: int = 24,
        separate_bridge_embeddings: bool = False,
        backbone_name: str | None = None,
        backbone_fingerprint: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(backbone_config, PreTrainedConfig):
            values = dict(backbone_config or {})
            model_type = values.pop("model_type", Qwen2_5_VLConfig.model_type)
            backbone_config = AutoConfig.for_model(family_of(model_type).model_type, **values)
        self.backbone_config: Any = backbone_config  # its sub-configurations are typed loosely
        self.bridge_tokens = bridge_tokens
        self.bridge_layers = bridge_layers
        self.bridge_token_id = bridge_token_id
        self.decoder_dim = decoder_dim
        self.decoder_heads = decoder_heads
        self.decoder_ffn_dim = decoder_ffn_dim
        self.interactive_queries = interactive_queries
        self.semantic_bridge = semantic_bridge
        self.memory_features = memory_features
        self.pruning = pruning
        self.keep = keep
        self.score_dim = score_dim
        self.gate = gate
        self.reference_points = reference_points
        self.frame_contrast = frame_contrast
        self.dense_alignment = dense_alignment
        self.contrast_temperature = contrast_temperature
        self.interval_source = interval_source
        self.presence_threshold = presence_threshold
        self.max_answer_tokens = max_answer_tokens
        self.separate_bridge_embeddings = separate_bridge_embeddings
        self.backbone_name = backbone_name
        self.backbone_fingerprint = backbone_fingerprint
        self.check()
        super().__init__(**kwargs)

    def check(self) -> None:
        """Raise ValueError, naming the field, for a choice that does not exist or a number out of range."""
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
        layers = self.backbone_config.text_config.num_hidden_layers
        if not 1 <= self.bridge_layers <= layers:
            raise ValueError(f"bridge_layers must be in 1..{layers} (layers of the LLM), got {self.bridge_layers}.")
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep must be in (0, 1], got {self.keep}.")

    @property
    def bridge_layer_indices(self) -> tuple[int, ...]:
        """LLM layers read by the bridge, 1-based in the hidden-state tuple, evenly spaced, the last included."""
        layers = self.backbone_config.text_config.num_hidden_layers
        return tuple(round(layers * (i + 1) / self.bridge_layers) for i in range(self.bridge_layers))


_CHOICES = {
    "interactive_queries": ("multi", "last"),
    "memory_features": ("vision", "merged", "vision+lm"),
    "reference_points": ("score", "learned"),
    "interval_source": ("text", "presence"),
}
