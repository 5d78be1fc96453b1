"""The losses of Bridge-STG. A loss whose label is absent is absent, never zero-filled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

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


class Part(NamedTuple):
    """A share of a term: its sum over this process's batch, what to divide it by, and the weight of the quotient.

    The sum depends on the outputs also where nothing counts, so that every process has the same gradients to reduce.
    """

    total: torch.Tensor
    count: torch.Tensor
    weight: float = 1.0


LossSums = dict[str, list[Part]]


def grounding_losses(
    output: BridgeSTGOutput, targets: GroundingTargets, weights: LossWeights, *, match_one: bool
) -> dict[str, torch.Tensor]:
    """Every term that has a label, unweighted, by name as in `LossWeights.terms`.

    Args:
        match_one: False supervises all tube hypotheses; True only that of least total cost per clip.
    """
    return mean_losses(loss_sums(output, targets, weights, match_one=match_one))


def mean_losses(
    sums: LossSums, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda counts: counts, processes: int = 1
) -> dict[str, torch.Tensor]:
    """Sums over counts; terms that count nothing anywhere are left out.

    Args:
        reduce: adds up a vector of counts over processes.
        processes: how many there are. A process gets its share times their number: the mean over processes, which
            data-parallel training takes of losses and gradients, is then that over the samples of all of them.
    """
    parts = [part for term in sums.values() for part in term]
    if not parts:
        return {}
    counts = iter(reduce(torch.stack([part.count.float() for part in parts])).tolist())
    losses = {}
    for name, term in sums.items():
        found = [(part, count) for part, count in zip(term, [next(counts) for _ in term], strict=True) if count > 0]
        if found:
            losses[name] = torch.stack([part.weight * processes * part.total / count for part, count in found]).sum()
    return losses


def loss_sums(output: BridgeSTGOutput, targets: GroundingTargets, weights: LossWeights, *, match_one: bool) -> LossSums:
    """The terms before they are divided; arguments as in `grounding_losses`."""
    sums: LossSums = {}
    if output.answer_logits is not None and output.answer_targets is not None:
        total = F.cross_entropy(output.answer_logits.float(), output.answer_targets, reduction="sum")
        sums["language"] = [Part(total, torch.tensor(len(output.answer_targets), device=total.device))]
    real = torch.ones_like(targets.inside) if output.frame_mask is None else output.frame_mask
    if output.relevance is not None:
        chosen = targets.has_interval[:, None] & real
        logits = torch.where(chosen, output.relevance.float(), 0.0)
        bce = F.binary_cross_entropy_with_logits(logits, targets.inside.float(), reduction="none")
        sums["alignment"] = [Part((bce * chosen).sum(), chosen.sum())]
    if output.contrast is not None:
        inside = targets.inside & ~(targets.inside | ~real).all(-1, keepdim=True)  # no negatives: no contrast
        inside = inside & targets.has_interval[:, None]
        logits = torch.where(real, output.contrast.float(), -1e4)
        sums["contrast"] = [Part(*FrameContrast.loss_sum(logits, inside))]
    if output.token_scores is not None and output.token_centres is not None:
        sums["token"] = token_in_box_sums(output.token_scores, output.token_centres, targets)
    if output.boxes is not None and output.presence is not None:
        sums |= _tube_sums(output.boxes.float(), output.presence.float(), targets, weights, match_one=match_one)
    return sums


def token_in_box_loss(scores: torch.Tensor, centres: torch.Tensor, targets: GroundingTargets) -> torch.Tensor:
    """BCE 'is this token's centre inside the box?' on the pruning score, positives and negatives weighted evenly.

    Args:
        scores: `[B, S, N]`.
        centres: `[N, 2]`, (x, y) in [0, 1].
    """
    return mean_losses({"token": token_in_box_sums(scores, centres, targets)})["token"]


def token_in_box_sums(scores: torch.Tensor, centres: torch.Tensor, targets: GroundingTargets) -> list[Part]:
    """`token_in_box_loss` before it is divided: the positive tokens and the negative ones."""
    box = cxcywh_to_xyxy(targets.boxes)[:, :, None]  # [B, S, 1, 4]
    inside = ((centres >= box[..., :2]) & (centres < box[..., 2:])).all(-1)  # [B, S, N]
    scores = torch.where(targets.has_box[..., None], scores.float(), 0.0)
    loss = F.binary_cross_entropy_with_logits(scores, inside.float(), reduction="none")
    positive, negative = (targets.has_box[..., None] & side for side in (inside, ~inside))
    return [Part((loss * side).sum(), side.sum(), 0.5) for side in (positive, negative)]


def _tube_sums(
    boxes: torch.Tensor, presence: torch.Tensor, targets: GroundingTargets, weights: LossWeights, *, match_one: bool
) -> LossSums:
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
    hypotheses = boxes.shape[3]
    layer = torch.full((boxes.shape[0], 1, 1, 1), weights.auxiliary, device=boxes.device)
    layer[-1] = 1.0
    boxed = box_weight.sum() * (1 if box_weight.shape[-1] > 1 else hypotheses) * layer.sum()
    return {
        "box": [Part((l1 * box_weight * layer).sum(), boxed)],
        "giou": [Part((giou * box_weight * layer).sum(), boxed)],
        "presence": [Part((bce * presence_weight * layer).sum(), presence_weight.sum() * hypotheses * layer.sum())],
    }
