"""Compare counted figures with their stored values, so that none changes unnoticed.

    python -m benchmarks.guard [--write]

The figures are the `track_` benchmarks of the quick profile, without those for a GPU. Improved figures must
be stored too, or they could get worse again unnoticed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path

from asv_runner.discovery import disc_benchmarks

from benchmarks.common import PROFILES, VARIABLE, profile
from mumoe_tensor.files import whole_file

STORED = Path(__file__).with_name("stored.json")
RENEW = "python -m benchmarks.guard --write"


def figures(start: str = "") -> dict[str, int]:
    """The figures whose names start with `start`, by name."""
    counted = {}
    for benchmark in disc_benchmarks(str(Path(__file__).parent)):
        if benchmark.type != "track":
            continue
        for k, values in enumerate(product(*benchmark.params)):
            name = f"{benchmark.name}({', '.join(values)})"
            if not name.startswith(start) or "'cuda'" in name:
                continue
            benchmark.set_param_idx(k)
            with redirect_stdout(None):  # asv prints skipped cases
                skipped = benchmark.do_setup()
            if not skipped:
                counted[name] = benchmark.do_run()
    return counted


def changes(stored: Mapping[str, int], current: Mapping[str, int]) -> list[str]:
    """A line for every figure that differs from its stored value."""
    lines = []
    for name in sorted(stored.keys() | current.keys()):
        old, new = stored.get(name), current.get(name)
        if old is None:
            lines.append(f"{name}: {new:,} is not stored")
        elif new is None:
            lines.append(f"{name}: {old:,} is stored, but no benchmark computes it")
        elif new != old:
            lines.append(f"{name}: {'grew' if new > old else 'shrank'} from {old:,} to {new:,}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare or write the figures; the exit status is 1 if a figure differs from its stored value."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="store the current figures")
    write = parser.parse_args(arguments).write
    if profile() is not PROFILES["quick"]:
        parser.error(f"the stored figures are those of the quick profile: unset {VARIABLE}.")
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    current = figures()
    lines = changes(stored, current)
    for line in lines:
        print(line)
    if write:
        with whole_file(STORED) as file:
            file.write((json.dumps(current, indent=1) + "\n").encode())
        print(f"{len(current)} figures are stored in {STORED}")
    elif lines:
        print(f"{len(lines)} figures differ from the stored values. If this is intended: {RENEW}")
    else:
        print(f"{len(current)} figures are equal to the stored values")
    return int(bool(lines) and not write)


if __name__ == "__main__":
    sys.exit(main())
