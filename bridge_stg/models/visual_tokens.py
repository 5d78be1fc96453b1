"""The vision tower's output for a batch of clips, padded over temporal groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence


class VisualTokens(NamedTuple):
    """Vision tower output of a batch of clips whose frames have one size; shorter clips are padded with zeros.

    Attributes:
        patches: `[B, G, N, Dv]`, patch features before the merger, in merge-block order.
        merged: `[B, G, N / merge^2, D]`, what the LLM reads.
        grid: (rows, columns) of patches.
        groups: temporal groups of each clip.
        deepstack: features added to the states of the first LLM layers, each as `merged`; empty in most families.
    """

    patches: torch.Tensor
    merged: torch.Tensor
    grid: tuple[int, int]
    groups: tuple[int, ...]
    deepstack: tuple[torch.Tensor, ...] = ()

    def tokens(self, clip: int) -> list[torch.Tensor]:
        """Merged tokens of one clip, then its deepstack features, each `[groups * N / merge^2, D]` without padding."""
        return [level[clip, : self.groups[clip]].flatten(0, 1) for level in (self.merged, *self.deepstack)]


def frame_mask(groups: Sequence[int], group_size: int, device: torch.device) -> torch.Tensor | None:
    """Mask of the frames, bool `[B, most groups * group_size]`, False behind shorter clips; None if none is shorter."""
    if min(groups) == max(groups):
        return None
    counts = torch.tensor(groups, device=device)[:, None] * group_size
    return torch.arange(max(groups) * group_size, device=device) < counts


def pad_groups(packed: torch.Tensor, groups: Sequence[int]) -> torch.Tensor:
    """Unpack `[sum of groups, ...]` to `[B, most groups, ...]` with zeros behind shorter clips."""
    if min(groups) == max(groups):
        return packed.unflatten(0, (len(groups), groups[0]))
    return pad_sequence(packed.split(list(groups)), batch_first=True)


def patch_centres(rows: int, columns: int, merge: int) -> torch.Tensor:
    """Centre (x, y) in [0, 1] of every patch in the processor's merge-block order, float32 `[rows * columns, 2]`."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    centres = torch.stack([(x.float() + 0.5) / columns, (y.float() + 0.5) / rows], dim=-1)
    blocks = centres.reshape(rows // merge, merge, columns // merge, merge, 2)
    return blocks.permute(0, 2, 1, 3, 4).reshape(-1, 2)
