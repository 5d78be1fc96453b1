"""Imports point one way, and an op has one name in every room."""

import ast
from pathlib import Path

import pytest

import bridge_stg.ops

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bridge_stg"

# A room may import from the rooms listed for it, from itself, and from what is in COMMON.
ALLOWED = {
    "ops": {"triton_kernels"},
    "modules": {"ops"},
    "data": set(),
    "evaluation": {"data"},
    "models": {"modules", "ops", "data"},
    "visualization": {"models", "data", "evaluation"},
    "training": {"models", "modules", "data"},
}
COMMON = {"errors", "failures", "files", "json_text", "processes", "settings", "_native"}
SOURCES = [path for room in ALLOWED for path in sorted((PACKAGE / room).rglob("*.py"))]


def imported(path):
    """(room, top-level package) of everything a file imports, type-checking imports included."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level == depth:
                for name in [node.module] if node.module else [alias.name for alias in node.names]:
                    yield name.split(".")[0], None
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            yield (parts[1] if parts[0] == "bridge_stg" and len(parts) > 1 else None), parts[0]
        elif isinstance(node, ast.Import):
            for name in node.names:
                parts = name.name.split(".")
                yield (parts[1] if parts[0] == "bridge_stg" and len(parts) > 1 else None), parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    room = path.relative_to(PACKAGE).parts[0]
    for other, package in imported(path):
        if other is not None:
            assert other in ALLOWED[room] | COMMON | {room}, f"{room} imports {other}"
        if package == "transformers":
            assert room in ("models", "training"), f"{room} imports transformers"


def test_kernels_import_nothing_of_the_package_and_no_modules():
    for path in (ROOT / "triton_kernels").rglob("*.py"):
        text = path.read_text()
        assert "bridge_stg" not in "".join(line for line in text.splitlines() if "import" in line)
        assert "torch.nn" not in text and "autograd" not in text


@pytest.mark.parametrize("op", ["patchify_frames", "prune_tokens", "prune_tokens_varlen", "attend_memory"])
def test_one_op_one_name(op):
    assert (PACKAGE / "ops" / f"{op}.py").is_file()
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()
    assert callable(getattr(bridge_stg.ops, op))
    import torch

    assert hasattr(torch.ops.bridge_stg, op)


def test_tests_mirror_the_rooms():
    rooms = {path.parent.relative_to(PACKAGE) for path in SOURCES}
    assert all((ROOT / "tests" / room).is_dir() for room in rooms)
