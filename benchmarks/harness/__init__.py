"""What a `bench_<op>.py` builds on: cases, providers, floors and the agreement that earns a time."""

from .agreement import relative_error
from .cases import Benchmark, Case, Inputs, Prepared, Provider, Unavailable, Work, own_providers

__all__ = [
    "Benchmark",
    "Case",
    "Inputs",
    "Prepared",
    "Provider",
    "Unavailable",
    "Work",
    "own_providers",
    "relative_error",
]
