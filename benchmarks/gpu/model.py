"""Predicts times on an H100 from machine code and arithmetic; `python -m benchmarks.gpu.model` writes predictions.csv.

`docs/design/gpu_model.md` has the formulas and what they leave out. Nothing here has run on a GPU: every figure is a
prediction, to be held against a measurement.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

import triton

from .. import harness
from .arithmetic import FRAMES, PATCHIFY, SOURCE, TARGET, WORK, Work
from .compare import PREDICTIONS
from .launches import CALLS, Launch, recorded, torch_operations
from .sass import Loop, Sass, read

# An H100 SXM: what a copy and a matrix product reach there, not what its data sheet promises.
PROCESSORS, CLOCK = 132, 1.75e9
MEMORY, CACHE = 3.0e12, 5.5e12  # bytes a second
PRODUCTS = {"HGMMA": 650e12, "HMMA": 400e12, "": 60e12}  # operations a second: wgmma, mma, without tensor cores
CACHED, UNCACHED = 280e-9, 650e-9  # until a load from the L2 cache arrives, and one from memory
BARRIER = 35 / CLOCK  # of 8 warps
ISSUE = 0.7 * 4 * CLOCK  # instructions of a warp a second and multiprocessor: four schedulers, which also stall
LAUNCH, SMALL = 1.0e-6, 1.5e-6  # within a CUDA graph: between two kernels; a kernel of torch on a few rows
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 227 * 1024, 2048, 32  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that a block takes besides its own
LIBRARY = Path(__file__).parents[2] / "bridge_stg" / "lib" / "libbridge_stg_cuda.so"
COMPILER = f"triton {triton.__version__}"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel and how it is launched."""

    name: str
    sass: Sass
    registers: int
    shared: int
    warps: int
    programs: int

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds at once. Registers are given out to a warp in units of 256."""
        by_registers = REGISTERS // (ceil(self.registers * 32 / 256) * 256 * self.warps)
        by_shared = SHARED // (self.shared + RESERVED)
        return max(1, min(by_registers, by_shared, THREADS // (32 * self.warps), BLOCKS))

    @property
    def waves(self) -> float:
        return self.programs / (PROCESSORS * self.resident)

    @property
    def product(self) -> str:
        """The instruction that multiplies matrices, or ""."""
        return next((name for name in ("HGMMA", "HMMA") if self.sass.count(name)), "")


@dataclass(frozen=True)
class Prediction:
    """One line of predictions.csv; times in microseconds."""

    op: str
    provider: str
    mode: str
    shape: str
    dtype: str
    kernel: str
    launches: int
    programs: int
    registers: int
    shared_bytes: int
    resident: int
    waves: float
    megabytes: float
    gigaflops: float
    instructions_an_output: float
    barriers_a_step: int
    loads_in_flight: int
    load_bits: str
    store_bits: str
    product: str
    bound: str
    floor_us: float
    predicted_us: float
    peer_us: float
    peer_ratio: float
    compiler: str


def trips(sass: Sass, loop: Loop, loaded: int, threads: int) -> float:
    """How often a loop of the outermost depth runs in one program.

    A loop that loads runs until it has what the program loads. One with barriers alone finds a threshold bit by bit,
    32 bits with two barriers each. A short one that loads is a binary search among some hundred entries.
    """
    body = sass.body(loop)
    moved = sum(i.bits // 8 * threads for i in body if i.base in ("LDG", "LDGSTS"))
    barriers = sum(i.base == "BAR" for i in body)
    if moved and len(body) < 25:
        return 10.0
    if moved:
        return max(1.0, loaded / moved)
    return 64 / barriers if barriers else 1.0


def in_loops(kernel: Kernel, work: Work, *bases: str) -> float:
    """Instructions of some kinds, or of all, that a warp executes in its loops."""
    sass, threads = kernel.sass, 32 * kernel.warps
    return sum(
        trips(sass, loop, work.loaded, threads) * sum(not bases or i.base in bases for i in sass.body(loop))
        for loop in sass.loops
        if loop.depth == 1
    )


def executed(kernel: Kernel, work: Work) -> float:
    """Instructions that a warp executes: those outside of loops once."""
    outside = len(kernel.sass.code) - sum(len(kernel.sass.body(loop)) for loop in kernel.sass.loops if loop.depth == 1)
    return outside + in_loops(kernel, work)


def serial_seconds(kernel: Kernel, work: Work) -> float:
    """Time of one program alone: its loads, as many at once as its code allows, and its barriers."""
    sass = kernel.sass
    widest = max([*sass.widths("LDG"), 32])
    ahead = max(sass.loads_in_flight, 1) * widest // 8 * 32 * kernel.warps
    if sass.count("LDGSTS", "UBLKCP", "UTMALDG"):  # a pipeline fills its buffers ahead, half where it waits for all
        ahead = max(ahead, kernel.shared // (2 if sass.waits_for_all_at_a_loop_top else 1))
    from_memory = min(1.0, work.read / max(kernel.programs * work.loaded, 1))
    latency = CACHED + from_memory * (UNCACHED - CACHED)
    return max(1.0, work.loaded / ahead) * latency + in_loops(kernel, work, "BAR") * BARRIER


def predict(kernel: Kernel, work: Work) -> tuple[float, float, str, float]:
    """(seconds, floor in seconds, what bounds the kernel, instructions of a warp)."""
    instructions = executed(kernel, work)
    one = serial_seconds(kernel, work)
    rounds = ceil(kernel.waves)
    processors = min(PROCESSORS, kernel.programs)
    bounds = {
        "memory": (work.read + work.written) / MEMORY,
        "cache": kernel.programs * work.loaded / CACHE,
        "products": work.flops / PRODUCTS[kernel.product],
        "issue": kernel.programs * kernel.warps * instructions / (processors * ISSUE),
        "latency": rounds * one,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    # The last wave has the machine for itself, and is as slow as one program.
    tail = one if bound != "latency" and rounds > 1 and kernel.waves % 1 else 0.0
    floor = max(bounds["memory"], work.flops / PRODUCTS["HGMMA"])
    return max(bounds.values()) + tail + LAUNCH, floor, bound, instructions


def compiled(launch: Launch) -> Kernel:
    """Compile a launch's kernel for sm_90 and read its code."""
    from .ahead_of_time import compile_kernel, read_cubin

    result = compile_kernel(launch.variant, 90)
    cubin = result.asm["cubin"]
    registers = int(read_cubin(cubin)["REG"])
    return Kernel(launch.kernel, read(cubin, TOOLS), registers, result.metadata.shared, launch.warps, launch.programs)


def peer_seconds(op: str, mode: str) -> float:
    """An estimate of the best peer: the bytes and operations of its operators, and their launches.

    For `prune_tokens` 20 us each for a top-k and a sort of all segments, and 70% of the memory's rate for products of
    so few queries. For `attend_memory` one product for all keys and values, then an attention a layer: 30 kernels, 92
    with backward.
    """
    if op.startswith("prune"):
        tokens, kept = 64 * 576 * 1024 * 2, 64 * 144 * 1024 * 2
        forward = (tokens / 0.7 + 2 * kept) / MEMORY + 5 * SMALL + 2 * 20e-6
        # Backward: the product's two gradients, zeros and a scatter of the kept rows, and the sum of both.
        backward = (2 * tokens / 0.7 + 4 * tokens + 2 * kept) / MEMORY + 8 * SMALL
        return forward + (0.0 if mode == "forward" else backward)
    memory = int(op.rpartition("B")[2]) * 8192 * 256 * 2
    projected = 24 * memory // 2 * 256 / PRODUCTS["HGMMA"] + (1 + 12 + 12) * memory / MEMORY
    # Backward: two products in place of one; keys and values are read again, and their gradients written and read.
    return projected + 30 * SMALL if mode == "forward" else 3 * projected + 24 * memory / MEMORY + 92 * SMALL


SHAPES = {
    "prune_tokens": ("prune_tokens", "bridge_stg (triton)", "B64 N576 D1024 Q16 k144"),
    "prune_tokens_varlen": ("prune_tokens", "bridge_stg, varlen", "B64 N576 D1024 Q16 k144"),
    "attend_memory B1": ("attend_memory", "bridge_stg", "L6 B1 M8192 C256 H8 Q16"),
    "attend_memory B16": ("attend_memory", "bridge_stg", "L6 B16 M8192 C256 H8 Q16"),
}


def triton_predictions() -> Iterator[Prediction]:
    """Of every kernel of every target, one line a distinct kernel, and their sum."""
    known: dict[str, Kernel] = {}
    for (target, mode), call in CALLS.items():
        lines: dict[str, Prediction] = {}
        for launch in recorded(call):
            key = json.dumps([str(launch.variant), launch.grid])
            if key in lines:
                lines[key] = _repeated(lines[key])
                continue
            kernel = known.get(key) or known.setdefault(key, compiled(launch))
            lines[key] = _line(target, mode, kernel, WORK[target][launch.kernel](launch))
        yield from lines.values()
        batch = int(target.rpartition("B")[2]) if target.startswith("attend") else 0
        yield _total(target, mode, list(lines.values()), torch_operations(batch, mode != "forward") if batch else 0)


def _line(target: str, mode: str, kernel: Kernel, work: Work) -> Prediction:
    seconds, floor, bound, instructions = predict(kernel, work)
    op, provider, shape = SHAPES[target]
    sass = kernel.sass
    return Prediction(
        op, provider, mode, shape, "bfloat16", kernel.name, 1, kernel.programs, kernel.registers, kernel.shared,
        kernel.resident, round(kernel.waves, 2), round((work.read + work.written) / 1e6, 1), round(work.flops / 1e9, 2),
        round(kernel.programs * kernel.warps * 32 * instructions / work.outputs, 1), sass.barriers_in_loops,
        sass.loads_in_flight, _text(sass.widths("LDG", "LDGSTS")), _text(sass.widths("STG")), kernel.product, bound,
        round(floor * 1e6, 1), round(seconds * 1e6, 1), 0.0, 0.0, COMPILER,
    )  # fmt: skip


def _text(widths: dict[int, int]) -> str:
    return " ".join(f"{bits}x{count}" for bits, count in widths.items())


def _repeated(line: Prediction) -> Prediction:
    """The same kernel launched once more."""
    count = line.launches
    values = asdict(line) | {"launches": count + 1}
    for name in ("megabytes", "gigaflops", "floor_us", "predicted_us"):
        values[name] = round(values[name] / count * (count + 1), 2)
    return Prediction(**values)


def _total(target: str, mode: str, lines: Sequence[Prediction], torch_kernels: int) -> Prediction:
    op, provider, shape = SHAPES[target]
    work = floor_of(op, shape, mode)
    predicted = sum(line.predicted_us for line in lines) + torch_kernels * SMALL * 1e6
    peer = peer_seconds(target, mode) * 1e6
    launches = sum(line.launches for line in lines) + torch_kernels
    return Prediction(
        op, provider, mode, shape, "bfloat16", "total", launches, 0, 0, 0, 0, 0.0, round(work.bytes / 1e6, 1),
        round(work.flops / 1e9, 2), 0.0, 0, 0, "", "", "", "",
        round(1e6 * max(work.bytes / MEMORY, work.flops / PRODUCTS["HGMMA"]), 1),
        round(predicted, 1), round(peer, 1), round(peer / predicted, 2), COMPILER,
    )  # fmt: skip


def floor_of(op: str, shape: str, mode: str) -> harness.Work:
    """The least that any implementation must do, as the benchmark of the op counts it."""
    benchmark = importlib.import_module(f"benchmarks.bench_{op}").BENCHMARK
    case = next(case for case in benchmark.cases("cuda", False) if case.shape == shape)
    found: harness.Work = benchmark.work(case, mode)
    return found


def patchify_kernel(library: Path) -> Kernel:
    """The CUDA kernel for bfloat16 and patches of 14 at the target shape, out of the compiled library.

    Raises:
        StopIteration: the library holds no code for sm_90.
    """
    name = "patchify_kernelI13__nv_bfloat16Li14E"
    with tempfile.TemporaryDirectory() as folder:
        command = [TOOLS / "cuobjdump", "-xelf", "sm_90", library.resolve()]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        cubin = next(Path(folder).glob("*.cubin"))
        sass = read(cubin.read_bytes(), TOOLS, name)
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", cubin]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers = int(usage.partition(name)[2].partition("REG:")[2].split()[0])
    programs = (FRAMES // 2) * (TARGET[0] // 28) * ceil(TARGET[1] / 70)
    return Kernel("patchify_kernel", sass, registers, 40 * 1024, 7, programs)


def patchify_prediction(kernel: Kernel) -> Prediction:
    """Of the CUDA kernel: its loops run over the taps of the filter, whose number is known."""
    sass = kernel.sass
    taps = 2 * 2.0 * SOURCE[0] / TARGET[0]  # of a bicubic reduction, about as many across
    bodies = [sass.body(loop) for loop in sass.innermost]
    across = next(b for b in bodies if sum(i.base == "LDG" and i.bits == 8 for i in b) >= 4 and len(b) < 60)
    down = next(b for b in bodies if sum(i.base == "LDS" for i in b) >= 4 and sum(i.base == "FFMA" for i in b) >= 4)
    around = min(
        (sass.body(loop) for loop in sass.loops if any(i.base == "STG" for i in sass.body(loop))), key=len
    )  # one output value: what is not in the loop over taps
    rows = SOURCE[0] / TARGET[0]  # of the source to one of the target: what the pass across makes for one output
    fused = sum(i.base == "FFMA" for i in down)
    an_output = rows * taps / 4 * len(across) + taps / fused * len(down) + (len(around) - len(down))
    issue = PATCHIFY.outputs * an_output / 32 / (PROCESSORS * ISSUE)
    memory = (PATCHIFY.read + PATCHIFY.written) / MEMORY
    peer = (PATCHIFY.read * 10 + PATCHIFY.written * 6) / MEMORY + 2.5e-3  # uint8 resize through float32, then copies
    return Prediction(
        "patchify_frames", "bridge_stg (cuda)", "forward", "T64 1080x1920 to 560x1008", "bfloat16", "total", 1,
        kernel.programs, kernel.registers, kernel.shared, kernel.resident, round(kernel.waves, 2),
        round((PATCHIFY.read + PATCHIFY.written) / 1e6, 1), round(PATCHIFY.flops / 1e9, 2), round(an_output, 1),
        sass.barriers_in_loops, sass.loads_in_flight, _text(sass.widths("LDG")), _text(sass.widths("STG")), "",
        "issue" if issue > memory else "memory", round(memory * 1e6, 1), round(max(issue, memory) * 1e6, 1),
        round(peer * 1e6, 1), round(peer / max(issue, memory), 2), "nvcc",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.model", description=__doc__)
    parser.add_argument("--out", type=Path, default=PREDICTIONS)
    parser.add_argument("--library", type=Path, default=LIBRARY, help="the CUDA library; without it no patchify_frames")
    options = parser.parse_args()
    lines = list(triton_predictions())
    if options.library.is_file():
        lines.append(patchify_prediction(patchify_kernel(options.library)))
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(lines[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)
    print("\n".join(page(lines)))


def page(lines: Sequence[Prediction]) -> Iterator[str]:
    """The predictions as the two Markdown tables of the design note: the targets, and their kernels."""
    yield "| target | mode | launches | floor | predicted | of the floor | best peer, estimated | times faster |"
    yield "|---|---|---|---|---|---|---|---|"
    for line in lines:
        if line.kernel == "total":
            name = f"{line.op}{', varlen' if 'varlen' in line.provider else ''}, {line.shape}"
            share = f"{line.floor_us / line.predicted_us:.0%}"
            times = f"{line.floor_us:.1f} us | {line.predicted_us:.1f} us | {share} | {line.peer_us:.0f} us"
            yield f"| {name} | {line.mode} | {line.launches} | {times} | {line.peer_ratio:.2f} |"
    yield ""
    yield (
        "| kernel | launches x programs | registers, shared | resident, waves | instructions an output "
        "| barriers a step | loads ahead | loads, stores (bits x count) | bound by | floor | predicted |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    seen = set()
    for line in lines:
        if line.kernel == "total" and line.op != "patchify_frames":
            continue
        cells = [
            line.kernel if line.kernel != "total" else "patchify_kernel",
            f"{line.launches} x {line.programs}",
            f"{line.registers}, {line.shared_bytes / 1024:.0f} KB",
            f"{line.resident}, {line.waves}",
            f"{line.instructions_an_output}",
            f"{line.barriers_a_step}",
            f"{line.loads_in_flight}",
            f"{line.load_bits}; {line.store_bits}",
            f"{line.bound} {line.product}".strip(),
            f"{line.floor_us} us",
            f"{line.predicted_us} us",
        ]
        row = f"| {' | '.join(cells)} |"
        if row not in seen:
            seen.add(row)
            yield row


if __name__ == "__main__":
    main()
