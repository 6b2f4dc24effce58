"""What CP's starts and ridges are for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mumoe_tensor as mt


@pytest.mark.parametrize("experts, rank", [((2,), 7), ((3,), 6), ((2, 2), 8)])
def test_cp_with_more_components_than_experts(experts: tuple[int, ...], rank: int) -> None:
    """ALS from singular vectors or random factors stays at some per cent here."""
    for seed in range(3):
        truth = mt.FactorizedTensor.random(
            "cp", experts=experts, in_features=11, out_features=9, rank=rank, seed=seed
        )
        assert mt.decompose(mt.to_dense(truth), "cp", rank, n_restarts=2)[1] < 1e-6


def test_cp_continues_after_a_singular_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorly.decomposition

    parafac = tensorly.decomposition.parafac

    def singular(*arguments: Any, **options: Any) -> Any:
        if options["l2_reg"] < 1e-12:
            raise np.linalg.LinAlgError("Singular matrix")
        return parafac(*arguments, **options)

    monkeypatch.setattr(tensorly.decomposition, "parafac", singular)
    truth = mt.FactorizedTensor.random("cp", experts=4, in_features=7, out_features=6, rank=3, seed=0)
    assert mt.decompose(mt.to_dense(truth), "cp", 3, n_restarts=2)[1] < 1e-6
