"""Paired timings: every provider runs in every round, in an order that rotates, on inputs the cache has forgotten."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """A median and the distance between the quartiles."""

    median: float
    iqr: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], 0.0)
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, high - low)


def paired_ratio(of: Sequence[float], to: Sequence[float]) -> Spread:
    """Median over rounds of one provider's time over another's in the same round."""
    return Spread.of([a / b for a, b in zip(of, to, strict=True)])


def rotation(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """The names, starting one further each time, forwards and backwards in turn: nobody always follows the same."""
    for start in itertools.count():
        turned = [*names[start % len(names) :], *names[: start % len(names)]]
        yield turned if (start // len(names)) % 2 == 0 else turned[::-1]


@dataclass(frozen=True)
class Budget:
    """How long one case may be timed: seconds for all providers together, and bounds on the rounds."""

    seconds: float
    least: int
    most: int

    def rounds(self, seconds_a_round: float) -> int:
        return max(self.least, min(self.most, math.floor(self.seconds / max(seconds_a_round, 1e-9))))


def interleaved(samplers: Mapping[str, Callable[[], float]], budget: Budget) -> dict[str, list[float]]:
    """Seconds a call of every provider, one sample a round.

    Args:
        samplers: name -> takes one sample and returns the seconds of one call.
    """
    names = list(samplers)
    gc.collect()  # here, and not inside of a sample
    gc.disable()
    try:
        return _interleaved(names, samplers, budget)
    finally:
        gc.enable()


def _interleaved(
    names: Sequence[str], samplers: Mapping[str, Callable[[], float]], budget: Budget
) -> dict[str, list[float]]:
    started = time.perf_counter()
    for name in names:  # not kept: it finds out how long a round takes
        samplers[name]()
    rounds = budget.rounds(time.perf_counter() - started)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for order in itertools.islice(rotation(names), rounds):
        for name in order:
            samples[name].append(samplers[name]())
    return samples


def cpu_sampler(calls: Sequence[Call], least_seconds: float = 2e-3) -> Callable[[], float]:
    """Wall time of one call; short ones are repeated over the ring until `least_seconds` have passed.

    A call that is not timed goes first: while the others had their turn, the system may have taken the free memory
    away, as virtual machines do, and bringing it back can take ten times as long as the call itself.

    Args:
        calls: the provider bound to each set of inputs; every call takes the next one of the ring.
    """
    ring = itertools.cycle(calls)
    started = time.perf_counter()
    next(ring)()
    repeat = min(64, max(1, math.ceil(least_seconds / max(time.perf_counter() - started, 1e-9))))

    def sample() -> float:
        next(ring)()
        chosen = [next(ring) for _ in range(repeat)]
        start = time.perf_counter()
        for call in chosen:
            call()
        return (time.perf_counter() - start) / repeat

    return sample


def cuda_sampler(calls: Sequence[Call]) -> Callable[[], float]:
    """Device time of one call between two events around a pass over the ring, launches included."""

    def run() -> None:
        for call in calls:
            call()

    return _event_sampler(run, len(calls))


def graph_sampler(calls: Sequence[Call]) -> Callable[[], float]:
    """As `cuda_sampler`, with the whole pass captured in one CUDA graph: launches cost nothing.

    Raises:
        RuntimeError: the provider does something that cannot be captured.
    """
    # Autograd's nodes that a cycle keeps alive belong to the stream of their first call, which a capture must not use;
    # and what a first call on a new stream sets up cannot be captured.
    gc.collect()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _event_sampler(graph.replay, len(calls))


def _event_sampler(run: Call, count: int) -> Callable[[], float]:
    def sample() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    return sample
