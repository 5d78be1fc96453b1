"""The Trainer's arguments for a run: schedule, ranks and precision as the configuration says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..distributed import rank_and_size
from ..errors import ConfigError
from ..json_text import parse_json
from .config import TrainingConfig


def check_scale(config: TrainingConfig, world_size: int) -> int:
    """The number of clips in a batch of one rank.

    Raises:
        ConfigError: a number does not fit the number of ranks, or the strategy does not fit another field.
    """
    scale, batch = config.scale, config.data.batch_size
    share, rest = divmod(batch, world_size * scale.accumulate)
    if share < 1 or rest:
        raise ConfigError(
            f"data.batch_size must be a multiple of processes x scale.accumulate ({world_size} x {scale.accumulate}), "
            f"got {batch}."
        )
    if world_size % scale.replicas:
        raise ConfigError(f"scale.replicas must divide the number of processes ({world_size}), got {scale.replicas}.")
    if scale.strategy == "fsdp2" and world_size == 1:
        raise ConfigError("scale.strategy=fsdp2 shards over several processes, and there is 1: start it with torchrun.")
    if scale.strategy == "deepspeed" and scale.precision != "float32":
        raise ConfigError(
            "scale.strategy=deepspeed needs scale.precision=float32, for it would convert the spatial half to bfloat16 "
            "too: use fsdp2, or a frozen backbone in bfloat16 (backbone.dtype)."
        )
    if scale.deepspeed is not None and scale.strategy != "deepspeed":
        raise ConfigError(f"scale.deepspeed is for scale.strategy=deepspeed only, got strategy {scale.strategy!r}.")
    return share


def training_arguments(config: TrainingConfig, folder: Path, *, tensorboard: bool) -> TrainingArguments:
    """Make the arguments of the Trainer; under `torchrun` this joins the group of ranks.

    Raises:
        ConfigError: see `check_scale`; or DeepSpeed is not installed, or its settings cannot be read.
    """
    _, world_size = rank_and_size()
    data, schedule, scale = config.data, config.schedule, config.scale
    share = check_scale(config, world_size)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "logs")
    on_cpu = scale.device == "cpu" or not torch.cuda.is_available()
    options: dict[str, Any] = {}
    accelerator: dict[str, Any] = {"even_batches": False, "split_batches": False, "dispatch_batches": False}
    if world_size > 1 and on_cpu:
        options["ddp_backend"] = "gloo"
    if scale.strategy == "fsdp2":
        from accelerate.parallelism_config import ParallelismConfig

        # Without it every rank would keep the whole model's gradients from one accumulated batch to the next.
        accelerator["gradient_accumulation_kwargs"] = {"sync_each_batch": True}
        options["fsdp"] = True
        options["fsdp_config"] = {"version": 2, "reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT"}
        options["parallelism_config"] = ParallelismConfig(
            dp_replicate_size=scale.replicas, dp_shard_size=world_size // scale.replicas
        )
    elif scale.strategy == "deepspeed":
        options["deepspeed"] = _deepspeed_settings(scale.deepspeed)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=schedule.steps,
        per_device_train_batch_size=share,
        gradient_accumulation_steps=scale.accumulate,
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
        dataloader_pin_memory=not on_cpu,
        accelerator_config=accelerator,
        remove_unused_columns=False,
        report_to=["tensorboard"] if tensorboard else [],
        disable_tqdm=True,
        seed=config.seed,
        full_determinism=False,
        use_cpu=on_cpu,
        bf16=scale.precision == "bfloat16",
        ddp_find_unused_parameters=True,  # a loss that has no label in a step leaves its parameters without gradient
        **options,
    )
    if (
        on_cpu and arguments.device.index is not None
    ):  # one of several CPU ranks has an index, which older torch cannot load to
        arguments.__dict__["_setup_devices"] = torch.device("cpu")
    return arguments


def _deepspeed_settings(path: str | None) -> dict[str, Any]:
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ConfigError("scale.strategy=deepspeed needs the package deepspeed, which is not installed.") from error
    settings: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    if path is not None:
        try:
            settings = parse_json(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"scale.deepspeed: {path} cannot be read as DeepSpeed settings: {error}.") from error
        if not isinstance(settings, dict):
            raise ConfigError(f"scale.deepspeed: {path} must hold a mapping of DeepSpeed settings.")
    settings.setdefault("zero_allow_untested_optimizer", True)  # the optimizer is our own, with two learning rates
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    # These are set in the configuration, which wins over the file.
    given = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return settings | dict.fromkeys(given, "auto")
