"""The outputs of the model's forward passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput

from ..modules.spatial_decoder import DecodedTubes


class Localisation(NamedTuple):
    """The output of the spatial half for S frames.

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
    """The output of a teacher-forced pass over B clips of T frames, with S spatial frames, M hypotheses and L layers.

    Attributes:
        loss: scalar, the weighted sum of all terms that have a label; None without one.
        answer_logits: `[n, V]`, at the positions whose label is not -100, or None without labels.
        answer_targets: `[n]`, the labels at these positions.
        relevance: `[B, T]` logits of dense alignment: is frame t inside the event?
        contrast: `[B, T]` logits of the frame contrast (one value per group, repeated for its frames).
        boxes: `[L, B, S, M, 4]` cxcywh in [0, 1].
        presence: `[L, B, S, M]` logits.
        token_scores: `[B, S, N]`, pruning scores.
        token_centres: `[N, 2]`, (x, y) in [0, 1].
        frame_mask: bool `[B, T]`, False at the padding of shorter clips, where `relevance` and `contrast` mean
            nothing; None without padding.
        hidden_states: of the LLM where asked for, embeddings first, the last one normalised; each `[B, L, D]`.
        attentions: of the LLM's layers where asked for, each `[B, heads, L, L]`.
    """

    loss: torch.Tensor | None = None
    answer_logits: torch.Tensor | None = None
    answer_targets: torch.Tensor | None = None
    relevance: torch.Tensor | None = None
    contrast: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    presence: torch.Tensor | None = None
    token_scores: torch.Tensor | None = None
    token_centres: torch.Tensor | None = None
    frame_mask: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
