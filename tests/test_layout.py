"""The floor plan: what may import what, the size of files and signatures, words that are not used, what tests mirror.

Every exception is listed with its reason, and an exception that is no longer needed fails as well.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bridge_stg.ops

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bridge_stg"

# The rooms that each room, or file at the root, may import from, beside itself and COMMON. The files of COMMON may
# import from those listed before them.
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
LOOSE = {
    "__init__": "the package",
    "__main__": "`python -m bridge_stg`",
    "errors": "imported by every room",
    "files": "imported by every room that writes",
    "distributed": "imported by inference, training and cli",
    "json_text": "imported by every room that reads or writes JSON",
    "settings": "imported by models, training and cli",
    "manifest": "the public name that manifests had first",
}
FROM_TRANSFORMERS = {"models", "training", "cli"}

LONGEST_FILE = 450  # lines
LONG_FILES: dict[str, str] = {}

MOST_PARAMETERS = 8
SCHEMA = "the flat schema of an op of torch.library, or of its backward"
SIGNATURE = "a public signature"
COMMAND = "a command of the command line; typer reads its options from the parameters"
SHAPE = "its parameters are the keys of a shape that `warmup` takes"
MANY_PARAMETERS = {
    "bridge_stg/cli/data.py:convert": COMMAND,
    "bridge_stg/cli/evaluate.py:evaluate": COMMAND,
    "bridge_stg/cli/ground.py:ground": COMMAND,
    "bridge_stg/models/modeling_bridge_stg.py:BridgeSTGModel.forward": SIGNATURE,
    "bridge_stg/models/processing_bridge_stg.py:BridgeSTGProcessor.__init__": SIGNATURE,
    "bridge_stg/models/video_processing_bridge_stg.py:_OnePass._preprocess": "transformers calls it by this signature",
    "bridge_stg/modules/frame_patchifier.py:FramePatchifier.__init__": SIGNATURE,
    "bridge_stg/modules/memory_cross_attention.py:MemoryCrossAttention.__init__": SIGNATURE,
    "bridge_stg/modules/memory_cross_attention.py:MemoryCrossAttention.forward": SIGNATURE,
    "bridge_stg/modules/multi_layer_query_cross_attention.py:MultiLayerQueryCrossAttention.__init__": SIGNATURE,
    "bridge_stg/modules/query_guided_token_pruner.py:QueryGuidedTokenPruner.__init__": SIGNATURE,
    "bridge_stg/ops/attend_memory/api.py:attend_memory": SIGNATURE,
    "bridge_stg/ops/core/warmup.py:_prune_tokens": SHAPE,
    "bridge_stg/ops/core/warmup.py:_prune_tokens_varlen": SHAPE,
    "bridge_stg/ops/core/warmup.py:_attend_memory": SHAPE,
    "bridge_stg/ops/patchify_frames/api.py:patchify_frames": SIGNATURE,
    "bridge_stg/ops/patchify_frames/api.py:patchify_videos": SIGNATURE,
    "bridge_stg/ops/prune_tokens/api.py:prune_tokens": SIGNATURE,
    "bridge_stg/ops/prune_tokens/registration.py:_flops_backward": SCHEMA,
    "bridge_stg/ops/prune_tokens/varlen.py:prune_tokens_varlen": SIGNATURE,
}
UNUSED_WORDS = {
    "tests/data/readers/published.py": "annotation files as the authors of a dataset publish them",
}

# Modules that no other product file imports or names.
ENTRY_POINTS = {"bridge_stg.__main__", "bridge_stg.manifest", "benchmarks.__main__"}
# Folders of tests that mirror another folder than a room of the package.
OTHER_TESTS = {"benchmarks": "benchmarks/", "triton_kernels": "triton_kernels/"}
OPS = {
    "patchify_frames": "patchify_frames",
    "prune_tokens": "prune_tokens",
    "prune_tokens_varlen": "prune_tokens",
    "attend_memory": "attend_memory",
}


def files(*folders, suffixes=(".py",)):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in suffixes]


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


def definitions(node, prefix="") -> Iterator[tuple[str, ast.AST]]:
    """(qualified name, node) of every class and function in a syntax tree."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if named:
            yield prefix + child.name, child
        yield from definitions(child, f"{prefix}{child.name}." if named else prefix)


DEFINED = [
    (f"{path.relative_to(ROOT)}:{name}", node)
    for path in PRODUCT
    for name, node in definitions(ast.parse(path.read_text()))
]
FUNCTIONS = [(name, node) for name, node in DEFINED if not isinstance(node, ast.ClassDef)]


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
            assert room in FROM_TRANSFORMERS, f"{room} imports transformers"


def test_every_allowed_arrow_is_used():
    arrows = {(room, other) for room, others in ALLOWED.items() for other in others}
    for path in SOURCES:
        for name in imports(path):
            root, *rest = name.split(".")
            if root == "bridge_stg":
                arrows.discard((room_of(path), rest[0] if rest else "__init__"))
    assert not arrows - {("ops", "triton_kernels")}  # kernels are imported by name, when a backend is chosen


def test_kernels_import_nothing_of_the_package_and_no_modules():
    for path in files("triton_kernels"):
        assert all(
            not name.startswith("bridge_stg") or name.startswith("bridge_stg.triton_kernels") for name in imports(path)
        )
        assert "torch.nn" not in path.read_text() and "autograd" not in path.read_text()


def at_run_time(path):
    """All that runs, in functions too; not what stands there for type checkers alone."""
    for node in ast.parse(path.read_text()).body:
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from ast.walk(node)


def test_no_circle_of_imports():
    edges = {name: {n for n in imports(path, at_run_time(path)) if n in MODULES} for name, path in MODULES.items()}
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
    long = {str(path.relative_to(ROOT)) for path in sources if len(path.read_text().splitlines()) > LONGEST_FILE}
    assert long == set(LONG_FILES)


def is_kernel(function):
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def parameter_count(function):
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    bound = bool(named) and named[0].arg in ("self", "cls")
    return len(named) - bound + (arguments.vararg is not None) + (arguments.kwarg is not None)


def test_no_function_has_many_parameters():
    many = {name for name, node in FUNCTIONS if parameter_count(node) > MOST_PARAMETERS and not is_kernel(node)}
    assert many == set(MANY_PARAMETERS)


def test_no_self_is_untyped():
    untyped = {
        name
        for name, node in FUNCTIONS
        for argument in node.args.args[:1]
        if argument.arg in ("self", "cls") and argument.annotation and ast.unparse(argument.annotation) == "Any"
    }
    assert not untyped


def words_not_used():
    """(words as they stand in a name, whether only a module may not have it) of the table "Not used"."""
    table = (ROOT / "docs" / "glossary.md").read_text().partition("## Not used")[2]
    for row in re.findall(r"^\| (.+?) \| .+ \|$", table, re.MULTILINE):
        if row not in ("not", "---"):
            for word in re.sub(r"\(.*?\)", "", row).split(","):
                yield word.strip().replace(" ", "_"), "(the module)" in row


def test_words_of_the_glossary_that_are_not_used_name_nothing():
    def spelled(name):  # ScoreGradients and score_gradients are the same words
        return f"_{re.sub(r'(?<=[a-z])(?=[A-Z])', '_', name).lower()}_"

    words = list(words_not_used())
    assert words
    modules = [(str(path.relative_to(ROOT)), spelled(path.stem), True) for path in [*PRODUCT, *files("tests")]]
    names = [*modules, *((name, spelled(name.rpartition(":")[2].rpartition(".")[2]), False) for name, _ in DEFINED)]
    wrong = {
        name
        for name, spelling, is_module in names
        for word, of_modules in words
        if f"_{word}_" in spelling and (is_module or not of_modules)
    }
    assert wrong == set(UNUSED_WORDS)


def test_few_files_stand_loose():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(LOOSE)


def test_no_module_is_for_tests_alone():
    # Packages, and a bench an op, which the harness finds by its name.
    used = {name for name, path in MODULES.items() if path.name == "__init__.py" or path.stem.startswith("bench_")}
    used |= {name for path in PRODUCT for name in imports(path)}
    assert not ENTRY_POINTS & used
    mentions = [*PRODUCT, *files("benchmarks", suffixes=(".sh",)), *files("docs", suffixes=(".md",))]
    text = "".join(path.read_text() for path in mentions)  # kernels are imported by name, studies are commands
    rest = set(MODULES) - used - ENTRY_POINTS
    assert not [name for name in rest if name.removeprefix("bridge_stg.triton_kernels.") not in text]


@pytest.mark.parametrize("op", OPS)
def test_one_op_one_name(op):
    assert (PACKAGE / "ops" / OPS[op]).is_dir()
    assert (ROOT / "tests" / "ops" / OPS[op] / f"test_{op}.py").is_file()
    assert callable(getattr(bridge_stg.ops, op))
    assert hasattr(torch.ops.bridge_stg, op)


def test_tests_mirror_the_rooms():
    rooms = {path.parent.relative_to(PACKAGE) for path in SOURCES}
    tests = {path.parent.relative_to(ROOT / "tests") for path in files("tests") if path.name.startswith("test_")}
    assert not {room for room in rooms if not (ROOT / "tests" / room).is_dir()}
    assert {path.parts[0] for path in tests - rooms} == set(OTHER_TESTS)
    assert all((ROOT / folder).is_dir() for folder in OTHER_TESTS.values())
