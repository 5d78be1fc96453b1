"""The memory of a data loader over many clips, which must stay flat.

    python -m benchmarks.studies.loader --clips 2000 --workers 2

Writes that many small H.264 clips, reads each once through `GroundingStream`, `LengthAwareBatches` and worker
processes, as training does, and takes the resident memory (RSS) of the loader's processes after every batch; the mean
over every 100 clips is compared. Ends with 1 where that leaves 5% of what it was for clips 101 to 200. Measures that
leave shared pages out (PSS, USS) jump when another program that maps the same libraries comes or goes.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from functools import partial
from pathlib import Path

import psutil
from torch.utils.data import DataLoader

from bridge_stg.data import VOCABULARY, SampleStore, write_split
from bridge_stg.files import atomic_path
from bridge_stg.models.tiny import tiny_processor
from bridge_stg.training import GroundingStream, LengthAwareBatches, collate_grounding

WARM_UP = 200
TOLERANCE = 0.05


def memory() -> int:
    """Resident bytes of this process and its children."""
    main = psutil.Process()
    return sum(process.memory_info().rss for process in [main, *main.children(recursive=True)])


def measure(data: Path, clips: int, workers: int, batch: int = 4, every: int = 100) -> list[tuple[int, float]]:
    """Read a dataset once, and give (clips read, mean bytes) for every `every` clips."""
    processor = tiny_processor(VOCABULARY)
    stream = GroundingStream({"clips": SampleStore(data)}, None, processor)
    batches = once(stream, clips, batch, every)
    loader = DataLoader(
        stream,
        batch_sampler=batches,
        collate_fn=partial(collate_grounding, processor=processor),
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    found: list[tuple[int, float]] = []
    sizes: list[int] = []
    for count, _ in enumerate(loader, start=1):
        sizes.append(memory())
        if count * batch % every == 0:
            found.append((count * batch, sum(sizes) / len(sizes)))
            sizes = []
    return found


def once(stream: GroundingStream, clips: int, batch: int, every: int) -> LengthAwareBatches:
    """Batches with every clip once: the number of clips is a multiple of the window, so that none is left over."""
    return LengthAwareBatches(stream.shape, batches=clips // batch, clips=batch, window=every)


def drift(found: list[tuple[int, float]]) -> float:
    """The largest distance of a mean from that at the end of the warm-up, as a share of that one."""
    means = [mean for clips, mean in found if clips >= WARM_UP]
    return max(abs(mean - means[0]) / means[0] for mean in means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="CSV of the table")
    options = parser.parse_args()
    if options.clips < 2 * WARM_UP or options.clips % 100:
        parser.error(f"--clips must be a multiple of 100 and at least {2 * WARM_UP}, got {options.clips}")
    with tempfile.TemporaryDirectory() as folder:
        data = write_split(folder, "train", options.clips, 0)
        found = measure(data, options.clips, options.workers)
    rows = [(clips, round(mean / 2**20, 1)) for clips, mean in found]
    for clips, mean in rows:
        print(f"{clips:6d} clips  {mean:7.1f} MB")
    if options.out is not None:
        with atomic_path(options.out) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([("clips", "resident_mb"), *rows])
    print(f"after the first {WARM_UP} clips within {drift(found):.1%}")
    sys.exit(drift(found) > TOLERANCE)


if __name__ == "__main__":
    main()
