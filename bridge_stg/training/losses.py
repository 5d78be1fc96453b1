"""The losses of Bridge-STG. A loss whose label is absent is absent, never zero-filled."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from ..models.modeling_bridge_stg import BridgeSTGOutput
from ..modules.boxes import cxcywh_to_xyxy, pairwise_iou_giou
from ..modules.frame_contrast import FrameContrast
from .matcher import select_hypotheses


@dataclass(frozen=True)
class LossWeights:
    """Weight of every term; our choices, after TubeDETR and STCAT where they overlap.

    `auxiliary` is no term: it is the weight of the earlier decoder layers beside the last one's 1.
    """

    language: float = 1.0
    alignment: float = 3.0
    contrast: float = 0.5
    token: float = 2.0
    box: float = 5.0
    giou: float = 2.0
    presence: float = 2.0
    auxiliary: float = 1.0

    @classmethod
    def terms(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls) if field.name != "auxiliary")


@dataclass(frozen=True)
class GroundingTargets:
    """Labels of a batch. B clips, T frames the MLLM sees, S frames the spatial decoder sees.

    Attributes:
        boxes: `[B, S, 4]` cxcywh in [0, 1].
        has_box: bool `[B, S]`, frames with a box inside the event (positive frames).
        present: bool `[B, S]`, inside the event.
        has_presence: bool `[B, S]`, False for padding frames and for samples without an interval.
        inside: bool `[B, T]`, frames inside the event.
        has_interval: bool `[B]`.
    """

    boxes: torch.Tensor
    has_box: torch.Tensor
    present: torch.Tensor
    has_presence: torch.Tensor
    inside: torch.Tensor
    has_interval: torch.Tensor


def grounding_losses(
    output: BridgeSTGOutput, targets: GroundingTargets, weights: LossWeights, *, match_one: bool
) -> dict[str, torch.Tensor]:
    """Every term that has a label, unweighted, by name as in `LossWeights.terms`.

    Args:
        match_one: False supervises all tube hypotheses; True only that of least total cost per clip.
    """
    losses: dict[str, torch.Tensor] = {}
    if output.answer_logits is not None and output.answer_targets is not None and len(output.answer_targets):
        losses["language"] = F.cross_entropy(output.answer_logits.float(), output.answer_targets)
    if targets.has_interval.any():
        timed = targets.has_interval
        real = torch.ones_like(targets.inside) if output.frame_mask is None else output.frame_mask
        if output.relevance is not None:
            chosen = timed[:, None] & real
            losses["alignment"] = F.binary_cross_entropy_with_logits(
                output.relevance[chosen].float(), targets.inside[chosen].float()
            )
        if output.contrast is not None:
            inside = targets.inside & ~(targets.inside | ~real).all(-1, keepdim=True)  # no negatives: no contrast
            logits = output.contrast.float().masked_fill(~real, -1e4)
            losses["contrast"] = FrameContrast.loss(logits[timed], inside[timed])
    if output.token_scores is not None and output.token_centres is not None and targets.has_box.any():
        losses["token"] = token_in_box_loss(output.token_scores, output.token_centres, targets)
    if output.boxes is not None and output.presence is not None:
        losses |= _tube_losses(output.boxes.float(), output.presence.float(), targets, weights, match_one=match_one)
    return losses


def token_in_box_loss(scores: torch.Tensor, centres: torch.Tensor, targets: GroundingTargets) -> torch.Tensor:
    """BCE 'is this token's centre inside the box?' on the pruning score, positives and negatives weighted evenly.

    Args:
        scores: `[B, S, N]`.
        centres: `[N, 2]`, (x, y) in [0, 1].
    """
    box = cxcywh_to_xyxy(targets.boxes)[:, :, None]  # [B, S, 1, 4]
    inside = ((centres >= box[..., :2]) & (centres < box[..., 2:])).all(-1)  # [B, S, N]
    inside, scores = inside[targets.has_box], scores[targets.has_box].float()
    loss = F.binary_cross_entropy_with_logits(scores, inside.float(), reduction="none")
    positive = (loss * inside).sum() / inside.sum().clamp(min=1)
    negative = (loss * ~inside).sum() / (~inside).sum().clamp(min=1)
    return (positive + negative) / 2


def _tube_losses(
    boxes: torch.Tensor, presence: torch.Tensor, targets: GroundingTargets, weights: LossWeights, *, match_one: bool
) -> dict[str, torch.Tensor]:
    """Box L1, GIoU and presence BCE, averaged over decoder layers with the weight of the auxiliary ones.

    boxes `[L, B, S, M, 4]`, presence `[L, B, S, M]`.
    """
    target = targets.boxes[None, :, :, None]
    l1 = (boxes - target).abs().sum(-1)  # [L, B, S, M]
    giou = 1 - pairwise_iou_giou(boxes, target)[1]
    bce = F.binary_cross_entropy_with_logits(
        presence, targets.present[None, :, :, None].float().expand_as(presence), reduction="none"
    )
    box_weight = targets.has_box.float()[None, :, :, None]
    presence_weight = targets.has_presence.float()[None, :, :, None]
    if match_one:
        cost = (weights.box * l1 + weights.giou * giou) * box_weight + weights.presence * bce * presence_weight
        chosen = select_hypotheses(cost.detach())[None, :, None]  # [1, B, 1, M]
        # The chosen hypothesis learns the tube; the others learn that they are absent.
        absent = F.binary_cross_entropy_with_logits(presence, torch.zeros_like(presence), reduction="none")
        bce = torch.where(chosen.bool(), bce, absent)
        box_weight = box_weight * chosen
    losses = {}
    hypotheses = boxes.shape[3]
    layer = torch.full((boxes.shape[0], 1, 1, 1), weights.auxiliary, device=boxes.device)
    layer[-1] = 1.0
    layers = layer.sum()
    if targets.has_box.any():
        count = box_weight.sum() * (1 if box_weight.shape[-1] > 1 else hypotheses) * layers
        losses["box"] = (l1 * box_weight * layer).sum() / count
        losses["giou"] = (giou * box_weight * layer).sum() / count
    if targets.has_presence.any():
        losses["presence"] = (bce * presence_weight * layer).sum() / (presence_weight.sum() * hypotheses * layers)
    return losses
