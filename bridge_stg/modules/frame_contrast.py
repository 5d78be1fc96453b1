"""Frame contrast of ETA: frames inside the event are pulled to the aggregated query, others are pushed away."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.core.checks import BOOLEAN, FLOATING, Expect, check_integer, check_number, check_tensors


class FrameContrast(nn.Module):
    """Cosine similarity of each frame to the aggregated query, and the multi-positive InfoNCE loss on it.

    Secondary sources report a contrastive loss for Bridge-STG; its form is our choice. It averages log-probabilities
    over positives (Khosla et al. 2020, "Supervised Contrastive Learning", L_out).

    Args:
        frame_dim: width of the pooled frame tokens.
        query_dim: C, width of the aggregated query.
        temperature: tau, which divides the cosine.

    Raises:
        TypeError, ValueError: a width is not an int of at least 1, or `temperature` is not positive and finite.
    """

    def __init__(self, frame_dim: int, query_dim: int, temperature: float = 0.1) -> None:
        super().__init__()
        check_integer("FrameContrast", "frame_dim", frame_dim, 1)
        check_integer("FrameContrast", "query_dim", query_dim, 1)
        if not 0 < check_number("FrameContrast", "temperature", temperature) < math.inf:
            raise ValueError(f"FrameContrast: temperature must be positive and finite, got {temperature}.")
        self.frame_dim = frame_dim
        self.query_dim = query_dim
        self.temperature = float(temperature)
        self.project_frame = nn.Linear(frame_dim, query_dim)
        self.project_query = nn.Linear(query_dim, query_dim)

    def forward(self, queries: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """Compute similarity logits.

        Args:
            queries: `[B, M, C]`, the aggregated query; averaged over M.
            frames: `[B, T, F]`, tokens pooled per frame.

        Returns:
            `[B, T]`, cosine / tau.

        Raises:
            TypeError, ValueError: a tensor has the wrong dtype, shape or device.
        """
        check_tensors(
            "FrameContrast",
            Expect("queries", queries, f"B M {self.query_dim}", FLOATING),
            Expect("frames", frames, f"B T {self.frame_dim}", FLOATING),
        )
        query = F.normalize(self.project_query(queries.mean(1)), dim=-1)
        frame = F.normalize(self.project_frame(frames), dim=-1)
        return torch.einsum("bc,btc->bt", query, frame) / self.temperature

    @staticmethod
    def loss_sum(logits: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Sum over clips of the multi-positive InfoNCE loss over their frames.

        Args:
            logits: `[B, T]` from `forward`.
            inside: `[B, T]` bool, frames of the event; a clip without any adds 0.

        Returns:
            A scalar.

        Raises:
            TypeError, ValueError: a tensor has the wrong dtype, shape or device.
        """
        check_tensors(
            "FrameContrast.loss_sum",
            Expect("logits", logits, "B T", FLOATING),
            Expect("inside", inside, "B T", BOOLEAN),
        )
        log_probability = logits.log_softmax(-1)
        return -((log_probability * inside).sum(-1) / inside.sum(-1).clamp(min=1)).sum()
