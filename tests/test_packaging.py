"""What is shipped installs and runs: sdist, the wheel built from it, a pure-Python wheel, another torch."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from bridge_stg.ops import backends

ROOT = Path(__file__).parents[1]
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


def backend(hook, source, out, **environment):
    """Call a PEP 517 hook of the project in `source`; the file it made in `out`."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}))"
    return out / run(sys.executable, "-c", code, cwd=source, **environment).stdout.splitlines()[-1]


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
    archive = backend("build_sdist", folder / "tree", folder)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    return backend("build_wheel", sdist, tmp_path_factory.mktemp("wheel"))


def install(wheel, folder):
    """Python of a fresh environment with the wheel; torch and numpy are those of this one, by path."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    home = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").stdout.strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(home)
    import torch

    (home / "torch_of_the_tests.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    return python


def test_the_wheel_of_the_sdist_runs_a_compiled_op(wheel, tmp_path):
    facts = json.loads(run(install(wheel, tmp_path / "env"), "-c", RUN_AN_OP, cwd=tmp_path).stdout)
    assert str(tmp_path) in facts["home"]
    assert facts["grid"] == [[2, 2, 4]] and facts["same"]
    assert facts["reasons"]["patchify_frames native"] is None


def test_a_pure_python_wheel_works_and_says_what_is_missing(sdist, tmp_path):
    source = shutil.copytree(sdist, tmp_path / "source", ignore=shutil.ignore_patterns("build"))
    made = backend("build_wheel", source, tmp_path, BRIDGE_STG_NATIVE=0)
    assert not [name for name in zipfile.ZipFile(made).namelist() if name.endswith(".so")]
    facts = json.loads(run(install(made, tmp_path / "env"), "-c", RUN_AN_OP, cwd=tmp_path).stdout)
    assert facts["same"]
    assert "was not built with this installation" in facts["reasons"]["patchify_frames native"]


def test_compiling_without_torch_says_what_to_do(sdist, tmp_path):
    hide = "import importlib.util as util; util.find_spec = lambda name: None if name == 'torch' else True"
    code = f"{hide}; import sys, runpy; sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=sdist, capture_output=True, text=True)
    assert done.returncode == 1
    assert "--no-build-isolation, or set BRIDGE_STG_NATIVE=0" in done.stderr


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
