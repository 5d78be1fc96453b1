"""How commands end: one sentence, an exit code, and nothing half-written, whatever ends them."""

import os
import signal
import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-m", "bridge_stg"]
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import typer
from bridge_stg.cli.main import run
from bridge_stg.cli.console import echo
from bridge_stg.errors import SampleError
from bridge_stg.files import atomic_path

app = typer.Typer()

@app.command()
def write(path: str, number: int = 0):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        print("begun", flush=True)
        time.sleep(60)

@app.command()
def fail(kind: str):
    if kind == "loader":
        raise SampleError('Caught SampleError in DataLoader worker process 0.\\nOriginal Traceback (most recent call '
                          'last):\\n  File "x"\\nbridge_stg.errors.SampleError: a video: it is none.\\n')
    raise {"worker": RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
           "sample": SampleError("a \\x1b[31m[/red] sentence\\n."), "memory": MemoryError(),
           "system": PermissionError(13, "Permission denied", "a/file"), "bug": ZeroDivisionError()}[kind]

@app.command()
def talk(lines: int):
    for i in range(lines):
        echo(i)

sys.exit(run(app, sys.argv[1:], "script", debug=os.environ.get("DEBUG") == "1"))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT)
    return [sys.executable, str(path)]


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, ""), (signal.SIGINT, 130, "error: interrupted.")],
)
def test_a_signal_ends_it_and_leaves_nothing_half_written(script, tmp_path, number, code, message):
    process = subprocess.Popen(
        [*script, "write", str(tmp_path / "a.mp4")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (code, message)
    assert list(tmp_path.iterdir()) == []


def test_a_hangup_that_is_ignored_stays_ignored(script, tmp_path):
    process = subprocess.Popen(
        [*script, "write", str(tmp_path / "a.mp4")],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 143


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sample", r"error: a \x1b[31m[/red] sentence\n."),
        ("loader", "error: a video: it is none."),
        (
            "worker",
            "error: DataLoader worker (pid 7) is killed by signal: Killed; where the memory was not enough for it, ask "
            "for fewer data.workers.",
        ),
        ("memory", "error: the memory is not enough for it."),
        ("system", "error: a/file: Permission denied."),
    ],
)
def test_a_failure_is_one_sentence_and_a_traceback_with_debug(script, kind, message):
    done = run([*script, "fail", kind])
    assert (done.returncode, done.stdout, done.stderr.strip()) == (1, "", message)
    assert "Traceback" in run([*script, "fail", kind], env=os.environ | {"DEBUG": "1"}).stderr


def test_a_bug_shows_its_traceback(script):
    done = run([*script, "fail", "bug"])
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("word", ["\x1b[31m", "[/red]", b"caf\xe9", "\u202e"])
def test_a_wrong_command_line_does_not_reach_the_terminal_as_it_is(script, word):
    for arguments in ([word], ["talk", word], ["write", "x", "--number", word]):
        done = subprocess.run([*script, *arguments], capture_output=True, timeout=120)
        assert done.returncode == 2 and b"Traceback" not in done.stderr
        assert b"\x1b" not in done.stderr and b"\xe9" not in done.stderr and "\u202e".encode() not in done.stderr


def test_stdout_that_takes_no_more_is_one_sentence(script):
    for command in ([*script, "talk", "3"], [*COMMAND, "--help"], [*COMMAND, "--version"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
        assert done.returncode == 1 and "No space left on device." in done.stderr and done.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_failure(script):
    process = subprocess.Popen([*script, "talk", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.wait(60) == 1 and process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("argument", ["--help", "--version", "ground --help", "evaluate --help", "train --help"])
def test_help_is_there_without_waiting_for_torch(argument):
    code = (
        "import sys; sys.argv = ['bridge-stg', *sys.argv[1:]]\n"
        "from bridge_stg.cli.main import main\n"
        "try: main()\n"
        "finally: print({'torch', 'numpy', 'transformers', 'av', 'cv2'} & sys.modules.keys(), file=sys.stderr)"
    )
    done = run([sys.executable, "-c", code, *argument.split()])
    assert done.returncode == 0 and done.stdout and done.stderr.strip() == "set()"
