"""Runs one benchmark: prepare, check, time in pairs, weigh; a provider whose result is wrong is not timed."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .agreement import Disagreement, gradient_disagreement, same_form
from .cases import FORWARD_BACKWARD, Benchmark, Case, Inputs, Prepared, Provider, Unavailable
from .counting import Counts, count_launches
from .machine import cache_bytes, measure_ceilings
from .memory import can_measure, peak_bytes, storage_bytes
from .timing import Budget, Spread, cpu_sampler, cuda_sampler, graph_sampler, interleaved, paired_ratio

_RING_LIMIT = 2 * 2**30
_SETS_LIMIT, _QUICK_SETS_LIMIT = 32, 3
_MEMORY_REPEATS = 3
_EAGER = Budget(0.3, least=3, most=9)


@dataclass
class Measured:
    """One provider on one case and mode.

    Attributes:
        status: "ok", "wrong", "not available", "failed" or "left out".
        note: why the status is not "ok".
        seconds: a call; from graph replays where `captured`.
        eager_seconds: a call launched by the host; CUDA only.
        ratio: this provider's time over the subject's, median over rounds.
        peak, extra: bytes above what was in use before the call; the same less the result.
        floor: seconds that the case cannot undercut on this machine.
    """

    provider: Provider
    case: Case
    mode: str
    status: str
    note: str = ""
    seconds: Spread | None = None
    eager_seconds: Spread | None = None
    captured: bool = False
    ratio: Spread | None = None
    peak: Spread | None = None
    extra: Spread | None = None
    floor: float | None = None
    counts: Counts | None = None


@dataclass(frozen=True)
class Settings:
    """How thorough a run is."""

    device: torch.device
    quick: bool
    seed: int = 0

    @property
    def budget(self) -> Budget:
        if self.quick:
            return Budget(0.3, least=3, most=9)
        return Budget(1.0, least=7, most=101) if self.device.type == "cuda" else Budget(20.0, least=7, most=51)


@dataclass
class _Runner:
    """A provider bound to a case: its calls, one for each set of inputs, and what they returned first."""

    measured: Measured
    calls: list[Callable[[], tuple[Tensor | None, ...]]] = field(default_factory=list)


def run_case(
    benchmark: Benchmark,
    case: Case,
    mode: str,
    settings: Settings,
    echo: Callable[[str], None],
    wanted: Callable[[Provider], bool] = lambda provider: True,
) -> list[Measured]:
    """Measure every wanted provider of one case in one mode, in the order the bench file names them."""
    device = settings.device
    runners = _prepare_all(benchmark, case, mode, settings, echo, wanted)
    ready = [runner for runner in runners if runner.measured.status == "ok"]
    _time(ready, settings)
    work = benchmark.work(case, mode)
    floor = measure_ceilings(device, case.dtype).floor_seconds(work.bytes, work.flops)
    for runner in ready:
        runner.measured.floor = floor
        _weigh(runner, device)
    _forget()
    return [runner.measured for runner in runners]


def check_case(
    benchmark: Benchmark, case: Case, mode: str, settings: Settings, echo: Callable[[str], None]
) -> list[Measured]:
    """Hold this project's providers against the reference on two sets of inputs; nothing is timed."""
    benchmark = replace(benchmark, input_sets=2)
    runners = _prepare_all(benchmark, case, mode, settings, echo, lambda provider: provider.ours)
    _forget()
    return [runner.measured for runner in runners]


def bound_calls(
    benchmark: Benchmark, case: Case, mode: str, settings: Settings, provider: Provider
) -> list[Callable[[], object]]:
    """What is timed of one provider, on two sets of inputs: for a profiler."""
    ring = _ring(replace(benchmark, input_sets=2), case, settings)
    truth = _Truth(benchmark, case, mode, ring[0])
    prepared = provider.prepare(case, settings.device)
    return [_bind(prepared, mode, case, inputs, truth.grad_outputs) for inputs in ring]


def _prepare_all(
    benchmark: Benchmark,
    case: Case,
    mode: str,
    settings: Settings,
    echo: Callable[[str], None],
    wanted: Callable[[Provider], bool],
) -> list[_Runner]:
    ring = _ring(benchmark, case, settings)
    truth = _Truth(benchmark, case, mode, ring[0])
    runners = []
    for provider in filter(wanted, benchmark.providers(case, settings.device)):
        runner = _prepare(provider, truth, ring, settings)
        runners.append(runner)
        if runner.measured.status != "ok":
            echo(f"    {provider.name}: {runner.measured.status}, {runner.measured.note}")
    return runners


def _ring(benchmark: Benchmark, case: Case, settings: Settings) -> list[Inputs]:
    """Sets of inputs that together are twice the cache, at least two, so that a call finds none of its own there."""
    generator = torch.Generator(settings.device).manual_seed(settings.seed)

    def one() -> Inputs:
        return benchmark.inputs(case, settings.device, generator)

    if benchmark.input_sets is not None:
        return [one() for _ in range(benchmark.input_sets)]
    first = one()
    size = max(1, storage_bytes(value for value in first.values() if isinstance(value, Tensor)))
    limit = _QUICK_SETS_LIMIT if settings.quick else _SETS_LIMIT
    count = max(2, min(limit, _RING_LIMIT // size, -(-2 * cache_bytes(settings.device) // size)))
    return [first, *(one() for _ in range(count - 1))]


class _Truth:
    """What the reference gives for the first set of inputs, and why something else would be wrong."""

    def __init__(self, benchmark: Benchmark, case: Case, mode: str, inputs: Inputs) -> None:
        self.benchmark, self.case, self.mode = benchmark, case, mode
        self.inputs = inputs
        leaves = _with_leaves(case, mode, inputs)
        with torch.set_grad_enabled(mode == FORWARD_BACKWARD):
            outputs = benchmark.reference(case, leaves)
        self.outputs = tuple(output.detach() for output in outputs)
        self.grad_outputs: list[Tensor] = []
        self.gradients: tuple[Tensor | None, ...] = ()
        if mode == FORWARD_BACKWARD:
            generator = torch.Generator(outputs[0].device).manual_seed(1)
            self.grad_outputs = [
                torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype)
                for o in outputs
                if o.requires_grad
            ]
            self.gradients = _gradients(outputs, [leaves[name] for name in case.leaves], self.grad_outputs)

    def disagreement(self, found: tuple[Tensor | None, ...]) -> str | None:
        """Why `found`, outputs and then gradients of the leaves, is wrong; None where it agrees."""
        outputs = found[: len(self.outputs)]
        present = [output.detach() for output in outputs if output is not None]
        reason = same_form(present, self.outputs)
        reason = reason or self.benchmark.disagreement(self.case, self.inputs, tuple(present), self.outputs)
        if reason is None and self.mode == FORWARD_BACKWARD:
            tolerance = self.benchmark.gradient_tolerance[self.case.dtype]
            count = len(self.outputs)
            gradients = found[count : count + len(self.case.leaves)]
            reason = gradient_disagreement(gradients, self.gradients, self.case.leaves, tolerance)
        return reason


def _with_leaves(case: Case, mode: str, inputs: Inputs) -> Inputs:
    if mode != FORWARD_BACKWARD:
        return inputs
    return inputs | {name: inputs[name].detach().requires_grad_() for name in case.leaves}


def _gradients(
    outputs: Sequence[Tensor], wanted: Sequence[Tensor], grad_outputs: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    reached = [output for output in outputs if output.requires_grad]
    return torch.autograd.grad(reached, wanted, grad_outputs, allow_unused=True)


def _bind(
    prepared: Prepared, mode: str, case: Case, inputs: Inputs, grad_outputs: Sequence[Tensor]
) -> Callable[[], tuple[Tensor | None, ...]]:
    """What is timed: outputs, or outputs and then the gradients of the leaves and of the parameters."""
    if mode != FORWARD_BACKWARD:

        def forward() -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                return prepared.call(inputs)

        return forward
    leaves = _with_leaves(case, mode, inputs)
    wanted = [*(leaves[name] for name in case.leaves), *prepared.parameters]
    weights: list[Tensor] = []  # in the dtypes of this provider's outputs, known after its first call

    def forward_backward() -> tuple[Tensor | None, ...]:
        outputs = prepared.call(leaves)
        if not weights:
            reached = [output for output in outputs if output.requires_grad]
            if (reason := same_form(reached, grad_outputs)) is not None:
                raise Disagreement(f"of those with a gradient, {reason}")
            weights.extend(w.to(output.dtype) for w, output in zip(grad_outputs, reached, strict=True))
        gradients = _gradients(outputs, wanted, weights)
        return (*(output.detach() for output in outputs), *gradients)

    return forward_backward


def _prepare(provider: Provider, truth: _Truth, ring: Sequence[Inputs], settings: Settings) -> _Runner:
    """Build, run once, check; a failure becomes the status."""
    measured = Measured(provider, truth.case, truth.mode, "ok")
    runner = _Runner(measured)
    if provider.slow_start and settings.quick:
        measured.status, measured.note = "left out", "it compiles for long, and this is a quick run"
        return runner
    try:
        prepared = provider.prepare(truth.case, settings.device)
        runner.calls = [_bind(prepared, truth.mode, truth.case, inputs, truth.grad_outputs) for inputs in ring]
        reason = truth.disagreement(runner.calls[0]())
        if reason is not None:
            raise Disagreement(reason)
        runner.calls[1]()  # what the second call compiles or allocates is not timed either
        if settings.device.type == "cuda":
            measured.counts = count_launches(runner.calls[0])
    except Disagreement as error:
        measured.status, measured.note = "wrong", str(error)
    except Unavailable as error:
        measured.status, measured.note = "not available", str(error)
    except Exception as error:  # whatever a peer raises here is a finding about the peer
        measured.status, measured.note = "failed", f"{type(error).__name__}: {_first_line(error)}"
    return runner


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


def _time(runners: Sequence[_Runner], settings: Settings) -> None:
    if not runners:
        return
    samplers: dict[str, Callable[[], float]] = {}
    eager: dict[str, Callable[[], float]] = {}
    for runner in runners:
        name = runner.measured.provider.name
        if settings.device.type == "cuda":
            eager[name] = cuda_sampler(runner.calls)
            samplers[name], runner.measured.captured = _capture(runner, eager[name])
        else:
            samplers[name] = cpu_sampler(runner.calls)
    samples = interleaved(samplers, settings.budget)
    launched = interleaved(eager, _EAGER) if eager else {}
    subject = next((r.measured for r in runners if r.measured.provider.subject), None)
    for measured in (runner.measured for runner in runners):
        name = measured.provider.name
        measured.seconds = Spread.of(samples[name])
        if launched:
            measured.eager_seconds = Spread.of(launched[name])
        if subject is not None and measured is not subject:
            # A provider that cannot be captured is held against the subject as launched, too.
            same = measured.captured == subject.captured
            pair = samples if same else launched
            measured.ratio = paired_ratio(pair[name], pair[subject.provider.name])


def _capture(runner: _Runner, eager: Callable[[], float]) -> tuple[Callable[[], float], bool]:
    """A graph of the provider; one that makes the host wait cannot be captured and is timed as launched."""
    counts = runner.measured.counts
    if counts is not None and counts.syncs:
        return eager, False
    try:
        return graph_sampler(runner.calls), True
    except RuntimeError as error:
        torch.cuda.synchronize()
        runner.measured.note = f"not captured: {_first_line(error)}"
        return eager, False


def _weigh(runner: _Runner, device: torch.device) -> None:
    """Peak memory of a call, median of a few; the result is not extra where the call allocated it."""
    if not can_measure(device):
        return
    gc.collect()
    peaks, extras = [], []
    for call in (runner.calls * _MEMORY_REPEATS)[:_MEMORY_REPEATS]:
        peak, result = peak_bytes(call, device)
        assert isinstance(result, tuple)
        kept = 0 if runner.measured.provider.reuses_output else storage_bytes(result)
        peaks.append(float(peak))
        extras.append(float(max(0, peak - kept)))
        del result
    runner.measured.peak, runner.measured.extra = Spread.of(peaks), Spread.of(extras)


def _forget() -> None:
    """Free graphs, compiled functions and cached blocks before the next case."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
