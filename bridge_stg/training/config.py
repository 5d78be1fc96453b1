"""Training configurations: typed YAML with overrides from the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import ConfigError
from ..models.adapters import LORA_TARGETS
from ..models.losses import LossWeights


@dataclass
class PhaseConfig:
    """One phase of the curriculum.

    Attributes:
        steps: batches.
        mix: weight per tier.
        losses: loss weights that differ from the run's in this phase.
    """

    steps: int
    mix: dict[str, float]
    losses: dict[str, float] = field(default_factory=dict)


@dataclass
class SourceConfig:
    """One annotated dataset.

    Attributes:
        path: JSON Lines as `bridge-stg data convert` writes them.
        weight: share among the sources, in any unit; None everywhere means by size.
    """

    path: str
    weight: float | None = None


@dataclass
class DataConfig:
    """What a run sees: `sources` where there are any, else the synthetic curriculum of `phases`.

    Attributes:
        sources: annotated datasets by name, mixed by weight, see `GroundingStream`.
        max_tokens: bound of a process's batch from `sources`, in LLM tokens with padding; None bounds the clips only.
        batch_size: clips of one optimiser step, over all processes and accumulated batches. From `sources` it is the
            most: batches of long clips hold fewer (`max_tokens`).
        spatial_frames, positive_ratio, negatives, answer_dropout: see `SyntheticCurriculum`.
        images_per_clip, phases: of the synthetic curriculum alone.
        workers: loader processes of every training process.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    max_tokens: int | None = None
    batch_size: int = 16
    images_per_clip: int = 4
    spatial_frames: int = 12
    positive_ratio: float = 0.5
    negatives: str = "uniform"
    answer_dropout: float = 0.4
    phases: list[PhaseConfig] = field(default_factory=list)
    workers: int = 1


@dataclass
class ScheduleConfig:
    """AdamW with warmup, a constant stretch and a decay over the last `decay_share` of the steps.

    `backbone_learning_rate` is that of the backbone, LoRA included; None takes `learning_rate` for all.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    backbone_learning_rate: float | None = None
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    max_grad_norm: float = 1.0
    warmup_steps: int = 150
    decay_share: float = 0.3
    match_after: int | None = None
    log_every: int = 50
    save_every: int = 500
    keep_checkpoints: int = 2


@dataclass
class BackboneConfig:
    """The pretrained video MLLM under the model.

    Attributes:
        name: folder, or name on the Hugging Face Hub; None trains the tiny model from nothing.
        dtype: of its weights, such as bfloat16; "auto" takes that of the checkpoint.
        attn_implementation: flash_attention_2, sdpa or eager; None takes transformers' choice.
        freeze: train the spatial half and the bridging tokens only.
        liger: use the kernels of liger-kernel in its LLM.
    """

    name: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    freeze: bool = False
    liger: bool = False


@dataclass
class LoraSettings:
    """Low-rank adapters on the LLM; they freeze the rest of the backbone.

    Attributes:
        rank: 0 adds none.
        alpha: None takes 2 x rank.
        targets: names of linear layers.
        dropout: on the adapters' input.
    """

    rank: int = 0
    alpha: float | None = None
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    dropout: float = 0.05


@dataclass
class ScaleConfig:
    """How a run is spread over processes (`torchrun`) and what it does to save memory.

    Attributes:
        strategy: "ddp" (every process holds the model), "fsdp2" (weights, gradients and optimiser are sharded) or
            "deepspeed"; a single process needs none of them, except that deepspeed works for one too.
        replicas: of "fsdp2": groups of processes that hold a whole model each; 1 shards over all processes.
        deepspeed: JSON file of DeepSpeed's settings; None takes ZeRO stage 2.
        accumulate: batches a step, one after the other; divides `data.batch_size`.
        precision: "float32", or "bfloat16": the backbone computes in bfloat16 on float32 weights. A frozen backbone
            in bfloat16 (`backbone.dtype`) needs no more than "float32": the rest is float32 in any case.
        gradient_checkpointing: compute activations of the backbone again in the backward pass.
        device: "auto", or "cpu" also where there is a GPU.
    """

    strategy: str = "ddp"
    replicas: int = 1
    deepspeed: str | None = None
    accumulate: int = 1
    precision: str = "float32"
    gradient_checkpointing: bool = False
    device: str = "auto"


@dataclass
class TrainingConfig:
    """A training run.

    Attributes:
        seed: of the initial weights, the data and the order.
        start_from: folder of a saved model whose weights are taken wherever name and shape agree.
        backbone, lora: see their classes.
        model: fields of `BridgeSTGConfig` that differ from the default (the tiny one without a backbone).
        processor: fields of `BridgeSTGProcessor` that differ from the default (the checkpoint's with a backbone).
        data, schedule, losses, scale: see their classes.
    """

    seed: int = 0
    start_from: str | None = None
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    model: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    losses: LossWeights = field(default_factory=LossWeights)
    scale: ScaleConfig = field(default_factory=ScaleConfig)


def loss_weights_at(config: TrainingConfig, step: int) -> LossWeights:
    """The loss weights of the phase that `step` lies in; the last phase goes on.

    Raises:
        ConfigError: a phase weighs a loss that does not exist.
    """
    for phase in config.data.phases:
        if step < phase.steps or phase is config.data.phases[-1]:
            known = [field.name for field in fields(LossWeights)]
            if unknown := sorted(phase.losses.keys() - set(known)):
                raise ConfigError(f"{unknown[0]!r} is no loss weight; there are {', '.join(known)}.")
            return replace(config.losses, **phase.losses)
        step -= phase.steps
    return config.losses


def load_config(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a YAML file, or the shipped configuration of that name, and apply `key=value` overrides.

    Raises:
        ConfigError: no such file, unreadable YAML, an unknown key, or a value of the wrong type.
    """
    path = Path(source)
    if not path.is_file():
        shipped = resources.files("bridge_stg.training") / "configs" / f"{source}.yaml"
        if not shipped.is_file():
            names = sorted(p.name[:-5] for p in shipped_configs())
            raise ConfigError(f"{source} is neither a file nor a shipped configuration ({', '.join(names)}).")
        path = Path(str(shipped))
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(TrainingConfig), OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))
        )
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(f"{path.name}: {' '.join(str(error).split())}") from error
    except Exception as error:  # yaml's own errors share no base with the others
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}.") from error
        raise
    assert isinstance(config, TrainingConfig)
    return config


def shipped_configs() -> list[Path]:
    """The YAML files that come with the package."""
    folder = resources.files("bridge_stg.training") / "configs"
    return sorted(Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".yaml"))
