"""The losses of Bridge-STG and the matcher. A term without labels is left out, and not counted as zero."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..modules.boxes import cxcywh_to_xyxy, pairwise_iou_giou
from ..modules.frame_contrast import FrameContrast
from ..settings import limit
from .outputs import BridgeSTGOutput


@dataclass(frozen=True)
class LossWeights:
    """The weight of every term: our choices, taken from TubeDETR and STCAT where they have the same term.

    `auxiliary` is not the weight of a term, but of the earlier decoder layers; the last layer has weight 1.
    """

    language: float = field(default=1.0, metadata=limit(least=0))
    alignment: float = field(default=3.0, metadata=limit(least=0))
    contrast: float = field(default=0.5, metadata=limit(least=0))
    token: float = field(default=2.0, metadata=limit(least=0))
    box: float = field(default=5.0, metadata=limit(least=0))
    giou: float = field(default=2.0, metadata=limit(least=0))
    presence: float = field(default=2.0, metadata=limit(least=0))
    auxiliary: float = field(default=1.0, metadata=limit(least=0))

    @classmethod
    def terms(cls) -> tuple[str, ...]:
        return tuple(each.name for each in fields(cls) if each.name != "auxiliary")


@dataclass(frozen=True)
class GroundingTargets:
    """Labels of a batch of B clips, with T frames that the MLLM sees and S that the spatial decoder sees.

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


Sums = dict[str, list[tuple[torch.Tensor, str]]]
"""Sums over this rank's batch by term, each with the name of the count in `LabelCounts` that divides it.

A sum depends on the outputs even if it has no label, so that every rank has the same gradients to reduce.
"""


class LabelCounts(NamedTuple):
    """How many labels of each kind there are in all the batches that are averaged together.

    Attributes:
        answer_tokens: tokens with a language-model label.
        timed_frames: frames of clips with an interval.
        contrasted_clips: clips with frames inside their event and outside.
        tokens_inside, tokens_outside: memory tokens in and out of the box, on frames with a box.
        boxes: frames with a box.
        judged_frames: frames of the spatial decoder that are known to be inside the event or outside.
    """

    answer_tokens: float
    timed_frames: float
    contrasted_clips: float
    tokens_inside: float
    tokens_outside: float
    boxes: float
    judged_frames: float


def count_labels(
    targets: GroundingTargets, answer_tokens: torch.Tensor, frame_mask: torch.Tensor | None, centres: torch.Tensor
) -> torch.Tensor:
    """Count the labels of one batch: the fields of `LabelCounts`, float32 `[7]`, on the device of the targets.

    Args:
        answer_tokens: int64 scalar, number of labels of the language model.
        frame_mask: bool `[B, T]`, False at the padding of shorter clips; None without padding.
        centres: `[N, 2]`, (x, y) of the memory's tokens in [0, 1].
    """
    in_box = _in_box(targets, centres)
    counts = (
        answer_tokens,
        _timed(targets, frame_mask).sum(),
        _contrasted(targets, frame_mask).any(-1).sum(),
        in_box.sum(),
        (targets.has_box[..., None] & ~in_box).sum(),
        targets.has_box.sum(),
        targets.has_presence.sum(),
    )
    return torch.stack([count.to(targets.boxes.device, torch.float32) for count in counts])


def grounding_losses(
    output: BridgeSTGOutput, targets: GroundingTargets, weights: LossWeights, *, match_one: bool
) -> dict[str, torch.Tensor]:
    """The mean over this batch of every term that has a label, without weights, by name as in `LossWeights.terms`.

    Args:
        match_one: False supervises all tube hypotheses; True only the one of least total cost in each clip.
    """
    answers = torch.tensor(0 if output.answer_targets is None else len(output.answer_targets))
    centres = torch.empty(0, 2) if output.token_centres is None else output.token_centres
    counts = count_labels(targets, answers, output.frame_mask, centres.to(targets.boxes.device))
    return mean_losses(loss_sums(output, targets, weights, match_one=match_one), LabelCounts(*counts.tolist()))


def grounding_loss(
    output: BridgeSTGOutput,
    targets: GroundingTargets | None = None,
    weights: LossWeights | None = None,
    match_one: bool = False,
) -> torch.Tensor | None:
    """The weighted sum of `grounding_losses`, which `BridgeSTGForVideoGrounding.forward` returns as `loss`.

    Assign `model.loss_function = functools.partial(grounding_loss, match_one=True)` to change it.

    Args:
        targets: None if only the answer has labels.
        weights: None takes the defaults.

    Returns:
        A scalar; None if the batch has no label.
    """
    weights = weights or LossWeights()
    if targets is not None:
        losses = grounding_losses(output, targets, weights, match_one=match_one)
    elif output.answer_logits is not None and output.answer_targets is not None and len(output.answer_targets):
        losses = {"language": F.cross_entropy(output.answer_logits.float(), output.answer_targets)}
    else:
        losses = {}
    if not losses:
        return None
    return torch.stack([getattr(weights, name) * value for name, value in losses.items()]).sum()


def mean_losses(sums: Sums, counts: LabelCounts, batches: int = 1) -> dict[str, torch.Tensor]:
    """Divide sums by counts; a term without labels is left out.

    Args:
        counts: label counts of all batches of the step, over all ranks.
        batches: number of these batches. The trainer averages the losses of the batches with equal weights; with this
            factor the average is the mean over all labels, however they are spread over the batches.
    """
    losses = {}
    for name, parts in sums.items():
        found = [batches * total / getattr(counts, count) for total, count in parts if getattr(counts, count) > 0]
        if found:
            losses[name] = torch.stack(found).sum()
    return losses


def loss_sums(output: BridgeSTGOutput, targets: GroundingTargets, weights: LossWeights, *, match_one: bool) -> Sums:
    """The sums of all terms, before they are divided; arguments as in `grounding_losses`."""
    sums: Sums = {}
    if output.answer_logits is not None and output.answer_targets is not None:
        total = F.cross_entropy(output.answer_logits.float(), output.answer_targets, reduction="sum")
        sums["language"] = [(total, "answer_tokens")]
    if output.relevance is not None:
        chosen = _timed(targets, output.frame_mask)
        logits = torch.where(chosen, output.relevance.float(), 0.0)
        bce = F.binary_cross_entropy_with_logits(logits, targets.inside.float(), reduction="none")
        sums["alignment"] = [((bce * chosen).sum(), "timed_frames")]
    if output.contrast is not None:
        logits = output.contrast.float()
        logits = logits if output.frame_mask is None else torch.where(output.frame_mask, logits, -1e4)
        total = FrameContrast.loss_sum(logits, _contrasted(targets, output.frame_mask))
        sums["contrast"] = [(total, "contrasted_clips")]
    if output.token_scores is not None and output.token_centres is not None:
        sums["token"] = _token_sums(output.token_scores, output.token_centres, targets)
    if output.boxes is not None and output.presence is not None:
        sums |= _tube_sums(output.boxes.float(), output.presence.float(), targets, weights, match_one=match_one)
    return sums


def _timed(targets: GroundingTargets, frame_mask: torch.Tensor | None) -> torch.Tensor:
    """Frames that are known to be inside the event or outside, bool `[B, T]`."""
    timed = targets.has_interval[:, None].expand_as(targets.inside)
    return timed if frame_mask is None else timed & frame_mask


def _contrasted(targets: GroundingTargets, frame_mask: torch.Tensor | None) -> torch.Tensor:
    """Frames inside the event of clips that also have frames outside it, bool `[B, T]`."""
    inside = _timed(targets, frame_mask) & targets.inside
    everywhere = inside if frame_mask is None else inside | ~frame_mask
    return inside & ~everywhere.all(-1, keepdim=True)


def _in_box(targets: GroundingTargets, centres: torch.Tensor) -> torch.Tensor:
    """Tokens whose centre is in the box of their frame, bool `[B, S, N]`; all False for a frame without a box."""
    box = cxcywh_to_xyxy(targets.boxes)[:, :, None]  # [B, S, 1, 4]
    inside = ((centres >= box[..., :2]) & (centres < box[..., 2:])).all(-1)
    return inside & targets.has_box[..., None]


def _token_sums(
    scores: torch.Tensor, centres: torch.Tensor, targets: GroundingTargets
) -> list[tuple[torch.Tensor, str]]:
    """Binary cross-entropy of the pruning scores against "is the token's centre inside the box?".

    Tokens inside and outside weigh the same as a whole.

    Args:
        scores: `[B, S, N]`.
        centres: `[N, 2]`, (x, y) in [0, 1].
    """
    inside = _in_box(targets, centres)
    outside = targets.has_box[..., None] & ~inside
    scores = torch.where(targets.has_box[..., None], scores.float(), 0.0)
    loss = F.binary_cross_entropy_with_logits(scores, inside.float(), reduction="none") / 2
    return [((loss * inside).sum(), "tokens_inside"), ((loss * outside).sum(), "tokens_outside")]


def _tube_sums(
    boxes: torch.Tensor, presence: torch.Tensor, targets: GroundingTargets, weights: LossWeights, *, match_one: bool
) -> Sums:
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
    layer = layer / layer.sum()
    tubes = 1 if match_one else hypotheses
    return {
        "box": [((l1 * box_weight * layer).sum() / tubes, "boxes")],
        "giou": [((giou * box_weight * layer).sum() / tubes, "boxes")],
        "presence": [((bce * presence_weight * layer).sum() / hypotheses, "judged_frames")],
    }


def select_hypotheses(cost: torch.Tensor) -> torch.Tensor:
    """The matcher: one hypothesis a clip, that of least cost summed over decoder layers and frames.

    A tube is one hypothesis over all frames, so the assignment is made per clip and not per frame; with one target a
    clip the Hungarian assignment is an argmin.

    Args:
        cost: `[L, B, S, M]`.

    Returns:
        fp32 `[B, M]`, one-hot.
    """
    total = cost.sum(dim=(0, 2))
    return F.one_hot(total.argmin(-1), total.shape[-1]).float()
