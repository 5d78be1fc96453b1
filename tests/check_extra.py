"""What an extra promises, tried in an environment that has it and no more: `python check_extra.py core|app|train`.

`make test-extras` runs it with the interpreter of a fresh environment. It knows no pytest, which that has not.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import bridge_stg

# Rooms and modules that work without extras, and those that need `train`; the rest needs `app`.
CORE = ("errors", "files", "modules", "ops", "parts", "processes", "triton_kernels", "_native", "benchmarking")
TRAIN = ("training",)


def modules_of(extra: str) -> list[str]:
    """Every module that an installation with `extra` must be able to import."""
    names = [info.name for info in pkgutil.walk_packages(bridge_stg.__path__, "bridge_stg.")]
    rooms = {name: name.split(".")[1] for name in names if not name.endswith("__main__")}
    if extra == "core":
        return [name for name, room in rooms.items() if room in CORE]
    return [name for name, room in rooms.items() if extra == "train" or room not in TRAIN]


def run(*arguments: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    # -P: the installed package, and not the checkout in which this runs.
    command = [sys.executable, "-P", "-m", "bridge_stg", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == expect, f"{arguments}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def core(folder: Path) -> None:
    """Compiled ops and modules; the command line says what it lacks."""
    from bridge_stg.modules import QueryGuidedTokenPruner

    reasons = {status.op: status.reason for status in bridge_stg.backends() if status.name == "native"}
    assert reasons and set(reasons.values()) == {None}, reasons
    video = torch.randint(0, 256, (3, 3, 40, 60), dtype=torch.uint8)
    options = {"size": (28, 56), "mean": [0.5] * 3, "std": [0.5] * 3}
    pixels, _ = bridge_stg.patchify_frames(video, **options, backend="native")
    plain, _ = bridge_stg.patchify_frames(video, **options, backend="reference")
    assert torch.equal(pixels, plain)
    pruner = QueryGuidedTokenPruner(token_dim=64, query_dim=32, keep=0.25)
    pruner(torch.randn(4, 16, 64), torch.randn(1, 8, 32)).tokens.sum().backward()
    assert "pip install 'bridge-stg[app]'" in run("doctor", expect=1).stderr


def app(folder: Path) -> None:
    """A clip is grounded and drawn; training says what it lacks."""
    run("synth", folder / "data", "--split", "test", "--count", "1", "--seed", "1")
    (clip,) = (folder / "data").rglob("*.mp4")
    out = folder / "result"
    answer = json.loads(run("ground", clip, "the red circle that moves left", "--out", out, "--json").stdout)
    assert answer and {path.suffix for path in out.iterdir()} >= {".mp4", ".png", ".json"}, list(out.iterdir())
    assert "pip install 'bridge-stg[train]'" in run("train", "tiny", "--out", folder / "none", expect=1).stderr


def train(folder: Path) -> None:
    """Ten steps of the smallest configuration, whose checkpoint grounds."""
    run("train", "demo", "--out", folder / "run", "--set", "schedule.steps=10")
    bridge_stg.load_model(folder / "run")


if __name__ == "__main__":
    wanted = sys.argv[1]
    assert "site-packages" in bridge_stg.__file__, f"{bridge_stg.__file__} is not an installed package"
    for name in modules_of(wanted):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as scratch:
        {"core": core, "app": app, "train": train}[wanted](Path(scratch))
    print(f"{wanted}: {len(modules_of(wanted))} modules and the main use work")
