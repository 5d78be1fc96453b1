"""Formats and overlaps of boxes, on tensors."""

from __future__ import annotations

import torch


def cxcywh_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    """Convert boxes `[..., 4]` from (centre x, centre y, width, height) to (x1, y1, x2, y2).

    Raises:
        ValueError: the last dimension is not 4.
    """
    _check_boxes(boxes)
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def pairwise_iou_giou(boxes: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU and generalised IoU of matching boxes, broadcasting over leading dimensions.

    Source: Rezatofighi et al. 2019, "Generalized Intersection over Union".

    Args:
        boxes, others: `[..., 4]` cxcywh.

    Returns:
        (iou, giou), each `[...]`; boxes without area have iou 0 and a finite giou.

    Raises:
        ValueError: the last dimension of one of them is not 4.
    """
    a, b = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(others)
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = boxes[..., 2:].clamp(min=0).prod(-1) + others[..., 2:].clamp(min=0).prod(-1) - overlap
    iou = overlap / union.clamp(min=1e-7)
    return iou, iou - (hull - union) / hull.clamp(min=1e-7)


def inverse_sigmoid(x: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """The logit of x, which is first clamped to [eps, 1 - eps]."""
    return x.clamp(eps, 1 - eps).logit()


def _check_boxes(boxes: torch.Tensor) -> None:
    if boxes.dim() == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must have shape [..., 4], got {list(boxes.shape)}.")
