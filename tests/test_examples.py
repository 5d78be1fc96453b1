"""The examples run as they stand, and stay short."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    assert len(path.read_text().splitlines()) < 60
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_is_one_for_each_use():
    assert {path.stem for path in EXAMPLES} == {
        "detr_decoder",
        "finetune_on_jsonl",
        "ground_video",
        "prune_video_mllm",
        "stock_qwen_processor",
    }
