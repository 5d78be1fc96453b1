"""A benchmark of doubling, whose providers fail in every way a provider can."""

import torch

from benchmarks.harness import Benchmark, Case, Prepared, Provider, Unavailable, Work, relative_error
from benchmarks.harness.cases import FORWARD, FORWARD_BACKWARD


def provider(name, function, **options):
    return Provider(name, lambda case, device: Prepared(lambda inputs: (function(inputs["x"]),)), **options)


def missing(case, device):
    raise Unavailable("no such package")


def broken(x):
    raise RuntimeError("it broke\nin many lines")


OURS = provider("ours", lambda x: 2 * x, ours=True, subject=True)
PEER = provider("peer", lambda x: (x[:, None] @ torch.full((1, 1), 2.0, device=x.device))[:, 0])
ALL = [
    OURS,
    PEER,
    provider("wrong", lambda x: 3 * x),
    provider("short", lambda x: 2 * x[:-1]),
    provider("no gradient", lambda x: x.detach() + x),
    Provider("missing", missing),
    provider("broken", broken),
    provider("slow", lambda x: 2 * x, slow_start=True),
]


def disagreement(case, inputs, outputs, expected):
    error = relative_error(outputs[0], expected[0])
    return None if error <= 1e-6 else f"relative error {error:.1e}"


def doubling(providers=ALL, modes=(FORWARD, FORWARD_BACKWARD), sizes=(4096,)):
    return Benchmark(
        "doubling",
        lambda device, quick: [Case(f"n{n}", torch.float32, {"n": n}, modes, ("x",)) for n in sizes],
        lambda case, device, generator: {"x": torch.randn(case.sizes["n"], device=device, generator=generator)},
        lambda case, device: providers,
        lambda case, inputs: (2 * inputs["x"].double(),),
        disagreement,
        lambda case, mode: Work(8 * case.sizes["n"], case.sizes["n"]),
    )


BENCHMARK = doubling()
