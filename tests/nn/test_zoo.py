"""Models from other libraries take layers of experts; `make zoo` does more, and writes a page of the docs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import zoo


def test_all_models_are_replaced_and_loaded_in_another_process(transformers: Any, tmp_path: Path) -> None:
    for package in ("timm", "safetensors"):
        pytest.importorskip(package)
    _, errors = zoo.examine_all(tmp_path)
    assert not errors, "\n".join(errors)
    command = [sys.executable, zoo.__file__, "load", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_the_page_is_of_these_models() -> None:
    lines = zoo.PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ")[:3] for line in lines if line.startswith("| t")]
    replaced = [model for model in zoo.MODELS if model.is_replaced]
    assert rows == [f"| {zoo.title(model)} | {zoo.calls_of(model)}".split(" | ") for model in replaced]
    refused = [line.split(": ")[0] for line in lines if line.startswith("- ")]
    expected = [f"- {zoo.title(model)}, `{x}`" for model in zoo.MODELS for x in model.refused]
    assert refused == expected and zoo.INTRODUCTION in "\n".join(lines)
