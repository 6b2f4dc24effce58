"""Weights and inputs are read from files of every kind, in the order and orientation they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mumoe_tensor.study.weights import read_covariance, read_weight, tensors_of

WRITERS: dict[str, Callable[[Path, dict[str, torch.Tensor]], Any]] = {
    "safetensors": lambda path, tensors: save_file(tensors, path),
    "npz": lambda path, tensors: np.savez(path, **{name: t.numpy() for name, t in tensors.items()}),
    "pt": lambda path, tensors: torch.save(tensors, path),
}


def layers(count: int) -> dict[str, torch.Tensor]:
    return {f"layers.{k}.up.weight": torch.full((5, 3), float(k)) for k in range(count)}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_matrix_and_a_stack(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{kind}"
    WRITERS[kind](path, layers(12) | {"layers.0.up.bias": torch.ones(5)})
    one = read_weight(f"{path}:layers.7.up.weight")
    assert one.shape == (3, 5) and (one == 7).all() and one.dtype == np.float32
    stack = read_weight(f"{path}:layers.*.weight")
    assert stack.shape == (12, 3, 5)
    assert stack[:, 0, 0].tolist() == list(range(12))  # not as text, where 10 comes before 2
    assert read_weight(f"{path}:layers.7.up.weight", True).shape == (5, 3)


def test_a_folder_of_shards_and_a_single_array(tmp_path: Path) -> None:
    tensors = layers(4)
    for k, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor.to(torch.bfloat16)}, tmp_path / f"{3 - k}.safetensors")
    assert read_weight(f"{tmp_path}:*.up.weight")[:, 0, 0].tolist() == [0, 1, 2, 3]
    np.save(tmp_path / "one.npy", np.arange(6.0).reshape(2, 3))
    assert read_weight(str(tmp_path / "one.npy")).tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("shape", [(40, 3), (5, 8, 3)])
def test_the_covariance_is_the_mean_over_all_rows(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mumoe_tensor.study.weights.CHUNK", 7)
    x = np.random.default_rng(0).normal(size=shape) + 3
    np.savez(tmp_path / "x.npz", a=x[: len(x) // 2], b=x[len(x) // 2 :])
    rows = x.reshape(-1, 3)
    expected = rows.T @ rows / len(rows)
    np.testing.assert_allclose(read_covariance(str(tmp_path / "x.npz"), 3), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="must have the 4 features of the weight; a has shape"):
        read_covariance(str(tmp_path / "x.npz"), 4)


def test_what_is_no_weight_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(3, 2), "c": torch.ones(4), "d": torch.ones(2, 2).int()}
    tensors |= {"empty": torch.ones(0, 3), "zero": torch.zeros(2, 3)}
    save_file(tensors, path)
    for name, message in (
        ("c", r"matrix of floats, or a stack of them, and not empty; c is torch.float32 .* as FILE:NAME\."),
        ("d", "d is torch.int32"),
        ("empty", r"not empty; empty is torch.float32 of shape \(0, 3\)"),
        ("zero", "a weight must be finite and not all zero"),
        ("[ab]", r"must have the same shape, got .*\. Select tensors by name, as FILE:NAME\."),
        ("x*", r"must have a tensor 'x\*'; it has 6: a, b, c, d, empty, zero\."),
    ):
        with pytest.raises(ValueError, match=message):
            read_weight(f"{path}:{name}")
    for value, message in ((np.inf, "must be finite and not all"), (0.0, "must be finite and not all")):
        np.save(tmp_path / f"{value}.npy", np.full((3, 2), value))
        with pytest.raises(ValueError, match=message):
            read_covariance(f"{tmp_path}/{value}.npy", 2)
    with pytest.raises(ValueError, match="a weight must be finite"):
        read_weight(f"{tmp_path}/inf.npy")
    save_file({"a": torch.ones(2, 3)}, tmp_path / "n.safetensors")
    with pytest.raises(ValueError, match=r"files of a folder must .* has a twice"):
        read_weight(f"{tmp_path}:a")
    (tmp_path / "x.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"x\.npy: "):
        read_weight(str(tmp_path / "x.npy"))
    with pytest.raises(FileNotFoundError):
        read_weight(f"{tmp_path}/none.safetensors:a")


def test_names_without_a_pattern_are_all(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a2=np.ones(1), a10=np.ones(1))
    assert [name for name, _ in tensors_of(str(tmp_path / "x.npz"))] == ["a2", "a10"]
