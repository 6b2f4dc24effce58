"""Benchmarks: asv suites, and `ratios`, which compares with hand-written code in one process."""

import os

# Set before torch is loaded, so that waiting threads yield their core, unless the user chose another policy.
# (As on the command line; repeated here because asv imports this with earlier versions of the library.)
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
