"""STSB: turns the LLM's hidden states at the bridging tokens into the queries of the spatial decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..ops.core.checks import FLOATING, Expect, check_integer, check_tensors


class BridgeQueries(NamedTuple):
    """The queries that `SemanticBridge` returns.

    Attributes:
        interactive: `[L, B, M, C]`, queries of each decoder layer.
        aggregated: `[B, M, C]`, their softmax-weighted sum over layers.
    """

    interactive: torch.Tensor
    aggregated: torch.Tensor


class SemanticBridge(nn.Module):
    """Spatio-temporal semantic bridging: RMSNorm, a projection D -> C and an embedding for each layer.

    Source: arXiv 2604.08014 names the parts; the layer embedding and the softmax weights are our choice.

    Args:
        hidden_dim: D, width of the LLM.
        query_dim: C, width of the decoder.
        num_layers: L, LLM layers read.
        multi_layer: False gives every decoder layer the projected states of the last LLM layer.

    Raises:
        TypeError, ValueError: a width or the number of layers is not an int of at least 1.
    """

    def __init__(self, hidden_dim: int, query_dim: int, num_layers: int, *, multi_layer: bool = True) -> None:
        super().__init__()
        for name, size in {"hidden_dim": hidden_dim, "query_dim": query_dim, "num_layers": num_layers}.items():
            check_integer("SemanticBridge", name, size, 1)
        self.hidden_dim = hidden_dim
        self.multi_layer = multi_layer
        self.norms = nn.ModuleList(nn.RMSNorm(hidden_dim) for _ in range(num_layers))
        self.projections = nn.ModuleList(nn.Linear(hidden_dim, query_dim) for _ in range(num_layers))
        self.layer_embedding = nn.Parameter(torch.empty(num_layers, query_dim))
        self.layer_logits = nn.Parameter(torch.empty(num_layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise so that all layers have the same weight."""
        nn.init.zeros_(self.layer_embedding)
        nn.init.zeros_(self.layer_logits)

    def forward(self, hidden_states: Sequence[torch.Tensor]) -> BridgeQueries:
        """Project the states of L layers.

        Args:
            hidden_states: L tensors `[B, M, D]`, first LLM layer first.

        Raises:
            TypeError, ValueError: there are not exactly L tensors, or one has the wrong dtype, shape or device.
        """
        if len(hidden_states) != len(self.projections):
            raise ValueError(f"hidden_states must hold {len(self.projections)} layers, got {len(hidden_states)}.")
        check_tensors(
            "SemanticBridge",
            *(
                Expect(f"hidden_states[{i}]", state, f"B M {self.hidden_dim}", FLOATING)
                for i, state in enumerate(hidden_states)
            ),
        )
        if not self.multi_layer:
            last = self.projections[-1](self.norms[-1](hidden_states[-1]))
            layers = last + self.layer_embedding[:, None, None]
            return BridgeQueries(layers, layers[-1])
        layers = torch.stack(
            [
                project(norm(state)) + embedding
                for state, norm, project, embedding in zip(
                    hidden_states, self.norms, self.projections, self.layer_embedding, strict=True
                )
            ]
        )
        weights = self.layer_logits.softmax(0)
        return BridgeQueries(layers, torch.einsum("l,lbmc->bmc", weights, layers))
