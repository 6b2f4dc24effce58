"""The functional core gives the recorded outputs of the published layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mumoe_tensor as mt
from mumoe_tensor.gates import entmax15

torch = pytest.importorskip("torch")

from published import CASES, read  # noqa: E402


def weight(settings: dict[str, Any], tensors: dict[str, Any], prefix: str) -> mt.FactorizedTensor:
    count = len(settings["expert_dims"]) + 2
    factors = [tensors[f"state_dict.{prefix}factors.{k}"] for k in range(count)]
    if settings["format"] == "tucker":
        factors.insert(0, tensors[f"state_dict.{prefix}core"])
    if settings["format"] == "tt":  # published with the outer bonds of size one
        factors = [factors[0][0], *factors[1:-1], factors[-1][..., 0]]
    return mt.FactorizedTensor(settings["format"], factors)


def coefficients(settings: dict[str, Any], tensors: dict[str, Any], training: bool) -> list[Any]:
    actual = []
    for e in range(len(settings["expert_dims"])):
        logits = tensors["x"] @ tensors[f"state_dict.projs.{e}"]
        if settings["normalization"] == "ln":
            mean, variance = logits.mean(-1, keepdim=True), logits.var(-1, keepdim=True, unbiased=False)
        elif training:
            rows = tuple(range(logits.ndim - 1))
            mean, variance = logits.mean(rows), logits.var(rows, unbiased=False)
        else:
            mean, variance = (tensors[f"state_dict.bn.{e}.running_{name}"] for name in ("mean", "var"))
        actual.append(entmax15((logits - mean) / torch.sqrt(variance + 1e-5)))
    return actual


@pytest.mark.parametrize("backend", ["numpy", "pytorch"])
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_core_gives_the_recorded_outputs(path: Path, backend: str) -> None:
    settings, tensors = read(path)
    for name, training in (("y", False), ("y_train", True)):
        a, y = coefficients(settings, tensors, training), tensors["x"]
        prefixes = ["" if settings["version"] == "v1" else "MuMoE."]
        prefixes += ["MuMoE2."] if settings["second_dim"] else []
        for k, prefix in enumerate(prefixes):
            y = y if k == 0 else torch.nn.functional.gelu(y)
            factorized = weight(settings, tensors, prefix)
            if backend == "numpy":
                arrays = [f.numpy() for f in factorized.arrays]
                factorized = mt.FactorizedTensor(settings["format"], arrays)
                mixed = mt.multilinear_moe(
                    factorized, y.numpy(), [c.numpy() for c in a], bias=settings["bias"]
                )
                y = torch.from_numpy(np.ascontiguousarray(mixed))
            else:
                y = mt.multilinear_moe(factorized, y, a, bias=settings["bias"])
        # The published layers give a 2-D input a token axis of size one.
        torch.testing.assert_close(y.reshape(tensors[name].shape), tensors[name], rtol=1e-4, atol=1e-5)


def test_all_recorded_cases_are_here() -> None:
    assert len(CASES) == 32
