"""Small data for all commands, made once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the lines of `commands` read."""
    for package in ("accelerate", "fairlearn", "matplotlib", "plotly", "tensorboardX", "tokenizers", "typer"):
        pytest.importorskip(package)
    from commands import prepare

    folder = tmp_path_factory.mktemp("data")
    prepare(folder)
    return folder
