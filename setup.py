"""Drives CMake for the compiled part; metadata lives in pyproject.toml, targets in CMakeLists.txt.

What is compiled needs the headers and libraries of a torch, never a torch that can be imported: an isolated build takes
those of the environment it installs into, and asks for a torch of its own only where that environment has none.

Environment: BRIDGE_STG_NATIVE=0 installs pure Python; BRIDGE_STG_CUDA=0 or 1 leaves out or demands the CUDA library;
TORCH_CUDA_ARCH_LIST names its architectures, such as "9.0"; MAX_JOBS the compilers at once. See docs/environment.md.
"""

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 11)
FIND_TORCH = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"


def find_torch():
    """Folder of the torch to compile against: of this environment, else of the one an installer hides; None if none."""
    # pip isolates by PYTHONPATH: the same interpreter without it (-E) sees the environment that is installed into.
    for python in ([sys.executable, "-P"], [sys.executable, "-P", "-E"], uv_python()):
        if python is None:
            continue
        found = subprocess.run([*python, "-c", FIND_TORCH], capture_output=True, text=True, check=True)
        folder = Path(found.stdout.strip() or os.devnull)
        if folder.is_dir() and tuple(map(int, written_in(folder, "__version__").split(".")[:2])) >= OLDEST_TORCH:
            return folder
    return None


def uv_python():
    """Interpreter of the environment that uv installs into, or None.

    uv builds in an environment of its own and names no other to the build: uv is asked for it, as it was called.
    """
    caller = Path(f"/proc/{os.getppid()}")
    if "UV" not in os.environ or not caller.is_dir():
        return None
    words = (caller / "cmdline").read_text().split("\0")
    environment = dict(line.split("=", 1) for line in (caller / "environ").read_text().split("\0") if "=" in line)
    wish = [word.partition("=")[2] for word in words if word.startswith("--python=")]
    wish += [value for word, value in itertools.pairwise(words) if word in ("--python", "-p")]
    find = [os.environ["UV"], "python", "find", *wish, *(["--system"] if "--system" in words else [])]
    found = subprocess.run(find, cwd=caller / "cwd", env=environment, capture_output=True, text=True)
    return [found.stdout.strip(), "-P"] if found.returncode == 0 else None


def written_in(torch, name):
    """A string of torch/version.py, or None: an isolated build cannot import torch."""
    text = (torch / "version.py").read_text()
    found = re.search(rf"^{name}\b[^=\n]*= *['\"]([^'\"]+)", text, re.MULTILINE)
    return found and found[1]


def why_not_native():
    """Why nothing can be compiled here, or None."""
    if os.environ.get("BRIDGE_STG_NATIVE") == "0":
        return "BRIDGE_STG_NATIVE=0 asks for pure Python"
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        return "no C++ compiler was found"
    if not (shutil.which("cmake") or importlib.util.find_spec("cmake")):
        return "cmake was not found"
    return None


def build_requirements():
    """What an isolated build has to fetch besides the requirements of pyproject.toml; it asks by `egg_info`."""
    return [] if "egg_info" not in sys.argv or why_not_native() or find_torch() else ["torch>=2.11"]


def wants_cuda(torch):
    """Whether to build the CUDA library: nvcc is there, and torch has CUDA or the builder says so."""
    wish = os.environ.get("BRIDGE_STG_CUDA")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if wish == "1" and not nvcc:
        sys.exit("BRIDGE_STG_CUDA=1 asks for the CUDA library, but nvcc is not on PATH.")
    if wish == "0" or not nvcc:
        return False
    asked = wish == "1" or os.environ.get("FORCE_CUDA") == "1" or "TORCH_CUDA_ARCH_LIST" in os.environ
    return asked or written_in(torch, "cuda") is not None


def architectures():
    """CMake's list from TORCH_CUDA_ARCH_LIST: "8.0;9.0+PTX" becomes "80-real;90"."""
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    numbers = [(name.removesuffix("+PTX").replace(".", ""), name.endswith("+PTX")) for name in names if name]
    return ";".join(number if ptx else f"{number}-real" for number, ptx in numbers)


def jobs():
    """Compilers to run at once: one a core, and 2 GiB of memory for each."""
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**31))


class CMakeBuild(build_ext):
    """Builds all of CMakeLists.txt's targets and installs them into the package's folder."""

    def run(self):
        target = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "bridge_stg"
        # An earlier build may have left a library that this one leaves out.
        for stale in [*target.glob("lib/libbridge_stg_*.so"), *target.glob("_native*.so")]:
            stale.unlink()
        reason = why_not_native()
        if reason is not None:
            print(f"bridge-stg: installing pure Python, without the compiled kernels: {reason}.", file=sys.stderr)
            return
        torch = find_torch()
        if torch is None:
            sys.exit(
                "bridge-stg compiles against torch >= 2.11, and there is none here: install torch first, or leave out "
                "--no-build-isolation, or set BRIDGE_STG_NATIVE=0 for pure Python."
            )
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        cmake = [shutil.which("cmake")] if shutil.which("cmake") else [sys.executable, "-m", "cmake"]
        cuda = wants_cuda(torch)
        configure = [
            *cmake,
            "--fresh",  # an earlier isolated build left paths of an environment that is gone
            *("-S", str(ROOT), "-B", str(build)),
            *(("-G", "Ninja") if shutil.which("ninja") else ()),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH_ROOT={torch}",
            f"-DBRIDGE_STG_CUDA={'ON' if cuda else 'OFF'}",
            f"-DBRIDGE_STG_CUDA_ARCHITECTURES={architectures()}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([*cmake, "--build", str(build), "--parallel", str(jobs())], check=True)
        install = [*cmake, "--install", str(build), "--prefix", str(target), "--component", "package"]
        subprocess.run(install, check=True)

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


setup(
    ext_modules=[Extension("bridge_stg._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=build_requirements(),
)
