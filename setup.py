"""Drives CMake for the compiled part; metadata lives in pyproject.toml, targets in CMakeLists.txt.

Environment: BRIDGE_STG_NATIVE=0 installs pure Python; BRIDGE_STG_CUDA=0 or 1 leaves out or demands the CUDA library;
TORCH_CUDA_ARCH_LIST names its architectures, such as "9.0"; MAX_JOBS the compilers at once. See docs/environment.md.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def why_not_native():
    """Why nothing can be compiled here, or None."""
    if os.environ.get("BRIDGE_STG_NATIVE") == "0":
        return "BRIDGE_STG_NATIVE=0 asks for pure Python"
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        return "no C++ compiler was found"
    if not (shutil.which("cmake") or importlib.util.find_spec("cmake")):
        return "cmake was not found"
    return None


def wants_cuda():
    """Whether to build the CUDA library: nvcc is there, and torch has CUDA or the builder says so."""
    wish = os.environ.get("BRIDGE_STG_CUDA")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if wish == "1" and not nvcc:
        sys.exit("BRIDGE_STG_CUDA=1 asks for the CUDA library, but nvcc is not on PATH.")
    if wish == "0" or not nvcc:
        return False
    import torch

    asked = wish == "1" or os.environ.get("FORCE_CUDA") == "1" or "TORCH_CUDA_ARCH_LIST" in os.environ
    return asked or torch.version.cuda is not None


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
        reason = why_not_native()
        if reason is not None:
            print(f"bridge-stg: installing pure Python, without the compiled kernels: {reason}.", file=sys.stderr)
            return
        if importlib.util.find_spec("torch") is None:
            sys.exit(
                "bridge-stg compiles against the torch it will run with, and torch is not importable here: install "
                "torch first and use pip's --no-build-isolation, or set BRIDGE_STG_NATIVE=0 for pure Python."
            )
        target = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "bridge_stg"
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        cmake = [shutil.which("cmake")] if shutil.which("cmake") else [sys.executable, "-m", "cmake"]
        cuda = wants_cuda()
        configure = [
            *cmake,
            *("-S", str(ROOT), "-B", str(build)),
            *(("-G", "Ninja") if shutil.which("ninja") else ()),
            f"-DPython_EXECUTABLE={sys.executable}",
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


setup(ext_modules=[Extension("bridge_stg._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
