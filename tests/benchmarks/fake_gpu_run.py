"""A GPU run whose steps only report: `fake_gpu_run OUT CACHE SECONDS`, killed so long after its first case."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from benchmarks.gpu.run import Folders, Step, run, variables

REPORT = """
import time
COLUMNS = ("op", "provider", "mode", "shape", "dtype", "metric", "value")
from benchmarks.gpu.events import Event, emit
for number in range(200):
    status = "failed" if number % 7 == 3 else "ok"
    rows = [dict.fromkeys(COLUMNS, "x" * number) | {"metric": "time_ms", "value": str(number)}]
    emit(Event(f"case {number}", status, text=f"traceback of {number}", rows=rows))
    time.sleep(0.01)
"""


def die(finished, seconds):
    while not (finished.is_file() and finished.stat().st_size):
        time.sleep(0.01)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def main(out, cache, seconds):
    folders = Folders(Path(out), Path(cache))
    folders.tree.mkdir(parents=True)
    threading.Thread(target=die, args=(folders.out / "finished.txt", float(seconds)), daemon=True).start()
    environment = variables(folders) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    steps = [Step(name, 60, [sys.executable, "-c", REPORT]) for name in ("first", "second")]
    run(steps, folders, 600, "a fake run", environment)


if __name__ == "__main__":
    main(*sys.argv[1:])
