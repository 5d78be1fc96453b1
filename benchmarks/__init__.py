"""Benchmarks: one `bench_<op>.py` an op over `harness/`; `python -m benchmarks` or `bridge-stg bench` runs them."""
