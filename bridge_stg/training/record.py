"""The record of a run: its folder says which configuration made it, so that no other run continues it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ModelError, OutputError
from ..files import atomic_files, write_text
from ..json_text import dump_json, parse_json
from ..models import BridgeSTGProcessor
from .checkpoints import latest_checkpoint
from .config import TrainingConfig

RECORD = "run.json"
MAY_CHANGE = (
    "schedule.steps",
    "schedule.log_every",
    "schedule.save_every",
    "schedule.keep_checkpoints",
    "data.workers",
    "scale.device",
    "scale.gradient_checkpointing",
)
"""Fields that may differ when a run is continued: they say how far, how often and where, not what is learnt."""

logger = logging.getLogger(__name__)


def facts_of_run(config: TrainingConfig, build: Callable[..., Any]) -> dict[str, Any]:
    """Everything that decides what a run learns, by dotted name: its configuration, and what builds its model."""
    while isinstance(build, partial):
        build = build.func
    fields = {name: value for name, value in _flat(asdict(config)) if name not in MAY_CHANGE}
    return parse_json(dump_json({**fields, "build": f"{build.__module__}.{build.__qualname__}"}))


def check_same_run(folder: Path, made: Mapping[str, Any]) -> None:
    """Check that a folder holds nothing, or a run that was made with the same facts.

    Raises:
        OutputError: it holds a checkpoint or a model of another run.
    """
    if latest_checkpoint(folder) is None and not any(folder.glob("*.safetensors")):
        return
    again = "name another folder, or remove this one to begin again"
    record = _read(folder)
    if record is None:
        raise OutputError(f"{folder} holds a model or a checkpoint, and nothing says what made it; {again}.")
    found = record["made_with"]
    for name in sorted(found.keys() | made.keys()):
        if (old := found.get(name)) != (new := made.get(name)):
            raise OutputError(f"{folder} is made with {name} {dump_json(old)}, not {dump_json(new)}; {again}.")


def save_or_check_processor(
    folder: Path, processor: BridgeSTGProcessor, made: Mapping[str, Any], *, resumed: bool
) -> None:
    """Write the processor and the record of a fresh run; check the files of a resumed one.

    A file that was cut off or removed since is written again from `processor`, if that is the one the run began with.

    Raises:
        ModelError: a file is broken, and `processor` is another one.
        OutputError: `folder` cannot be written.
    """
    record = _read(folder) if resumed else None
    if record is not None:
        expected = record["processor"]
        broken = sorted(name for name, digest in expected.items() if _digest(folder / name) != digest)
        if not broken:
            return
    with atomic_files(folder) as staged:
        processor.save_pretrained(staged)
        digests = {path.name: _digest(path) for path in staged.iterdir()}
        if record is not None:
            if digests != expected:
                raise ModelError(
                    f"{folder / broken[0]} is not as this run wrote it, and its processor cannot be built again: put "
                    "the file back, or begin again in another folder."
                )
            logger.warning("%s was not as this run wrote it, and is written again.", folder / broken[0])
    if record is None:
        write_text(folder / RECORD, dump_json({"made_with": made, "processor": digests}, indent=1) + "\n")


def _read(folder: Path) -> dict[str, Any] | None:
    """The record of a run, or None; one that cannot be read was not written here, as records appear whole."""
    try:
        record = parse_json((folder / RECORD).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    known = isinstance(record, dict) and all(isinstance(record.get(key), dict) for key in ("made_with", "processor"))
    return record if known else None


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
