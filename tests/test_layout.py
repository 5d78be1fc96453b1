"""The floor plan: which room may import which, no circles, no crowded files, nothing that only tests need."""

import ast
from pathlib import Path

import pytest
import torch

import bridge_stg.ops

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bridge_stg"

# A room, or a file at the root, may import from what is listed for it, from itself, and from the lines above it in
# COMMON where it is one of these, or from all of COMMON.
ALLOWED = {
    "ops": {"triton_kernels"},
    "modules": {"ops"},
    "data": set(),
    "evaluation": {"data"},
    "models": {"modules", "ops", "data"},
    "visualization": {"models", "data", "evaluation"},
    "training": {"models", "modules", "data"},
    "inference": {"models", "data", "evaluation"},
    "cli": {"ops", "data", "evaluation", "models", "visualization", "training", "inference", "__init__"},
    "__init__": {"ops", "modules", "models", "data"},
    "__main__": {"cli"},
    "manifest": {"inference"},
}
COMMON = ("errors", "json_text", "files", "settings", "distributed", "_native")
CROWDED = 450  # lines; a longer file is named below with its reason
LONG_FILES: dict[str, str] = {}
OPS = {"patchify_frames": "patchify_frames", "prune_tokens": "prune_tokens", "prune_tokens_varlen": "prune_tokens"} | {
    "attend_memory": "attend_memory"
}


def files(*rooms, suffixes=(".py",)):
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*")) if path.suffix in suffixes]


SOURCES = files("bridge_stg")
PRODUCT = [*SOURCES, *files("triton_kernels", "benchmarks")]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("bridge_stg", *parts) if parts[0] == "triton_kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PRODUCT}


def imports(path, nodes=None):
    """Absolute names of all that a file imports; with `nodes`, what these statements import."""
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text())) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    room = room_of(path)
    allowed = set(COMMON[: COMMON.index(room)] if room in COMMON else COMMON) | ALLOWED.get(room, set()) | {room}
    for name in imports(path):
        root, *rest = name.split(".")
        if root == "bridge_stg":
            assert (rest[0] if rest else "__init__") in allowed, f"{room} imports {name}"
        if root == "transformers":
            assert room in ("models", "training", "cli"), f"{room} imports transformers"


def test_kernels_import_nothing_of_the_package_and_no_modules():
    for path in files("triton_kernels"):
        assert all(
            not name.startswith("bridge_stg") or name.startswith("bridge_stg.triton_kernels") for name in imports(path)
        )
        assert "torch.nn" not in path.read_text() and "autograd" not in path.read_text()


def top_level(path):
    """The statements that run when a module is imported; not those in functions or for type checkers."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from ast.walk(node)


def test_no_circle_of_imports():
    edges = {name: {n for n in imports(path, top_level(path)) if n in MODULES} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(edges[name] - {name}):
                visit(other, [*path, name])
            done.add(name)

    for name in edges:
        visit(name, [])


def test_no_file_is_crowded():
    sources = [*PRODUCT, *files("csrc", suffixes=(".h", ".cpp", ".cu", ".cuh"))]
    long = {str(path.relative_to(ROOT)) for path in sources if len(path.read_text().splitlines()) > CROWDED}
    assert long == set(LONG_FILES)


def test_few_files_stand_loose():
    loose = {path.stem for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__", "__main__", "manifest", *COMMON} - {"_native"}


def test_no_module_is_for_tests_alone():
    # Entry points, packages, and a bench an op, which the harness finds by its name.
    used = {"bridge_stg.__main__", "bridge_stg.manifest", "benchmarks.__main__"}
    used |= {name for name, path in MODULES.items() if path.name == "__init__.py" or path.stem.startswith("bench_")}
    used |= {name for path in PRODUCT for name in imports(path)}
    mentions = [*PRODUCT, *files("benchmarks", suffixes=(".sh",)), *files("docs", suffixes=(".md",))]
    text = "".join(path.read_text() for path in mentions)  # kernels are imported by name, studies are commands
    assert not [name for name in set(MODULES) - used if name.removeprefix("bridge_stg.triton_kernels.") not in text]


@pytest.mark.parametrize("op", OPS)
def test_one_op_one_name(op):
    assert (PACKAGE / "ops" / OPS[op]).is_dir()
    assert (ROOT / "tests" / "ops" / OPS[op] / f"test_{op}.py").is_file()
    assert callable(getattr(bridge_stg.ops, op))
    assert hasattr(torch.ops.bridge_stg, op)


def test_tests_mirror_the_rooms():
    rooms = {path.parent.relative_to(PACKAGE) for path in SOURCES}
    assert all((ROOT / "tests" / room).is_dir() for room in rooms)
