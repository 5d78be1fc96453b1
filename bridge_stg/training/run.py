"""One training run from a configuration: build, train, save; resumes where the last run stopped."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..data.scene import VOCABULARY
from ..errors import ConfigError
from ..files import ensure_writable_folder
from ..models import BridgeSTGForVideoGrounding, BridgeSTGProcessor, load_model
from ..models.tiny import tiny_config, tiny_processor
from .config import TrainingConfig, loss_weights_at
from .curriculum import Phase, SyntheticCurriculum, collate_grounding
from .trainer import BridgeSTGTrainer

FRAME_SIZE = (64, 64)
logger = logging.getLogger(__name__)


def build_model(config: TrainingConfig) -> tuple[BridgeSTGForVideoGrounding, BridgeSTGProcessor]:
    """A fresh model and its processor, tiny or on a backbone.

    `start_from` gives what trains its weights, wherever name and shape agree.

    A switch that changes the architecture can so be trained from the same start as its baseline.

    Raises:
        ConfigError: a field of `model` or `processor` is unknown or out of range.
        ModelError: `start_from` or the backbone cannot be loaded, or not be adapted as asked.
    """
    start = None if config.start_from is None else load_model(config.start_from)
    set_seed(config.seed)
    model, processor = _fresh_tiny(config) if config.backbone.name is None else _fresh_on_backbone(config)
    if config.backbone.liger:
        model.apply_liger()
    if config.backbone.freeze:
        model.freeze_backbone()
    if (lora := config.lora).rank > 0:
        model.add_lora(lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout)
    if start is not None:
        weights = model.state_dict()
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        known = {k: v for k, v in start.state_dict().items() if k in weights and v.shape == weights[k].shape}
        known = {k: v for k, v in known.items() if k not in frozen}
        model.load_state_dict(known, strict=False)
        if fresh := sorted(weights.keys() - known.keys() - frozen):
            logger.warning("%d tensors are not in %s and start fresh: %s", len(fresh), config.start_from, fresh)
    return model, processor


def _fresh_tiny(config: TrainingConfig) -> tuple[BridgeSTGForVideoGrounding, BridgeSTGProcessor]:
    bridge_tokens = config.model.get("bridge_tokens", 4)
    try:
        processor = tiny_processor(VOCABULARY, bridge_tokens=bridge_tokens, **config.processor)
        model = BridgeSTGForVideoGrounding(tiny_config(processor, **config.model))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The model cannot be built: {error}") from error
    model.processor = processor
    return model, processor


def _fresh_on_backbone(config: TrainingConfig) -> tuple[BridgeSTGForVideoGrounding, BridgeSTGProcessor]:
    backbone = config.backbone
    assert backbone.name is not None
    model = BridgeSTGForVideoGrounding.from_backbone(
        backbone.name,
        processor=config.processor,
        dtype=backbone.dtype,
        attn_implementation=backbone.attn_implementation,
        **config.model,
    )
    return model, model.processor


def train(
    config: TrainingConfig,
    output: str | os.PathLike[str],
    *,
    callbacks: Sequence[TrainerCallback] = (),
    max_seconds: float | None = None,
    tensorboard: bool = True,
    build: Callable[[TrainingConfig], tuple[Any, BridgeSTGProcessor]] = build_model,
    collate: Callable[..., dict[str, Any]] = collate_grounding,
) -> BridgeSTGTrainer:
    """Train and save model and processor in `output`; a checkpoint found there is resumed, exactly.

    Args:
        build, collate: the model and its batches; others than the default train a baseline in the same way.
        max_seconds: stop cleanly after that long, with a checkpoint to resume from.

    Raises:
        ConfigError, ModelError, OutputError.
    """
    folder = ensure_writable_folder(output)
    model, processor = build(config)
    if (folder / "processor_config.json").is_file():  # a resumed run keeps the vocabulary that it began with
        processor = model.processor = BridgeSTGProcessor.from_pretrained(folder, local_files_only=True)
    processor.save_pretrained(folder)
    data, schedule = config.data, config.schedule
    for i in range(len(data.phases)):  # a mistake in a late phase must not wait for it
        loss_weights_at(config, sum(phase.steps for phase in data.phases[:i]))
    if data.negatives not in ("uniform", "boundary"):
        raise ConfigError(f"data.negatives must be uniform or boundary, got {data.negatives!r}.")
    dataset = SyntheticCurriculum(
        [Phase(phase.steps, phase.mix) for phase in data.phases],
        batch_size=data.batch_size,
        images_per_clip=data.images_per_clip,
        spatial_frames=data.spatial_frames,
        positive_ratio=data.positive_ratio,
        negatives=cast(Literal["uniform", "boundary"], data.negatives),
        answer_dropout=data.answer_dropout,
        frame_size=FRAME_SIZE,
        seed=config.seed,
        length=schedule.steps * data.batch_size,
    )
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "logs")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=schedule.steps,
        per_device_train_batch_size=data.batch_size,
        learning_rate=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        adam_beta1=schedule.adam_beta1,
        adam_beta2=schedule.adam_beta2,
        max_grad_norm=schedule.max_grad_norm,
        warmup_steps=schedule.warmup_steps,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(schedule.decay_share * schedule.steps), "decay_type": "linear"},
        logging_steps=schedule.log_every,
        save_steps=schedule.save_every,
        save_total_limit=schedule.keep_checkpoints,
        dataloader_num_workers=data.workers,
        dataloader_persistent_workers=data.workers > 0,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["targets"],
        report_to=["tensorboard"] if tensorboard else [],
        disable_tqdm=True,
        seed=config.seed,
        full_determinism=False,
    )
    trainer = BridgeSTGTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=partial(collate, processor=processor),
        loss_weights=partial(loss_weights_at, config),
        match_after=schedule.match_after,
        callbacks=[*callbacks, *([StopAfter(max_seconds)] if max_seconds is not None else [])],
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    model.save_pretrained(folder)
    return trainer


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
        if self.clock() - self.started >= self.seconds:
            control.should_save = True
            control.should_training_stop = True
