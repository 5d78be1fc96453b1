"""What is shipped installs and runs: sdist, the wheel of an isolated build, a pure-Python wheel, another torch."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from bridge_stg.ops import backends

ROOT = Path(__file__).parents[1]
TORCH = Path(importlib.util.find_spec("torch").origin).parent
FIND_TORCH = "import importlib.util; print(importlib.util.find_spec('torch'))"
RUN_AN_OP = """
import json, sys, torch, bridge_stg
video = torch.randint(0, 256, (3, 3, 40, 60), dtype=torch.uint8)
options = dict(size=(28, 56), mean=[0.5] * 3, std=[0.5] * 3)
pixels, grid = bridge_stg.patchify_frames(video, **options)
plain, _ = bridge_stg.patchify_frames(video, **options, backend="reference")
print(json.dumps({
    "home": bridge_stg.__file__,
    "torch": torch.__version__,
    "grid": grid.tolist(),
    "same": torch.equal(pixels, plain),
    "reasons": {f"{s.op} {s.name}": s.reason for s in bridge_stg.backends()},
}))
"""


def run(*command, cwd=None, **environment):
    environment = {
        **os.environ,
        "BRIDGE_STG_CUDA": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    } | {key: str(value) for key, value in environment.items()}
    done = subprocess.run([str(x) for x in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def backend(hook, source, out, python=sys.executable, **environment):
    """Call a PEP 517 hook of the project in `source`; what it returned."""
    code = f"from setuptools import build_meta; print(repr(build_meta.{hook}({out!r})))"
    return ast.literal_eval(run(python, "-c", code, cwd=source, **environment).stdout.splitlines()[-1])


def isolated(folder, *torch_folders):
    """Python of a fresh environment and the PYTHONPATH of an isolated build in it, which has what a build requires.

    The environment sees `torch_folders`; as with pip, the build does not.
    """
    python = install(None, folder / "env", *torch_folders)
    overlay = folder / "overlay"
    overlay.mkdir()
    for name in ("setuptools", "_distutils_hack", "pybind11"):
        home = Path(importlib.util.find_spec(name).origin).parent
        for path in (home, *home.parent.glob(f"{name}-*.dist-info")):
            (overlay / path.name).symlink_to(path)
    hidden = [str(folder / "env" / "lib"), *map(str, torch_folders)]
    (overlay / "sitecustomize.py").write_text(
        f"import sys\nif sys.prefix == {str(folder / 'env')!r}:\n"
        f"    sys.path[:] = [path for path in sys.path if not path.startswith({tuple(hidden)!r})]\n"
    )
    return {"python": python, "PYTHONPATH": overlay}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source archive of what git would commit now, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            target = folder / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    archive = folder / backend("build_sdist", folder / "tree", str(folder))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built as `pip install .` does beside an installed torch: isolated, with that torch out of sight."""
    folder = tmp_path_factory.mktemp("wheel")
    build = isolated(folder, TORCH.parent)
    hidden = run(build["python"], "-c", FIND_TORCH, PYTHONPATH=build["PYTHONPATH"]).stdout.split()
    assert hidden == ["None"]
    assert backend("get_requires_for_build_wheel", sdist, None, **build) == []
    # What an isolated build leaves in a checkout: paths of an environment that is gone by the next build.
    version = f"cpython-{sys.version_info[0]}{sys.version_info[1]}"
    left = sdist / "build" / f"temp.{sysconfig.get_platform()}-{version}" / "cmake" / "CMakeCache.txt"
    left.parent.mkdir(parents=True)
    left.write_text("CMAKE_MAKE_PROGRAM:FILEPATH=/nowhere/ninja\nCMAKE_GENERATOR:INTERNAL=Ninja\n")
    return folder / backend("build_wheel", sdist, str(folder), **build)


def install(wheel, folder, *libraries):
    """Python of a fresh environment with the wheel and the `libraries`, folders, by path."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    home = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").stdout.strip())
    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(home)
    (home / "libraries_of_the_tests.pth").write_text("".join(f"{library}\n" for library in libraries))
    return python


def test_the_wheel_of_the_sdist_runs_a_compiled_op(wheel, tmp_path):
    facts = json.loads(run(install(wheel, tmp_path / "env", TORCH.parent), "-c", RUN_AN_OP, cwd=tmp_path).stdout)
    assert str(tmp_path) in facts["home"]
    assert facts["grid"] == [[2, 2, 4]] and facts["same"]
    assert facts["reasons"]["patchify_frames native"] is None


def test_a_pure_python_wheel_works_and_says_what_is_missing(sdist, tmp_path):
    source = shutil.copytree(sdist, tmp_path / "source", ignore=shutil.ignore_patterns("build"))
    made = tmp_path / backend("build_wheel", source, str(tmp_path), BRIDGE_STG_NATIVE=0)
    assert not [name for name in zipfile.ZipFile(made).namelist() if name.endswith(".so")]
    facts = json.loads(run(install(made, tmp_path / "env", TORCH.parent), "-c", RUN_AN_OP, cwd=tmp_path).stdout)
    assert facts["same"]
    assert "was not built with this installation" in facts["reasons"]["patchify_frames native"]


def test_where_there_is_no_torch_the_build_asks_for_one(sdist, tmp_path):
    build = isolated(tmp_path)
    assert backend("get_requires_for_build_wheel", sdist, None, **build) == ["torch>=2.11"]
    assert backend("get_requires_for_build_editable", sdist, None, **build) == ["torch>=2.11"]
    assert backend("get_requires_for_build_wheel", sdist, None, **build, BRIDGE_STG_NATIVE=0) == []


def test_a_torch_that_is_too_old_is_none(sdist, tmp_path):
    (tmp_path / "old" / "torch").mkdir(parents=True)
    (tmp_path / "old" / "torch" / "__init__.py").touch()
    (tmp_path / "old" / "torch" / "version.py").write_text("__version__ = '2.10.1+cu128'\ncuda = '12.8'\n")
    build = isolated(tmp_path, tmp_path / "old")
    assert backend("get_requires_for_build_wheel", sdist, None, **build) == ["torch>=2.11"]


def test_compiling_without_torch_says_what_to_do(sdist, tmp_path):
    build = isolated(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(build["PYTHONPATH"])}
    command = [build["python"], "setup.py", "build_ext"]
    done = subprocess.run(command, cwd=sdist, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "--no-build-isolation, or set BRIDGE_STG_NATIVE=0" in done.stderr


def test_a_build_leaves_no_library_of_an_earlier_one(sdist, tmp_path):
    tree = shutil.copytree(sdist, tmp_path / "tree")
    stale = tree / "build" / f"lib.{sysconfig.get_platform()}-cpython-{sys.version_info[0]}{sys.version_info[1]}"
    for name in ("lib/libbridge_stg_cuda.so", "_native.so"):
        (stale / "bridge_stg" / name).parent.mkdir(parents=True, exist_ok=True)
        (stale / "bridge_stg" / name).touch()
        (tree / "bridge_stg" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "bridge_stg" / name).touch()
    made = tmp_path / backend("build_wheel", tree, str(tmp_path), BRIDGE_STG_NATIVE=0)
    assert not [name for name in zipfile.ZipFile(made).namelist() if name.endswith(".so")]


def test_the_library_loads_under_another_torch(wheel, tmp_path):
    """`make test-other-torch` names the interpreter; the library is that of this torch."""
    other = os.environ.get("BRIDGE_STG_OTHER_PYTHON")
    if not other:
        pytest.skip("BRIDGE_STG_OTHER_PYTHON names no Python with another torch")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    facts = json.loads(run(other, "-c", RUN_AN_OP, cwd=tmp_path, PYTHONPATH=tmp_path).stdout)
    import torch

    assert facts["torch"] != torch.__version__
    assert facts["reasons"]["patchify_frames native"] is None and facts["same"]


def test_this_checkout_is_compiled():
    """`make test` compiles; a native backend that is missing here would silently leave its tests out."""
    if os.environ.get("BRIDGE_STG_NATIVE") == "0":
        pytest.skip("BRIDGE_STG_NATIVE=0 asks for pure Python")
    native = {status.op: status.reason for status in backends() if status.name == "native"}
    assert native and set(native.values()) == {None}
