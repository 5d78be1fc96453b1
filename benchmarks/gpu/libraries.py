"""The compiled libraries of a GPU run: built once, on a machine with nvcc and without a GPU, and checked by a hash.

They use torch's stable ABI, so that one build against the oldest torch serves every later one and every Python.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("libbridge_stg_cpu.so", "libbridge_stg_cuda.so")
SOURCES = ("csrc", "CMakeLists.txt", "setup.py")
ARCHITECTURE = "9.0"


def source_hash(tree: Path) -> str:
    """SHA-256 over names and contents of all that is compiled."""
    digest = hashlib.sha256(ARCHITECTURE.encode())
    for name in SOURCES:
        for path in sorted(p for p in [tree / name, *(tree / name).rglob("*")] if p.is_file()):
            digest.update(f"{path.relative_to(tree)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def obstacle(tree: Path, folder: Path) -> str | None:
    """Why the libraries in `folder` are not those of the sources in `tree`, or None."""
    missing = [name for name in NAMES if not (folder / name).is_file()]
    if missing:
        return f"{folder} has no {missing[0]}"
    stamp = folder / "source_hash"
    known = stamp.read_text().strip() if stamp.is_file() else "nothing"
    return None if known == source_hash(tree) else f"the sources changed since {folder} was built"


def build(tree: Path, folder: Path) -> None:
    """Compile in `tree`, move the libraries to `folder`, and note the hash of their sources."""
    environment = os.environ | {"BRIDGE_STG_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURE}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tree, env=environment, check=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        shutil.move(tree / "bridge_stg" / "lib" / name, folder / name)
    (folder / "source_hash").write_text(source_hash(tree) + "\n")


def usable() -> bool:
    """Whether every op finds its backends in a fresh process; prints what it finds."""
    return subprocess.run([sys.executable, "-m", "benchmarks.gpu.preflight", "--built"]).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, required=True, help="the sources")
    parser.add_argument("--folder", type=Path, required=True, help="where the libraries are, or go")
    parser.add_argument("--build-only", action="store_true", help="do not load them: there is no GPU here")
    options = parser.parse_args()
    reason = obstacle(options.tree, options.folder)
    if reason is None and (options.build_only or usable()):
        print("the libraries are those of these sources")
        return 0
    print(f"building: {reason or 'the libraries that were brought do not load'}")
    build(options.tree, options.folder)
    return int(not options.build_only and not usable())


if __name__ == "__main__":
    sys.exit(main())
