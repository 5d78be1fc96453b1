"""`bridge-stg doctor`: what this installation consists of, and which backends it can use."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from rich.table import Table

from .console import Json, echo_json, show_table

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "av",
    "opencv-python-headless",
    "accelerate",
    "peft",
    "flash-attn",
    "xformers",
)


def doctor(as_json: Json = False) -> None:
    """Versions, backends and why one is not usable, GPU, codecs."""
    facts = diagnose()
    if as_json:
        echo_json(facts)
    else:
        show_table(_table(facts))


def diagnose() -> dict[str, Any]:
    """Facts about this installation, ready for JSON: versions, device, compiled part, backends per op, codecs."""
    from .. import __version__
    from ..ops import backends
    from ..ops.core.native import build_info

    versions: dict[str, str | None] = {"bridge-stg": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "device": _device(),
        "build": build_info(),
        "backends": [
            {"op": status.op, "name": status.name, "usable": reason is None, "reason": reason}
            for status in backends()
            for reason in [status.reason or _missing_device(status.devices)]
        ],
        "codecs": _codecs(),
    }


def _table(facts: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, version in facts["versions"].items():
        table.add_row(name, version or "not installed")
    table.add_row("GPU", facts["device"])
    build = facts["build"]
    table.add_row(
        "compiled part",
        ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in build.items() if value not in ("", False))
        if build
        else "none: installed as pure Python",
    )
    for status in facts["backends"]:
        state = "usable" if status["usable"] else f"not usable: {status['reason']}"
        table.add_row(f"{status['op']} {status['name']}", state)
    for codec, state in facts["codecs"].items():
        table.add_row(f"codec {codec}", state)
    return table


def _missing_device(devices: tuple[str, ...]) -> str | None:
    """Why a backend that could run in this installation has nothing to run on, or None."""
    import torch

    if devices == ("cuda",) and not torch.cuda.is_available():
        return "no CUDA device or driver found"
    return None


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none: " + ("torch is a CPU build" if torch.version.cuda is None else "no CUDA device or driver found")
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _codecs() -> dict[str, str]:
    try:
        import av
    except ImportError as error:
        return {"PyAV": f"not usable: {error}"}
    states = {}
    for name, mode in (("h264", "r"), ("hevc", "r"), ("vp9", "r"), ("av1", "r"), ("libx264", "w")):
        try:
            av.Codec(name, mode)
            states[f"{name} ({'decode' if mode == 'r' else 'encode'})"] = "usable"
        except ValueError:
            states[f"{name} ({'decode' if mode == 'r' else 'encode'})"] = "missing from PyAV's FFmpeg"
    return states
