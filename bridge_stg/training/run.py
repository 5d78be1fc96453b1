"""One training run from a configuration: build, train, save; resumes where the last run stopped."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from transformers import PrinterCallback, TrainerCallback

from ..data.sample_store import SampleStore
from ..distributed import check_rendezvous
from ..errors import ConfigError
from ..files import ensure_writable_folder
from ..models import BridgeSTGProcessor
from .arguments import training_arguments
from .build_model import build_model, checkpoint_activations
from .checkpoints import latest_checkpoint, publish_files, saving
from .config import DataConfig, TrainingConfig, check_config, loss_weights_at, refuse_unused
from .data.annotated import GroundingStream
from .data.batches import LengthAwareBatches
from .data.collate import TrainingBatch, collate_grounding
from .data.item import ItemOptions
from .data.synthetic import Phase, SyntheticCurriculum
from .record import check_same_run, facts_of_run, save_or_check_processor
from .trainer import BridgeSTGTrainer

FRAME_SIZE = (64, 64)
_FINAL = ".model"
logger = logging.getLogger(__name__)


def train(
    config: TrainingConfig,
    output: str | os.PathLike[str],
    *,
    callbacks: Sequence[TrainerCallback] = (),
    max_seconds: float | None = None,
    tensorboard: bool = True,
    build: Callable[[TrainingConfig], tuple[Any, BridgeSTGProcessor]] = build_model,
    collate: Callable[..., TrainingBatch] = collate_grounding,
) -> BridgeSTGTrainer:
    """Train a model, and save it with its processor in `output`; a checkpoint found there is resumed exactly.

    A folder that another configuration made is refused; `record.MAY_CHANGE` lists what may change: steps, saving,
    logging, loader processes, memory. Under `torchrun` every rank calls this.

    Args:
        config: checked here.
        output: folder of checkpoints, logs and the final model.
        callbacks: of `transformers.Trainer`.
        max_seconds: stop cleanly after that long, with a checkpoint to resume from.
        tensorboard: whether to write logs for TensorBoard.
        build, collate: make the model and its batches; a baseline is trained the same way with its own.

    Raises:
        ConfigError: a field, or a combination of fields, cannot be used.
        ModelError: the backbone or `start_from` cannot be loaded.
        OutputError: `output` cannot be written, or holds another run.
    """
    config = check_config(config)
    refuse_unused(config)
    check_rendezvous()
    folder = ensure_writable_folder(output)
    made = facts_of_run(config, build)
    check_same_run(folder, made)
    resumed = latest_checkpoint(folder)
    arguments = training_arguments(config, folder, tensorboard=tensorboard)
    model, processor = build(config)
    if config.scale.gradient_checkpointing:
        checkpoint_activations(model)
    with arguments.main_process_first(local=False, desc="the processor"):
        if arguments.should_save:
            save_or_check_processor(folder, processor, made, resumed=resumed is not None)
        if resumed is not None:  # the run keeps the vocabulary that it began with
            processor = model.processor = BridgeSTGProcessor.from_pretrained(folder, local_files_only=True)
    schedule = config.schedule
    dataset, batches = _data(config, processor, arguments, folder)
    trainer = BridgeSTGTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        batches=batches,
        data_collator=partial(collate, processor=processor),
        loss_weights=partial(loss_weights_at, config),
        match_after=schedule.match_after,
        backbone_learning_rate=schedule.backbone_learning_rate,
        callbacks=[*callbacks, *([StopAfter(max_seconds)] if max_seconds is not None else [])],
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    _save(trainer, folder)
    return trainer


def _data(
    config: TrainingConfig, processor: BridgeSTGProcessor, arguments: Any, folder: Path
) -> tuple[Any, LengthAwareBatches | None]:
    """The training set, and the batches of its places; None for batches means to take places in order."""
    data = config.data
    if not data.sources:
        return _curriculum(config), None
    stores = {name: SampleStore(source.path) for name, source in data.sources.items()}
    for name, store in stores.items():
        if store.problems:
            logger.warning(
                "%s: %d of %d records are left out, the first because: %s: %s",
                name,
                len(store.problems),
                len(store.problems) + len(store),
                store.problems[0].id,
                store.problems[0].reason,
            )
    weights = {name: source.weight for name, source in data.sources.items() if source.weight is not None}
    if weights and len(weights) < len(data.sources):
        missing = next(name for name in data.sources if name not in weights)
        raise ConfigError(f"data.sources: {missing} has no weight, and others have one; give one to all or to none.")
    try:
        stream = GroundingStream(
            stores,
            weights or None,
            processor,
            options=_item_options(data),
            seed=config.seed,
            skipped=folder / "skipped.jsonl",
        )
        batches = LengthAwareBatches(
            stream.shape,
            batches=config.schedule.steps * config.scale.accumulate * arguments.world_size,
            clips=arguments.per_device_train_batch_size,
            max_tokens=data.max_tokens,
            world_size=arguments.world_size,
            seed=config.seed,
        )
    except ValueError as error:
        raise ConfigError(f"data: {error}.") from error
    return stream, batches


def _curriculum(config: TrainingConfig) -> SyntheticCurriculum:
    data = config.data
    return SyntheticCurriculum(
        [Phase(phase.steps, phase.mix) for phase in data.phases],
        batch_size=data.batch_size,
        images_per_clip=data.images_per_clip,
        options=_item_options(data),
        frame_size=FRAME_SIZE,
        seed=config.seed,
        length=config.schedule.steps * data.batch_size,
    )


def _item_options(data: DataConfig) -> ItemOptions:
    negatives = cast(Literal["uniform", "boundary"], data.negatives)  # one of both: the configuration is checked
    return ItemOptions(data.spatial_frames, data.positive_ratio, negatives, data.answer_dropout)


def _save(trainer: BridgeSTGTrainer, folder: Path) -> None:
    """Save the final model beside its processor; the weights appear last, and whole."""
    weights = trainer.whole_state_dict()
    if trainer.args.should_save:
        staged = ensure_writable_folder(folder / _FINAL)
        network: Any = trainer.accelerator.unwrap_model(trainer.model)
        with saving(f"The model in {folder}"):
            network.save_pretrained(staged, **({} if weights is None else {"state_dict": weights}))
            publish_files(staged, folder)
    trainer.accelerator.wait_for_everyone()


class StopAfter(TrainerCallback):
    """Stops a run after some seconds of training and saves a checkpoint to resume from."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.clock = clock
        self.started: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.started is not None
        over = torch.tensor(self.clock() - self.started >= self.seconds, dtype=torch.int32, device=args.device)
        if dist.is_initialized():  # clocks differ, and all ranks must stop at the same step
            dist.all_reduce(over, dist.ReduceOp.MAX)
        if over:
            control.should_save = True
            control.should_training_stop = True
