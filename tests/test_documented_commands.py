"""Every command and example of the documentation runs, or says why it is not run here.

A fenced block runs as it is written, smaller where SMALLER says so, unless `<!-- not run: reason -->` stands above it.
All commands, run or not, name subcommands, options, configurations, settings, modules and make targets that exist.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import typer

from bridge_stg.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*?) ?-->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
INLINE = re.compile(r"`((?:make|bridge-stg|torchrun|python -m|python) [^`\n]*)`")
SMALLER = [
    (re.compile(r"--count \d+"), "--count 2"),
    (re.compile(r"schedule\.steps=\d+"), "schedule.steps=2 --set data.batch_size=2"),
]
# Targets that CI has no use for.
NOT_IN_CI = {"install", "clean", "help"}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def is_shell(self) -> bool:
        return self.language in ("bash", "sh", "console") or bool(
            re.search(r"^(bridge-stg|torchrun|make|pip|python) ", self.text, re.M)
        )


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for found in FENCE.finditer(text):
            line = text.count("\n", 0, found.start("text"))
            yield Block(str(page.relative_to(ROOT)), line, found["language"], found["text"], found["reason"])


def commands(text: str) -> list[str]:
    """The command lines of a shell block, without comments, continued lines joined."""
    lines = (line.partition(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


BLOCKS = list(blocks())
SHELL = [block for block in BLOCKS if block.is_shell]
PYTHON_PAGES = sorted({block.page for block in BLOCKS if block.language == "python" and block.reason is None})
RUN = [block for block in SHELL if block.reason is None and not re.match(r"make ", block.text)]
NAMED = sorted(
    {(block.page, command) for block in SHELL for command in commands(block.text)}
    | {(str(page.relative_to(ROOT)), command) for page in PAGES for command in INLINE.findall(page.read_text())}
)


def name_of(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the files the examples name: a clip, and a manifest of it."""
    folder = tmp_path_factory.mktemp("documented")
    made = [sys.executable, "-m", "bridge_stg", "synth", "made", "--split", "test", "--count", "1", "--seed", "3"]
    subprocess.run(made, cwd=folder, check=True, capture_output=True)
    (clip,) = (folder / "made").rglob("*.mp4")
    shutil.move(clip, folder / "clip.mp4")
    request = {"id": "a", "video": "clip.mp4", "sentence": "the red circle that moves left"}
    (folder / "requests.jsonl").write_text(json.dumps(request) + "\n")
    return folder


@pytest.mark.parametrize("block", RUN, ids=name_of)
def test_a_shell_block_runs(block, workplace):
    for command in commands(block.text):
        for pattern, replacement in SMALLER:
            command = pattern.sub(replacement, command)
        words = shlex.split(command)
        words[:1] = {"bridge-stg": [sys.executable, "-m", "bridge_stg"], "python": [sys.executable]}.get(
            words[0], words[:1]
        )
        done = subprocess.run(words, cwd=workplace, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_the_python_blocks_of_a_page_run_in_turn(page, workplace):
    code = "\n".join(b.text for b in BLOCKS if b.page == page and b.language == "python" and b.reason is None)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(("page", "command"), NAMED, ids=[f"{page}: {command}" for page, command in NAMED])
def test_what_a_command_names_exists(page, command):
    words = [word.strip("[]") for word in command.replace("...", "").split()]
    if words[0] == "make":
        target = words[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"no target {target}"
        in_ci = re.search(rf"\bmake {target}$", (ROOT / ".ci" / "run").read_text(), re.M)
        assert in_ci or target in NOT_IN_CI, f"CI does not run make {target}"
    elif "-m" in words[:-1] and words[0] in ("python", "torchrun") and words[words.index("-m") + 1] != "bridge_stg":
        module = words[words.index("-m") + 1]
        assert importlib.util.find_spec(module), f"no module {module}"
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), f"no file {words[1]}"
    elif words[0] == "bridge-stg" or "bridge_stg" in words:
        check_arguments(words[1 if words[0] == "bridge-stg" else words.index("bridge_stg") + 1 :])


def check_arguments(words: list[str]) -> None:
    """The subcommand and its options exist; what `train` is told can be loaded."""
    command: click.Command = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        command = command.commands[words.pop(0)]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if re.match(r"--?[a-z]", word):
            assert word.partition("=")[0] in known, f"{command.name} has no option {word}"
    if command.name == "train" and words and not words[0].isupper():
        from bridge_stg.training import load_config

        load_config(words[0], [words[i + 1] for i, word in enumerate(words) if word == "--set"])


def test_every_reason_says_something():
    assert all(len(block.reason) > 10 for block in BLOCKS if block.reason is not None)
    assert len(RUN) >= 2 and len(PYTHON_PAGES) >= 3
