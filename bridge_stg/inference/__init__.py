"""Grounding many videos: annotated datasets and manifests, with results that survive interruptions."""

from .dataset import find_samples, ground_dataset, ground_samples, predict_samples
from .manifest import ManifestRecord, ManifestSummary, ground_manifest, read_manifest

__all__ = [
    "ManifestRecord",
    "ManifestSummary",
    "find_samples",
    "ground_dataset",
    "ground_manifest",
    "ground_samples",
    "predict_samples",
    "read_manifest",
]
