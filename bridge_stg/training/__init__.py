"""Training: runs from YAML configurations, the Trainer subclass, and the data that it sees."""

from ..models.losses import GroundingTargets, LossWeights, grounding_losses
from .build_model import build_model
from .config import TrainingConfig, load_config, shipped_configs
from .data.annotated import GroundingStream
from .data.batches import ClipShape, LengthAwareBatches
from .data.collate import TrainingBatch, collate_grounding
from .data.item import ItemOptions, TrainingItem
from .data.synthetic import Phase, SyntheticCurriculum
from .progress import TrainingProgress
from .run import train
from .trainer import BridgeSTGTrainer

__all__ = [
    "BridgeSTGTrainer",
    "ClipShape",
    "GroundingStream",
    "GroundingTargets",
    "ItemOptions",
    "LengthAwareBatches",
    "LossWeights",
    "Phase",
    "SyntheticCurriculum",
    "TrainingBatch",
    "TrainingConfig",
    "TrainingItem",
    "TrainingProgress",
    "build_model",
    "collate_grounding",
    "grounding_losses",
    "load_config",
    "shipped_configs",
    "train",
]
