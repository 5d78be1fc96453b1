"""Training batches: collated training items, and the labels that they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...models.losses import GroundingTargets
from ...models.processing_bridge_stg import BridgeSTGProcessor
from .item import TrainingItem


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """The model's inputs for several items, and their labels.

    The loader pins and accelerate moves whatever has `pin_memory` and `to`; the Trainer asks for the inputs as if the
    batch was a dictionary of them.

    Attributes:
        inputs: keyword arguments of the model's forward pass, without `targets`.
        targets: labels of the clips.
    """

    inputs: dict[str, torch.Tensor]
    targets: GroundingTargets

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TrainingBatch:
        """The batch on a device."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TrainingBatch:
        """The batch in page-locked memory, from which a GPU copies without waiting."""
        return self._with_each(torch.Tensor.pin_memory)

    def _with_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TrainingBatch:
        targets = GroundingTargets(**{name: change(tensor) for name, tensor in vars(self.targets).items()})
        return TrainingBatch({name: change(tensor) for name, tensor in self.inputs.items()}, targets)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.inputs[name]

    def __contains__(self, name: object) -> bool:
        return name in self.inputs

    def __len__(self) -> int:
        return len(self.inputs)


def collate_grounding(groups: Sequence[Sequence[TrainingItem]], processor: BridgeSTGProcessor) -> TrainingBatch:
    """Make a batch for `BridgeSTGTrainer` of the items of several places.

    Args:
        groups: the items at each place; they are flattened.
        processor: makes pixels and tokens of frames and texts.
    """
    items = [item for group in groups for item in group]
    inputs = dict(
        processor(
            [item.frames for item in items],
            [item.times for item in items],
            [item.sentence for item in items],
            [item.answer for item in items],
            training=True,
        )
    )
    hidden = torch.tensor([item.hide_answer for item in items])
    inputs["hidden_answer"] = inputs.pop("answer_tokens") & hidden[:, None]
    inputs["frame_index"] = torch.from_numpy(np.stack([item.frame_index for item in items]))
    return TrainingBatch(inputs, _targets(items, inputs["frame_index"], inputs["frame_times"].shape[1]))


def _targets(items: Sequence[TrainingItem], frame_index: torch.Tensor, frame_count: int) -> GroundingTargets:
    """Labels of items that are padded to `frame_count` frames.

    Args:
        frame_index: `[B, S]`, see `TrainingItem`.
    """
    positions = torch.arange(frame_count)
    intervals = torch.tensor([item.interval or (0, frame_count) for item in items])
    inside = (positions >= intervals[:, :1]) & (positions < intervals[:, 1:])  # [B, T]
    has_interval = torch.tensor([item.interval is not None for item in items])
    real, index = frame_index >= 0, frame_index.clamp(min=0)
    boxes = torch.stack([_padded_boxes(item.boxes, frame_count) for item in items])
    chosen = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    present = inside.gather(1, index) & real
    return GroundingTargets(
        boxes=torch.nan_to_num(chosen),
        has_box=present & ~chosen.isnan().any(-1),
        present=present,
        has_presence=real & has_interval[:, None],
        inside=inside,
        has_interval=has_interval,
    )


def _padded_boxes(boxes: np.ndarray, frame_count: int) -> torch.Tensor:
    """Boxes xyxy `[T, 4]` as cxcywh `[frame_count, 4]`; the last frame repeats."""
    low, high = boxes[:, :2], boxes[:, 2:]
    converted = np.concatenate([(low + high) / 2, high - low], axis=1)
    return torch.from_numpy(converted[np.minimum(np.arange(frame_count), len(boxes) - 1)])
