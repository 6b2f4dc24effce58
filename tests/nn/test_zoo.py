"""Models from other libraries take layers of experts; `make zoo` does more, and writes a page of the docs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import zoo


def test_all_models_are_replaced_saved_and_loaded(transformers: Any, tmp_path: Path) -> None:
    for package in ("timm", "safetensors"):
        pytest.importorskip(package)
    _, errors = zoo.examine_all(tmp_path)
    errors += zoo.load_all(tmp_path)
    assert not errors, "\n".join(errors)


def test_the_page_is_of_these_models() -> None:
    lines = zoo.PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ")[:3] for line in lines if line.startswith("| t")]
    replaced = [model for model in zoo.MODELS if model.is_replaced]
    assert rows == [f"| {zoo.title(model)} | {zoo.calls_of(model)}".split(" | ") for model in replaced]
    refused = [line.split(": ")[0] for line in lines if line.startswith("- ")]
    expected = [f"- {zoo.title(model)}, `{x}`" for model in zoo.MODELS for x in model.refused]
    assert refused == expected and zoo.INTRODUCTION in "\n".join(lines)
