"""Description of the machine, versions and commit of a measurement."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import mumoe_tensor


def environment() -> dict[str, Any]:
    """Machine, its current load, versions and commit; None if not available."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "mumoe_tensor": mumoe_tensor.__version__,
        **{package: version(package) for package in ("numpy", "torch", "tensorly")},
        "commit": _commit(),
    }


def environment_text() -> str:
    """The entries of `environment` as one line."""
    return "; ".join(f"{key} {value}" for key, value in environment().items() if value is not None)


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join([platform.system(), platform.machine(), *(models or [platform.processor()])[:1]])


def _commit() -> str | None:
    """Commit of the checkout with this package, ``-dirty`` if it was changed; None if there is none."""
    folder = Path(mumoe_tensor.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may be in an environment inside the checkout of another project.
        if git("rev-parse", "--show-prefix") != f"{folder.name}/":
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
