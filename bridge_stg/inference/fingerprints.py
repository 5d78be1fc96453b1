"""Digests of what outcomes depend on: the model, the samples, the requests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..data import GroundingSample
from ..json_text import dump_json, parse_json
from ..models import shipped_model

_CONFIGURATIONS = ("*config.json", "*adapter.json", "tokenizer.json")
_BLOCK = 4096  # bytes that are read at the beginning and at the end of a tensor


def model_fingerprint(model: str | os.PathLike[str] | None) -> str:
    """Sixteen hex digits of a model folder: its configurations, and the first and last bytes of every tensor.

    None is the shipped tiny checkpoint, as for `load_model`.
    """
    folder, digest = Path(shipped_model() if model is None else model), hashlib.sha256()
    for path in sorted(path for pattern in _CONFIGURATIONS for path in folder.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            digest.update(path.name.encode() + header)
            begin = file.tell()
            tensors = parse_json(header)
            for first, last in sorted(entry["data_offsets"] for name, entry in tensors.items() if name[:2] != "__"):
                for place in (first, max(first, last - _BLOCK)):
                    file.seek(begin + place)
                    digest.update(file.read(min(_BLOCK, last - first)))
    return digest.hexdigest()[:16]


def samples_fingerprint(samples: Iterable[GroundingSample]) -> str:
    """Sixteen hex digits of what predictions depend on in samples: not where the videos lie, and no true boxes."""
    records = (replace(sample, boxes={}).to_record() | {"video": ""} for sample in samples)
    return digest(dump_json(record, sort_keys=True) for record in records)


def digest(texts: Iterable[str]) -> str:
    """Sixteen hex digits of texts in order."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode())
    return found.hexdigest()[:16]
