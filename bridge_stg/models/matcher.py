"""Tube matching: which of the M hypotheses a clip's target belongs to."""

from __future__ import annotations

import torch


def select_hypotheses(cost: torch.Tensor) -> torch.Tensor:
    """One hypothesis per clip: that of least cost, summed over decoder layers and frames.

    A tube is one hypothesis over all frames, so the assignment is made per clip and not per frame; with one target a
    clip the Hungarian assignment is an argmin.

    Args:
        cost: `[L, B, S, M]`.

    Returns:
        fp32 `[B, M]`, one-hot.
    """
    total = cost.sum(dim=(0, 2))
    return torch.nn.functional.one_hot(total.argmin(-1), total.shape[-1]).float()
