"""Coefficients on the disk are those of the gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from torch import Tensor, nn  # noqa: E402

from mumoe_tensor.analysis import watch_coefficients  # noqa: E402
from mumoe_tensor.nn import MuMoE  # noqa: E402
from mumoe_tensor.replace import Activations, Coefficients, collect_coefficients  # noqa: E402


def model(**gate: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = MuMoE(6, 6, 12, rank=4, **gate), MuMoE(6, 5, (3, 4), rank=4, **gate), MuMoE(5, 4, (), "dense")
    layers[0].gate.weight.data.normal_()
    layers[1].gate.weight.data.normal_()
    return nn.Sequential(nn.Embedding(32, 6), *layers)


@pytest.mark.parametrize("threshold", [0.0, 0.2])
@pytest.mark.parametrize("gate", ["entmax15", {"name": "relu_topk", "k": 2}, torch.tanh])
def test_rows_are_those_of_the_gates(tmp_path: Path, gate: Any, threshold: float) -> None:
    language = model(gate=gate)
    texts = [torch.randint(32, (n,)) for n in (4, 4, 4, 7, 2)]
    expected: dict[str, list[tuple[Tensor, ...]]] = {}
    with watch_coefficients(language.eval(), lambda name, a: expected.setdefault(name, []).append(a)):
        for text in texts:
            language(text[None])
    store = collect_coefficients(language, texts, tmp_path, threshold=threshold, batch_size=2, shard_rows=20)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert store.gates == {"1.gate": (12,), "2.gate": (3, 4)} and store.threshold == threshold
    for key, level in (("1.gate", 0), ("2.gate", 0), (("2.gate", 1), 1)):
        name = key if isinstance(key, str) else key[0]
        a = torch.cat([coefficients[level] for coefficients in expected[name]])
        a = a.where(a.abs() > threshold, 0)
        rows = store[key]
        assert len(rows) == 21 and rows.num_experts == a.shape[1]
        assert rows.documents.bincount().tolist() == [4, 4, 4, 7, 2]
        assert rows.rows().nnz == int(a.count_nonzero())
        for start, stop in ((0, None), (3, 3), (2, 9), (11, 20), (-4, None), (0, 99)):
            part = rows.rows(start, stop)
            assert part.shape == a[start:stop].shape
            torch.testing.assert_close(torch.from_numpy(part.toarray()), a[start:stop])
    for key in ("3.gate", ("2.gate", 2), "1"):
        with pytest.raises(KeyError, match=r"the gates are .*; got level"):
            store[key]


def test_what_is_refused(tmp_path: Path) -> None:
    language, texts = model(), torch.randint(32, (3, 4))
    collect_coefficients(language, texts, tmp_path / "a")
    with pytest.raises(ValueError, match=r"threshold in .* was 0.0, and is 0.5 now"):
        collect_coefficients(language, texts, tmp_path / "a", threshold=0.5)
    with pytest.raises(ValueError, match="must have an ExpertGate"):
        collect_coefficients(nn.Embedding(32, 6), texts, tmp_path / "b")
    twice: Any = model()
    with pytest.raises(ValueError, match=r"called once .*; '1.gate' is called again"):
        collect_coefficients(nn.Sequential(*twice[:2], twice[1]), texts, tmp_path / "b")
    twice[0].unused = twice[1].gate
    with pytest.raises(ValueError, match=r"called in every forward pass; 0.unused is not"):
        collect_coefficients(nn.Sequential(twice[0], twice[2]), texts, tmp_path / "b")
    del twice[0].unused
    twice[1].gate.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"1.gate/0 must be finite"):
        collect_coefficients(nn.Sequential(*twice[:2]), texts, tmp_path / "b")
    with pytest.raises(ValueError, match=r"must contain activations; its manifest.json says 'coefficients'"):
        Activations(tmp_path / "a")
    assert len(Coefficients(tmp_path / "a")["1.gate"]) == 12
