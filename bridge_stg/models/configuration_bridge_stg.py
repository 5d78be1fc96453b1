"""`BridgeSTGConfig`: every choice of the architecture, each part switchable."""

from __future__ import annotations

import difflib
import inspect
import math
import sys
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
        self._refuse_misspelt(kwargs)
        if not isinstance(backbone_config, PreTrainedConfig):
            if not isinstance(backbone_config, dict | None):
                raise ValueError(f"backbone_config must be a configuration or its dict, got {backbone_config!r}.")
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

    @classmethod
    def field_names(cls) -> list[str]:
        """The constructor's arguments."""
        return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")]

    def _refuse_misspelt(self, extra: dict[str, Any]) -> None:
        """Fields of `transformers` and a user's own pass; one that nearly has the name of ours is a mistake."""
        for name in extra:
            if near := difflib.get_close_matches(name, self.field_names(), n=1, cutoff=0.85):
                raise ValueError(f"{name!r} is no field of BridgeSTGConfig; the nearest is {near[0]!r}.")

    def check(self) -> None:
        """Raise ValueError, naming the field, for a value of the wrong type, out of range, or that does not exist."""
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
        for name in _SWITCHES:
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {value!r}.")
        for name in _COUNTS:
            if not _is_integer(value := getattr(self, name)) or not 1 <= value <= _MOST:
                raise ValueError(f"{name} must be an integer in 1..{_MOST}, got {value!r}.")
        for name, (low, high) in _REALS.items():
            if not _is_real(value := getattr(self, name)) or not low < value <= high:
                raise ValueError(f"{name} must be in ({low:g}, {high:g}], got {value!r}.")
        threshold = self.presence_threshold
        if not _is_real(threshold) or not 0 <= threshold <= 1:
            raise ValueError(f"presence_threshold must be in [0, 1], got {threshold!r}.")
        for name in ("backbone_name", "backbone_fingerprint"):
            if (value := getattr(self, name)) is not None and not (isinstance(value, str) and value.isprintable()):
                raise ValueError(f"{name} must be a printable text or None, got {value!r}.")
        self._check_against_backbone()

    def _check_against_backbone(self) -> None:
        text = self.backbone_config.text_config
        layers, rows, first = text.num_hidden_layers, text.vocab_size, self.bridge_token_id
        if self.bridge_layers > layers:
            raise ValueError(f"bridge_layers must be in 1..{layers} (layers of the LLM), got {self.bridge_layers}.")
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(f"decoder_heads must divide decoder_dim={self.decoder_dim}, got {self.decoder_heads}.")
        if first is None:
            return
        if not _is_integer(first) or first < 0:
            raise ValueError(f"bridge_token_id must be an integer of at least 0 or None, got {first!r}.")
        if first + self.bridge_tokens > rows:
            raise ValueError(
                f"bridge_token_id must leave room for {self.bridge_tokens} bridging tokens in a vocabulary of {rows}, "
                f"got {first}."
            )

    @property
    def tie_word_embeddings(self) -> bool:
        """The backbone's."""
        return bool(self.backbone_config.tie_word_embeddings)

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.backbone_config.tie_word_embeddings = value

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """Of the backbone's LLM, whose vocabulary `resize_token_embeddings` changes."""
        return self.backbone_config.get_text_config(*args, **kwargs)

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
_SWITCHES = (
    "semantic_bridge",
    "pruning",
    "gate",
    "frame_contrast",
    "dense_alignment",
    "separate_bridge_embeddings",
)
_COUNTS = (
    "bridge_tokens",
    "bridge_layers",
    "decoder_dim",
    "decoder_heads",
    "decoder_ffn_dim",
    "score_dim",
    "max_answer_tokens",
)
_MOST = 2**20  # a slip of the keyboard should not ask for all the memory there is
_REALS = {"keep": (0.0, 1.0), "contrast_temperature": (0.0, math.inf)}  # above the first, up to the second


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    """`math.isfinite` would fail on an int past every float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
