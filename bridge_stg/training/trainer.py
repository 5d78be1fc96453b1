"""`BridgeSTGTrainer`: the Hugging Face Trainer with the losses of Bridge-STG and a curriculum read in order."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer

from .losses import GroundingTargets, LossWeights, grounding_losses


class BridgeSTGTrainer(Trainer):
    """Adds to `transformers.Trainer`: the weighted losses, each logged by name, and tube matching after a warmup.

    The training set is read in order (a curriculum decides what comes when), so that a resumed run sees exactly the
    items that an uninterrupted one would have seen.

    Args:
        loss_weights: weight of every term at a step; 0 switches a term off.
        match_after: step from which only the tube hypothesis of least cost is supervised; before it all are.
        args, kwargs: of `transformers.Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        loss_weights: Callable[[int], LossWeights] = lambda step: LossWeights(),
        match_after: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.loss_weights = loss_weights
        self.match_after = match_after
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        assert isinstance(dataset, Sized)
        return SequentialSampler(dataset)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load through `from_pretrained`: saved names differ from the module's, and a plain load would miss them."""
        network = self.accelerator.unwrap_model(self.model if model is None else model)
        saved = type(network).from_pretrained(resume_from_checkpoint, config=network.config)
        network.load_state_dict(saved.state_dict())

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        inputs = dict(inputs)
        targets = GroundingTargets(**inputs.pop("targets"))
        output = model(**inputs)
        matched = self.match_after is not None and self.state.global_step >= self.match_after
        weights = self.loss_weights(self.state.global_step)
        losses = grounding_losses(output, targets, weights, match_one=matched)
        total = sum(getattr(weights, name) * value for name, value in losses.items())
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
            self._counts[name] = self._counts.get(name, 0) + 1
        return (total, output) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of every loss term since the last entry."""
        if "loss" in logs:
            logs |= {f"loss_{name}": round(self._sums[name] / self._counts[name], 4) for name in self._sums}
            self._sums, self._counts = {}, {}
        super().log(logs, *args, **kwargs)
