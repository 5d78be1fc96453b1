"""Kept for its name: manifests are read and grounded in `bridge_stg.inference`."""

from .inference.manifest import ManifestRecord, ManifestSummary, ground_manifest, read_manifest

__all__ = ["ManifestRecord", "ManifestSummary", "ground_manifest", "read_manifest"]
