"""Benchmarks: asv suites, and `ratios`, which compares with hand-written code in one process."""

import os

# Before torch is loaded: threads that wait for each other leave the core to others. A user's choice stays.
# (As the command line has it; here too, because asv imports this with earlier versions of the library.)
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
