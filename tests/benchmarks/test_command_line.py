"""`bridge-stg bench` over a folder of benchmarks."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def bench(*arguments):
    command = [sys.executable, "-m", "bridge_stg", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_an_op_adds_one_file(tmp_path):
    folder = tmp_path / "benchmarks"
    shutil.copytree(ROOT / "benchmarks" / "harness", folder / "harness")
    (folder / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("fakes.py"), folder / "bench_doubling.py")
    done = bench("doubling", "--quick", "--benchmarks", folder, "--out", tmp_path / "out", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "| n4096 | float32 | forward+backward |" in done.stdout and "missing: not available" in done.stderr
    assert [path.name for path in tmp_path.glob("out/*/*.csv")] == ["doubling.csv"]


def test_without_a_checkout_it_says_so(tmp_path):
    done = bench("--benchmarks", tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert "holds no benchmarks: they come with a checkout" in done.stderr.replace("\n", " ")
