"""Grounding many videos: annotated datasets and manifests, with outcomes that survive interruptions."""

from .dataset import find_samples, ground_dataset, ground_samples, predict_samples
from .manifest import ManifestRecord, ManifestSummary, ground_manifest, read_manifest
from .outcome import Outcome

__all__ = [
    "ManifestRecord",
    "ManifestSummary",
    "Outcome",
    "find_samples",
    "ground_dataset",
    "ground_manifest",
    "ground_samples",
    "predict_samples",
    "read_manifest",
]
