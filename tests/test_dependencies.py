"""Each extra declares what its code imports and nothing else, and a command that lacks an extra says so."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from bridge_stg.__main__ import _EXTRAS

from .check_extra import CORE, TRAIN

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Imported by a package that is named in turn: the video processors of transformers, its Trainer's logs.
THROUGH_TRANSFORMERS = {"torchvision", "tensorboard"}


def canonical(name):
    return re.split(r"[ ;<>=\[]", name)[0].lower().replace("_", "-")


def declared(extra):
    """Names of what `extra` installs itself, the extras below it left out."""
    listed = PROJECT["dependencies"] if extra == "core" else PROJECT["optional-dependencies"][extra]
    return {canonical(name) for name in listed} - {"bridge-stg"}


def level_of(path):
    """The extra that promises a file: core, app or train."""
    if path.is_relative_to(ROOT / "triton_kernels"):
        return "core"
    room = path.relative_to(ROOT / "bridge_stg").parts[0].removesuffix(".py")
    return "train" if room in TRAIN else "core" if room in CORE else "app"


def imports():
    """(extra, whether at the head of the file, distribution) of every import of another project."""
    distributions = packages_distributions()
    for path in sorted([*(ROOT / "bridge_stg").rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")]):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"bridge_stg"}:
                found = distributions.get(top, [top])
                yield level_of(path), node in tree.body, canonical(found[0]), path


IMPORTS = sorted(set(imports()), key=str)


def test_an_import_is_declared_at_its_level():
    """An import at the head by the extra of the file or one below it; one within a function by any."""
    below = {"core": declared("core")}
    below["app"] = below["core"] | declared("app")
    below["train"] = below["app"] | declared("train")
    extras = [extra for extra in PROJECT["optional-dependencies"] if extra != "dev"]
    anywhere = below["train"].union(*(declared(extra) for extra in extras))
    for level, at_head, package, path in IMPORTS:
        assert package in (below[level] if at_head else anywhere), f"{path} imports {package}, which {level} lacks"


@pytest.mark.parametrize("extra", ["core", "app", "train"])
def test_what_is_declared_is_imported(extra):
    assert declared(extra) - {package for _, _, package, _ in IMPORTS} <= THROUGH_TRANSFORMERS


def test_a_lacking_command_knows_every_module_of_the_extras():
    modules = packages_distributions()
    for extra in ("app", "train"):
        assert {canonical(modules[name][0]) for name in _EXTRAS[extra]} == declared(extra)


@pytest.mark.parametrize(
    ("lacking", "command", "extra"), [("typer", ["doctor"], "app"), ("omegaconf", ["train", "tiny"], "train")]
)
def test_a_command_that_lacks_an_extra_says_so(lacking, command, extra, tmp_path):
    arguments = json.dumps(["bridge-stg", *command])
    code = f"""import sys
sys.modules[{lacking!r}] = None
sys.argv = {arguments}
from bridge_stg.__main__ import main
main()"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"needs {lacking}, which is not installed" in done.stderr
    assert f"pip install 'bridge-stg[{extra}]'" in done.stderr


def test_the_oldest_releases_are_those_declared():
    """`make test-oldest` runs on the lower bounds, and on all of them."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if line[0] != "#"
    )
    bounds = list(PROJECT["dependencies"])
    for extra in ("app", "train"):
        bounds += [name for name in PROJECT["optional-dependencies"][extra] if ">=" in name]
    for bound in bounds:
        name, version = bound.partition(";")[0].split(">=")
        pin = pins.pop(name)
        assert pin.removesuffix(".0").removesuffix(".*").startswith(version.strip()), f"{bound} is tested as {pin}"
    assert not pins
