"""Benchmarks: asv suites, and `ratios`, which compares with hand-written code in one process."""
