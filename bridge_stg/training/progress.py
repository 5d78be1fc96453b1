"""A live progress bar for training that shows the loss."""

from __future__ import annotations

from typing import Any

from rich.progress import Progress
from transformers import TrainerCallback


class TrainingProgress(TrainerCallback):
    """Feeds a rich progress bar and keeps the (step, loss) curve.

    Attributes:
        curve: (step, loss) of every log entry so far.
    """

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.curve: list[tuple[int, float]] = []
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            loss = float(logs["loss"])
            self.curve.append((state.global_step, loss))
            self.bar.update(self._task, description=f"training, loss {loss:.3f}")
