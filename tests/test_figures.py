"""Every figure prints its numbers, writes them, and draws what they say."""

from __future__ import annotations

import csv
import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("entmax")
pytest.importorskip("typer")

import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

import mumoe_tensor as mt
from mumoe_tensor.nn.size import num_parameters
from paper_figures import contractions, memory_and_latency, svd_tolerance
from paper_figures.__main__ import app
from paper_figures.common import (
    FIGURES,
    MATCHED_AT,
    as_text,
    load,
    matched_layers,
    pretrained,
    write,
)
from paper_figures.experiments import compression, mixture


@pytest.mark.parametrize("name", FIGURES)
def test_figure(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written, its rows come back from the file, and its picture is not empty."""
    module = load(name)
    # (Processes that measure memory import torch, which takes seconds.)
    monkeypatch.setattr(memory_and_latency, "in_fresh_process", lambda *_: 2**25)
    assert "Settings:" in module.__doc__
    rows = module.rows(True)
    drawn: list[Figure] = []
    draw = module.draw
    monkeypatch.setattr(module, "draw", lambda rows: drawn.append(draw(rows)) or drawn[-1])
    paths = write(module, rows, tmp_path)
    assert [p.suffix for p in paths] == [".csv", ".png", ".pdf"] and all(p.stat().st_size for p in paths)
    with open(paths[0], newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows] == read
    assert json.loads(json.dumps(rows)) == rows
    assert name in as_text(module, rows) and next(iter(rows[0])) in as_text(module, rows)
    (figure,) = drawn
    assert figure.axes and all(ax.lines or ax.patches or ax.images or ax.collections for ax in figure.axes)


def by_name(name: str) -> dict[str, list[dict[str, Any]]]:
    actual: dict[str, list[dict[str, Any]]] = {}
    for row in load(name).rows(True):
        actual.setdefault(row["name"], []).append(row)
    return actual


# ---- what the figures say ---------------------------------------------------------------------------------


def test_parameters_are_matched_where_they_should_be() -> None:
    linear = mt.dense_parameters(768, 768)
    for layer in matched_layers().values():
        assert layer.experts == (MATCHED_AT,)
        if layer.rank:
            assert linear <= mt.cost(layer, gate=True).parameters < 1.02 * linear
    rows = by_name("parameters_over_experts")
    assert rows["dense moe"][-1]["experts"] == 2**17
    assert rows["dense moe"][-1]["parameters"] == 2**17 * (769 * 768 + 768)


def test_flops_of_the_forward_pass() -> None:
    rows = by_name("flops_over_experts")
    assert rows["linear"][0]["flops"] == 2 * 768 * 768
    for name in ("cp", "tr"):
        assert rows[name][0]["flops"] < 2 * rows["linear"][0]["flops"] < rows["dense moe"][-1]["flops"]
    for row in by_name("naive_and_planned").values():
        assert row[0]["ratio"] == row[0]["naive"] / row[0]["planned"] > 10


def test_numerical_ranks_are_the_bounds() -> None:
    actual = by_name("expert_rank")
    for rows in actual.values():
        assert all(row["numerical_rank"] == row["max_expert_rank"] for row in rows)
    rank = {name: rows[-1]["max_expert_rank"] for name, rows in actual.items()}
    assert rank["tr"] > rank["cp"]


def test_levels_have_equal_numbers_of_experts() -> None:
    for row in load("levels").rows(False):
        modes = [int(n) for n in row["modes"].split("x")]
        assert np.prod(modes) == row["experts"] and len(modes) == row["levels"]
        assert row["gate_parameters"] == 768 * sum(modes)


def test_published_networks_have_their_parameters() -> None:
    # Counted by hand from the published configurations.
    totals = {
        ("CLIP ViT-B/32 head", "dense", None): 769_000,
        ("CLIP ViT-B/32 head", "CP", 16): 769_128,
        ("CLIP ViT-B/32 head", "CP", 512): 769_581,
        ("CLIP ViT-B/32 head", "Tensor Ring", 16): 769_676,
        ("CLIP ViT-B/32 head", "Tensor Ring", 256): 773_860,
        ("MLP-Mixer S-16", "dense", None): 18_528_264,
        ("MLP-Mixer S-16", "CP", 64): 18_630_616,
        ("MLP-Mixer S-16", "Tensor Ring", 64): 18_290_792,
        ("GPT-2 124M", "dense", None): 124_373_760,
        ("GPT-2 124M", "CP", 64): 124_487_976,
        ("GPT-2 124M", "CP", 256): 124_789_536,
        ("GPT-2 124M", "Tensor Ring", 64): 124_790_880,
        ("GPT-2 124M", "Tensor Ring", 256): 125_159_136,
        ("CelebA head", "dense", None): 30_760,
        ("CelebA head", "CP", 128): 578_048,
        ("CelebA head, 768 → 1024 → 40", "dense", None): 827_392,
    }
    rows = load("published_configurations").rows(False)
    actual = {(row["network"], row["layer"], row["experts"]): row["parameters"] for row in rows}
    assert {key: actual[key] for key in totals} == totals
    # 12 blocks of 256 experts.
    assert round(max(row["dense_experts"] or 0 for row in rows), -8) == 14_500_000_000


def test_truncated_svds_have_the_error_of_the_rebuilt_matrix() -> None:
    rows = svd_tolerance.rows(False)
    weight = pretrained()[1]
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    for row in (row for row in rows if row["layer"] == "7"):
        kept = row["kept"]
        rest = weight - (u[:, :kept] * s[:kept]) @ vt[:kept]
        assert row["relative_error"] == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(weight), abs=1e-7)
        assert row["energy"] == pytest.approx(1 - row["relative_error"] ** 2)
    half = {row["layer"]: row["relative_error"] for row in rows if row["share_kept"] == 0.5}
    assert all(half[block] < half["normal"] for block in svd_tolerance.BLOCKS)


def test_networks_without_small_singular_values(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [
        {"seed": seed, "share": share, "layers": 4, "loss": 3 - share - seed, "accuracy": share / 2}
        for seed in (0, 1)
        for share in (0.0, 0.5, 1.0)
    ]
    monkeypatch.setattr(svd_tolerance, "table", lambda name: measured if name == "gpt2_svd" else [])
    rows = svd_tolerance.rows(True)
    assert [(row["share_kept"], row["value"]) for row in rows if row["layer"] == "gpt2"] == [
        (0.0, 2.5), (0.5, 2.0), (1.0, 1.5),
    ]  # fmt: skip
    assert not any(row["layer"] == "mixer" for row in rows)
    figure = svd_tolerance.draw(rows)
    assert len(figure.axes) == 2 and list(figure.axes[1].lines[0].get_ydata()) == [2.5, 2.0, 1.5]
    monkeypatch.setattr(svd_tolerance, "table", lambda name: measured)
    (last,) = [row for row in svd_tolerance.rows(True) if row["layer"] == "mixer" and row["share_kept"] == 1]
    assert last["value"] == last["value_low"] == 50.0


def test_every_product_is_in_the_picture_of_its_contraction() -> None:
    rows = contractions.rows(False)
    figure = contractions.draw(rows)
    for ax, (name, plan) in zip(figure.axes, contractions.plans().items(), strict=True):
        drawn = {number for text in ax.texts for number in text.get_text().split() if number.isdigit()}
        assert drawn == {str(row["step"]) for row in rows if row["name"] == name}
        assert f"{plan.flops:,} FLOPs" == ax.get_xlabel()
        factors = [line for line in ax.lines if line.get_marker() == "o" and line.get_markersize() > 10]
        assert len(factors) == plan.program.network.weights


def test_layers_that_are_measured_are_what_they_are_called() -> None:
    sizes = dict(features=24, experts=6)
    x, linear = torch.randn(5, 24), 25 * 24
    for name in memory_and_latency.NAMES:
        module = memory_and_latency.module_of(name, 5, **sizes)
        count = num_parameters(module)
        if name.endswith("moe"):
            assert count == 6 * (linear + 24)
        elif name != "hadamard":
            assert linear <= count < 1.2 * linear
        assert module(x).shape == (5, 24)
        if name != "linear":
            (coefficients,) = module.gate(x)
            assert torch.count_nonzero(coefficients[0] - coefficients[1])


# ---- the command ------------------------------------------------------------------------------------------


def invoke(line: str) -> Any:
    return CliRunner().invoke(app, shlex.split(line))


def test_command_draws_the_named_figures(tmp_path: Path) -> None:
    result = invoke(f"levels loss_curves --quick --out {tmp_path}")
    assert result.exit_code == 0 and result.stderr == ""
    expected = [f"{name}.{kind}" for name in ("levels", "loss_curves") for kind in ("csv", "pdf", "png")]
    assert sorted(p.name for p in tmp_path.iterdir()) == expected
    assert "levels: Cost of one" in result.stdout and f"{tmp_path}/loss_curves.pdf" in result.stdout


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    result = invoke(f"levels --out {tmp_path / 'file'}")
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text() == "here first"


def test_unknown_figure_is_one_line(tmp_path: Path) -> None:
    result = invoke(f"levels nothing --out {tmp_path / 'out'}")
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "a figure must be one of" in result.stderr and "'nothing'" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_weighting_by_inputs_never_hurts_the_outputs() -> None:
    rows = load("structured_error").rows(quick=True)
    errors = {(row["network"], row["format"], row["rank"], row["fit"]): row for row in rows}
    for *place, _ in errors:
        plain, weighted = (errors[(*place, kind)] for kind in ("plain", "weighted"))
        assert weighted["output_error"] <= plain["output_error"] < 1
        assert plain["weight_error"] <= weighted["weight_error"] + 0.02
    for one, other in pairwise(rows[::2]):
        if (one["network"], one["format"]) == (other["network"], other["format"]):
            assert one["share"] < other["share"] and one["weight_error"] > other["weight_error"]


def test_the_experiment_of_structured_formats_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """On a small layer; inputs are read where they enter it, and a Kronecker product is recovered."""
    layer = torch.nn.Conv2d(6, 8, 1)
    x = torch.randn(5, 6, 3, 3)
    covariance = compression.inputs_of(layer, lambda: [layer(batch) for batch in x.split(2)])
    pixels = x.movedim(1, -1).reshape(-1, 6).double()
    np.testing.assert_allclose(covariance, pixels.T @ pixels / len(pixels))
    matrix = np.kron(*(np.random.default_rng(k).standard_normal((2 + k, 2 + 2 * k)) for k in (0, 1)))
    rows = compression.measure("network", matrix, covariance, shares=(0.5,))
    assert {row["format"] for row in rows} >= {"lowrank", "kron", "tucker-matrix"}
    assert all(row["weight_error"] < 1e-6 for row in rows if row["format"] == "kron")
    assert all(row["share"] <= 0.5 for row in rows if row["format"] != "monarch")
    assert "kron" in capsys.readouterr().out


def test_the_experiment_of_a_compressed_mixture_runs(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a text of its own; what saves little changes little."""
    monkeypatch.setattr(mixture, "FORMATS", {"low rank": "lowrank", "shared + CP": "shared-expert"})
    monkeypatch.setattr(mixture, "CONTEXT", 32)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    monkeypatch.setattr(mixture, "SIZES", {**mixture.SIZES, **sizes})
    for name in ("a", "b", "poems", "z"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: the quick brown fox jumps over the lazy dog.\n" * 40)
    trained, held = mixture.text_of(tmp_path)
    assert bytes(held.tolist()).startswith(b"z: the") and b"poems" not in bytes(trained.tolist())
    model = mixture.train(trained, 0, steps=3)
    parts = mixture.windows(trained, 4, 1), mixture.windows(held, 4)
    dense, *rows = mixture.measure(model, *parts, saved=(0.3, 0.9))
    assert 1 < dense["perplexity"] < 300
    assert [(row["format"], row["fit"], row["asked"]) for row in rows] == [
        ("low rank", fit, asked) for asked in (0.3, 0.9) for fit in ("plain", "weighted")
    ] + [("shared + CP", fit, 0.3) for fit in ("plain", "weighted")]  # one matrix for all is over 10 %
    for row in rows:
        assert row["saved"] >= row["asked"]
        if row["asked"] < 0.5:
            assert row["perplexity"] == pytest.approx(dense["perplexity"], rel=0.02)
