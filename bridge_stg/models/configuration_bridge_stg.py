"""`BridgeSTGConfig`: the configuration of the architecture, in which each part can be switched."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig

from ..errors import ConfigError
from ..settings import Rule
from .backbones import family_of

_COUNT = Rule(int, least=1, most=2**20)  # a typing error must not ask for all the memory of the machine
MODEL_RULES: dict[str, Rule] = {
    **dict.fromkeys(("bridge_tokens", "bridge_layers", "max_answer_tokens"), _COUNT),
    **dict.fromkeys(("decoder_dim", "decoder_heads", "decoder_ffn_dim", "score_dim"), _COUNT),
    **dict.fromkeys(("semantic_bridge", "pruning", "gate", "frame_contrast"), Rule(bool)),
    **dict.fromkeys(("dense_alignment", "separate_bridge_embeddings"), Rule(bool)),
    "interactive_queries": Rule(str, choices=("multi", "last")),
    "memory_features": Rule(str, choices=("vision", "merged", "vision+lm")),
    "reference_points": Rule(str, choices=("score", "learned")),
    "interval_source": Rule(str, choices=("text", "presence")),
    "keep": Rule(float, above=0, most=1),
    "contrast_temperature": Rule(float, above=0),
    "presence_threshold": Rule(float, least=0, most=1),
}
"""What users may set: the fields of `BridgeSTGConfig` that do not come from the backbone."""

_OTHER_RULES = {
    "bridge_token_id": Rule(int, least=0, optional=True),
    **dict.fromkeys(("backbone_name", "backbone_fingerprint"), Rule(str, optional=True)),
}


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
        backbone_fingerprint: fingerprint of its weights, see `models/backbones.py`.
    """

    model_type = "bridge_stg"
    sub_configs: ClassVar[dict[str, type]] = {"backbone_config": AutoConfig}

    backbone_config: Any = None  # the family's configuration; its sub-configurations are typed loosely
    bridge_tokens: int = 8
    bridge_layers: int = 6
    bridge_token_id: int | None = None
    decoder_dim: int = 256
    decoder_heads: int = 8
    decoder_ffn_dim: int = 1024
    interactive_queries: str = "multi"
    semantic_bridge: bool = True
    memory_features: str = "vision+lm"
    pruning: bool = True
    keep: float = 0.25
    score_dim: int = 64
    gate: bool = True
    reference_points: str = "score"
    frame_contrast: bool = True
    dense_alignment: bool = True
    contrast_temperature: float = 0.1
    interval_source: str = "text"
    presence_threshold: float = 0.5
    max_answer_tokens: int = 24
    separate_bridge_embeddings: bool = False
    backbone_name: str | None = None
    backbone_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_misspelt(kwargs)
        if not isinstance(self.backbone_config, PreTrainedConfig):
            if not isinstance(self.backbone_config, dict | None):
                raise ValueError(f"backbone_config must be a configuration or its dict, got {self.backbone_config!r}.")
            values = dict(self.backbone_config or {})
            model_type = values.pop("model_type", Qwen2_5_VLConfig.model_type)
            self.backbone_config = AutoConfig.for_model(family_of(model_type).model_type, **values)
        self.check()
        super().__post_init__(**kwargs)

    @classmethod
    def field_names(cls) -> list[str]:
        """Names of the fields that are not those of every configuration."""
        return ["backbone_config", *MODEL_RULES, *_OTHER_RULES]

    def _refuse_misspelt(self, extra: dict[str, Any]) -> None:
        """Refuse a field whose name is nearly one of ours; others may be fields of `transformers` or of the user."""
        for name in extra:
            if near := difflib.get_close_matches(name, self.field_names(), n=1, cutoff=0.85):
                raise ValueError(f"{name!r} is no field of BridgeSTGConfig; the nearest is {near[0]!r}.")

    def check(self) -> None:
        """Raise ValueError, naming the field, for a value of the wrong type, out of range, or that does not exist."""
        for name, rule in (MODEL_RULES | _OTHER_RULES).items():
            try:
                setattr(self, name, rule.read(getattr(self, name), name, type(self).__name__))
            except ConfigError as error:
                raise ValueError(str(error)) from None
        if not (self.backbone_name or "").isprintable():
            raise ValueError(f"backbone_name must be a printable text or None, got {self.backbone_name!r}.")
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
        if first + self.bridge_tokens > rows:
            raise ValueError(
                f"bridge_token_id must leave room for {self.bridge_tokens} bridging tokens in a vocabulary of {rows}, "
                f"got {first}."
            )

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether embedding and head of the backbone share their weights."""
        return bool(self.backbone_config.tie_word_embeddings)

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.backbone_config.tie_word_embeddings = value

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The configuration of the backbone's LLM, whose vocabulary `resize_token_embeddings` changes."""
        return self.backbone_config.get_text_config(*args, **kwargs)

    @property
    def bridge_layer_indices(self) -> tuple[int, ...]:
        """LLM layers that the bridge reads, as indices of the hidden-state tuple: evenly spaced, with the last."""
        layers = self.backbone_config.text_config.num_hidden_layers
        return tuple(round(layers * (i + 1) / self.bridge_layers) for i in range(self.bridge_layers))
