"""`bridge-stg bench` over a folder of benchmarks, and `run_on_gpu.sh` on a machine without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "run_on_gpu.sh"


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


def run_on_gpu(out, *arguments, python=sys.executable):
    environment = {**os.environ, "OUT": str(out), "PYTHON": python}
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=1200)


def test_the_dry_run_walks_every_step(tmp_path):
    done = run_on_gpu(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "summary.md").read_text()
    for name in ("preflight", "build", "tests", "sanitizer", "bench"):
        assert f"| {name} | passed | " in summary
        assert (tmp_path / f"{name}.log").stat().st_size > 0
    assert "failed: none" in done.stdout
    assert "test_harness.py" in (tmp_path / "tests.log").read_text()
    assert "fused GEMM + SDPA cudnn" in (tmp_path / "bench.log").read_text()


def test_a_failing_step_hides_no_other(tmp_path):
    done = run_on_gpu(tmp_path, "--dry-run", python="false")
    assert done.returncode == 1
    assert "failed: preflight build tests sanitizer bench" in done.stdout
    assert run_on_gpu(tmp_path, "--nonsense").returncode == 2
