"""Training configurations: typed YAML with overrides from the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import ConfigError
from ..models.adapters import LORA_TARGETS
from ..models.configuration_bridge_stg import MODEL_RULES
from ..models.losses import LossWeights
from ..models.processor_settings import check_processor_settings
from ..settings import build, check_fields, limit, rules_of, show

_MOST = 10**9  # their product is a length, which has 64 bits
_DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


@dataclass
class PhaseConfig:
    """One phase of the curriculum.

    Attributes:
        steps: batches.
        mix: weight per tier.
        losses: loss weights that differ from the run's in this phase.
    """

    steps: int = field(metadata=limit(least=1, most=_MOST))
    mix: dict[str, float] = field(metadata=limit(filled=True, items={"least": 0}))
    losses: dict[str, float] = field(default_factory=dict, metadata=limit(items={"least": 0}))


@dataclass
class SourceConfig:
    """One annotated dataset.

    Attributes:
        path: JSON Lines as `bridge-stg data convert` writes them.
        weight: share among the sources, in any unit; None everywhere means by size.
    """

    path: str = field(metadata=limit(filled=True))
    weight: float | None = field(default=None, metadata=limit(above=0))


@dataclass
class DataConfig:
    """What a run sees: `sources` where there are any, else the synthetic curriculum of `phases`.

    Attributes:
        sources: annotated datasets by name, mixed by weight, see `GroundingStream`.
        max_tokens: bound of a rank's batch from `sources`, in LLM tokens with padding; None bounds the clips only.
        batch_size: clips of one optimiser step, over all ranks and accumulated batches. From `sources` it is the
            most: batches of long clips hold fewer (`max_tokens`).
        spatial_frames, positive_ratio, negatives, answer_dropout: see `ItemOptions`.
        images_per_clip, phases: of the synthetic curriculum alone.
        workers: loader processes of every rank.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    max_tokens: int | None = field(default=None, metadata=limit(least=1))
    batch_size: int = field(default=16, metadata=limit(least=1, most=_MOST))
    images_per_clip: int = field(default=4, metadata=limit(least=1))
    spatial_frames: int = field(default=12, metadata=limit(least=1))
    positive_ratio: float = field(default=0.5, metadata=limit(least=0, most=1))
    negatives: str = field(default="uniform", metadata=limit(choices=("uniform", "boundary")))
    answer_dropout: float = field(default=0.4, metadata=limit(least=0, most=1))
    phases: list[PhaseConfig] = field(default_factory=list)
    workers: int = field(default=1, metadata=limit(least=0, most=1024))


@dataclass
class ScheduleConfig:
    """AdamW with warmup, a constant stretch and a decay over the last `decay_share` of the steps.

    `backbone_learning_rate` is that of the backbone, LoRA included; None takes `learning_rate` for all.
    """

    steps: int = field(default=1000, metadata=limit(least=1, most=_MOST))
    learning_rate: float = field(default=1e-3, metadata=limit(least=0))
    backbone_learning_rate: float | None = field(default=None, metadata=limit(least=0))
    weight_decay: float = field(default=0.01, metadata=limit(least=0))
    adam_beta1: float = field(default=0.9, metadata=limit(least=0, below=1))
    adam_beta2: float = field(default=0.98, metadata=limit(least=0, below=1))
    max_grad_norm: float = field(default=1.0, metadata=limit(least=0))
    warmup_steps: int = field(default=150, metadata=limit(least=0))
    decay_share: float = field(default=0.3, metadata=limit(least=0, most=1))
    match_after: int | None = field(default=None, metadata=limit(least=0))
    log_every: int = field(default=50, metadata=limit(least=1))
    save_every: int = field(default=500, metadata=limit(least=1))
    keep_checkpoints: int = field(default=2, metadata=limit(least=1))


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

    name: str | None = field(default=None, metadata=limit(filled=True))
    dtype: str = field(default="auto", metadata=limit(choices=_DTYPES))
    attn_implementation: str | None = field(default=None, metadata=limit(filled=True))
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

    rank: int = field(default=0, metadata=limit(least=0))
    alpha: float | None = field(default=None, metadata=limit(above=0))
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS), metadata=limit(filled=True))
    dropout: float = field(default=0.05, metadata=limit(least=0, below=1))


@dataclass
class ScaleConfig:
    """How a run is spread over ranks (`torchrun`), and what it does to save memory.

    Attributes:
        strategy: "ddp" (every rank holds the model), "fsdp2" (weights, gradients and optimiser are sharded) or
            "deepspeed"; a single rank needs none of them, except that deepspeed works for one too.
        replicas: of "fsdp2": groups of ranks that hold a whole model each; 1 shards over all ranks.
        deepspeed: JSON file of DeepSpeed's settings; None takes ZeRO stage 2.
        accumulate: batches a step, one after the other; divides `data.batch_size`.
        precision: "float32", or "bfloat16": the backbone computes in bfloat16 on float32 weights. A frozen backbone
            in bfloat16 (`backbone.dtype`) needs no more than "float32": the rest is float32 in any case.
        gradient_checkpointing: compute activations of the backbone again in the backward pass.
        device: "auto", or "cpu" also where there is a GPU.
    """

    strategy: str = field(default="ddp", metadata=limit(choices=("ddp", "fsdp2", "deepspeed")))
    replicas: int = field(default=1, metadata=limit(least=1))
    deepspeed: str | None = field(default=None, metadata=limit(filled=True))
    accumulate: int = field(default=1, metadata=limit(least=1))
    precision: str = field(default="float32", metadata=limit(choices=("float32", "bfloat16")))
    gradient_checkpointing: bool = False
    device: str = field(default="auto", metadata=limit(choices=("auto", "cpu")))


@dataclass
class TrainingConfig:
    """A training run.

    Attributes:
        seed: of the initial weights, the data and the order.
        start_from: folder of a saved model whose weights are taken wherever name and shape agree; "tiny" is the
            shipped checkpoint.
        backbone, lora: see their classes.
        model: fields of `BridgeSTGConfig` that differ from the default (the tiny one without a backbone).
        processor: fields of `BridgeSTGProcessor` that differ from the default (the checkpoint's with a backbone).
        data, schedule, losses, scale: see their classes.
    """

    seed: int = field(default=0, metadata=limit(least=0, most=2**32 - 1))
    start_from: str | None = field(default=None, metadata=limit(filled=True))
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    model: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    losses: LossWeights = field(default_factory=LossWeights)
    scale: ScaleConfig = field(default_factory=ScaleConfig)


def check_config(config: TrainingConfig, source: str = "the configuration") -> TrainingConfig:
    """Check every value of a configuration, and give each its declared type.

    Args:
        source: where the configuration stands, with which a message begins.

    Raises:
        ConfigError: an unknown field of the model, of the processor or of a phase's losses, or a value that is not of
            its type or out of range; the sentence names it.
    """
    return _read(asdict(config), source)


def _read(values: Any, source: str) -> TrainingConfig:
    config = build(TrainingConfig, values, source)
    losses = rules_of(LossWeights)
    for i, phase in enumerate(config.data.phases):
        check_fields(phase.losses, losses, source, prefix=f"data.phases[{i}].losses.")
    return replace(
        config,
        model=check_fields(config.model, MODEL_RULES, source, prefix="model."),
        processor=check_processor_settings(config.processor, source, prefix="processor."),
    )


def refuse_unused(config: TrainingConfig) -> None:
    """Refuse fields that the run would ignore.

    Raises:
        ConfigError: a field that only a pretrained backbone or annotated data uses is set without one.
    """
    fresh = BackboneConfig()
    for name in ("dtype", "attn_implementation"):
        value = getattr(config.backbone, name)
        if config.backbone.name is None and value != getattr(fresh, name):
            raise ConfigError(
                f"backbone.{name} is for a pretrained backbone, and backbone.name is null; got {value!r}."
            )
    if not config.data.sources and config.data.max_tokens is not None:
        most = config.data.max_tokens
        raise ConfigError(f"data.max_tokens bounds batches of data.sources, and there are none; got {most}.")


def loss_weights_at(config: TrainingConfig, step: int) -> LossWeights:
    """The loss weights of the phase that `step` lies in; the last phase goes on."""
    for phase in config.data.phases:
        if step < phase.steps or phase is config.data.phases[-1]:
            return replace(config.losses, **phase.losses)
        step -= phase.steps
    return config.losses


def load_config(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a YAML file, or the shipped configuration of that name, and apply `key=value` overrides.

    Raises:
        ConfigError: no such file, unreadable YAML, an override that is none, or see `check_config`.
    """
    path = Path(source)
    if not path.is_file():
        names = {shipped.name[:-5]: shipped for shipped in shipped_configs()}
        if str(source) not in names:
            raise ConfigError(f"{source} is neither a file nor a shipped configuration ({', '.join(names)}).")
        path = names[str(source)]
    for pair in overrides:
        if not pair.partition("=")[0].strip() or "=" not in pair:
            raise ConfigError(f"--set takes key=value, such as schedule.steps=500, got {show(pair)}.")
    try:
        file = OmegaConf.load(path)
        if not OmegaConf.is_dict(file):
            raise ConfigError(f"{path.name} must be a mapping of fields, got {show(OmegaConf.to_container(file))}.")
        merged = OmegaConf.merge(file, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, ValueError, OSError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path.name}: {_one_line(error)}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path.name}: its brackets are nested too deeply.") from error
    except Exception as error:  # yaml's and the grammar's errors share no base with the others
        if type(error).__module__.partition(".")[0] in ("yaml", "antlr4"):
            raise ConfigError(f"{path.name} is not valid YAML: {_one_line(error)}.") from error
        raise
    return _read(values, path.name if not overrides else f"{path.name} with --set")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def shipped_configs() -> list[Path]:
    """The YAML files that come with the package."""
    folder = resources.files("bridge_stg.training") / "configs"
    return sorted(Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".yaml"))
