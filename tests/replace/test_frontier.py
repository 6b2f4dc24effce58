"""A grid of replacements of a small Llama, as rows of a table."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from mumoe_tensor.browser import PageConfig, browse  # noqa: E402
from mumoe_tensor.nn import load  # noqa: E402
from mumoe_tensor.replace import (  # noqa: E402
    Activations,
    Replaced,
    evaluate,
    fit,
    frontier,
)
from mumoe_tensor.replace.frontier import run_grid  # noqa: E402
from mumoe_tensor.replace.grid import Arm, Grid, Place  # noqa: E402
from mumoe_tensor.replace.language import read_texts, windows, write_texts  # noqa: E402
from mumoe_tensor.replace.place import load_in_place  # noqa: E402
from mumoe_tensor.training import TrainConfig  # noqa: E402

MODULE = "model.layers.1.mlp"
PARTS = ("training", "validation", "test")
PLACES = (Place(MODULE, (2,), (1,)),)
ARMS = {
    "transcoder": Arm("Transcoder", {"skip": True}, learning_rates=(0.01, 0.001)),
    "MxD": Arm("MixtureOfDecoders"),
    "random": Arm("MixtureOfDecoders", {"experts": 8}, gate="random", parameters=None),
    "centres": Arm("MixtureOfDecoders", {"experts": 8}, gate="nearest_centres", parameters=None),
    "no experts": Arm("MixtureOfDecoders", {"experts": []}, parameters=None),
    "MOLT": Arm("MixtureOfTransforms", {"ranks": [4, 2, 2]}, penalties=(0.0, 10.0)),
}
GRID = Grid(
    (Place(MODULE, (2, 4), (1, 2)),), ARMS, context=8, tuned_at=2,
    train=TrainConfig(epochs=1, batch_size=16, keep="last"),
)  # fmt: skip


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Texts of three parts."""
    generator = torch.Generator().manual_seed(2)
    for number, part in enumerate(PARTS):
        texts = [
            " ".join(f"w{i}" for i in torch.randint(64, (17,), generator=generator).tolist())
            for _ in range(8 if number == 0 else 3)
        ]
        write_texts(tmp_path / f"{part}.jsonl", texts)
    return [tmp_path / f"{part}.jsonl" for part in PARTS]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Of every training, the sum of the parameters, numbers of rows, the seed and the settings."""
    seen: list[tuple[Any, ...]] = []

    def recorded(layer: Any, rows: Any, config: Any, *, validation: Any, penalty: float, folder: Any) -> Any:
        start = sum(parameter.sum().item() for parameter in layer.parameters())
        seen.append((start, len(rows), len(validation), config.seed, config.learning_rate, penalty))
        return fit(layer, rows, config, validation=validation, penalty=penalty, folder=folder)

    monkeypatch.setattr("mumoe_tensor.replace.frontier.fit", recorded)
    return seen


def test_every_layer_of_a_grid_has_a_row_once(saved_llama: Path, paths: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = run_grid(saved_llama, paths, GRID, out)
    with_k = [name for name, arm in ARMS.items() if arm.has_k]
    assert sorted((row["arm"], row["k"], row["seed"]) for row in rows) == sorted(
        [(name, k, seed) for name in with_k for k, seed in ((2, 0), (4, 0), (4, 1))]
        + [("no experts", 0, 0), ("MOLT", 2, 0)]
    )
    # One that was interrupted goes on with what is left, and needs no activations for what is there.
    table = (out / "frontier.csv").read_text().splitlines()
    (out / "frontier.csv").write_text("\n".join(table[:-1]) + "\n")
    shutil_free = {path for path in out.rglob("*") if path.is_file()}
    again = run_grid(saved_llama, paths, GRID, out)
    assert [row["run"] for row in again] == [row["run"] for row in rows]
    for one, other in zip(rows, again, strict=True):
        assert all(one[name] == pytest.approx(other[name]) for name in one if name != "seconds")
    assert {path for path in out.rglob("*") if path.is_file()} == shutil_free


def test_rows_are_of_the_layers_that_are_saved(
    saved_llama: Path, paths: list[Path], tmp_path: Path, fits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mumoe_tensor.replace.language import load_language_model

    monkeypatch.chdir(tmp_path.parent)  # paths may be relative to the folder that the command runs in
    paths = [path.relative_to(tmp_path.parent) for path in paths]
    saved_llama = Path(os.path.relpath(saved_llama, tmp_path.parent))
    # (So that the block keeps half of the rows.)
    grid = replace(GRID, arms={"MxD": ARMS["MxD"]}, places=(Place(MODULE, (2,), (1,)),), massive=1.0)
    (row,) = run_grid(saved_llama, paths, grid, tmp_path / "out")
    (folder,) = (tmp_path / "out" / "layers").iterdir()
    model, tokenizer = load_language_model(saved_llama)
    tokens, documents = windows(read_texts(paths[2]), tokenizer, 8)
    parts = [Activations(tmp_path / "out" / "activations" / part)[MODULE] for part in PARTS[:2]]
    limit = parts[0].median_norm
    counts = [len(part.below(limit)) for part in parts]
    assert [each[1:] for each in fits] == [(*counts, 0, row["learning_rate"], row["penalty"])] and counts[
        0
    ] < len(parts[0])
    assert load_in_place(folder)[1].limit == limit
    result = evaluate(model, MODULE, load(folder), tokens, limit=limit)
    assert row["ce"] == pytest.approx(result.ce) and row["nmse"] == pytest.approx(result.nmse)
    assert row["rise"] == pytest.approx(result.ce - result.ce_intact)
    assert row["rise_zeroed"] == pytest.approx(result.ce_zeroed - result.ce_intact)
    # Two windows of one document are one unit of the interval.
    assert len(documents) == 2 * len(set(documents))
    assert row["half"] == pytest.approx(result.of_documents(documents).interval()[1])
    block = model.get_submodule(MODULE)
    assert row["parameters"] == pytest.approx(2 * sum(p.numel() for p in block.parameters()), rel=0.02)
    limits = []

    def replaced(*arguments: Any) -> Any:
        limits.append(arguments[2])
        return Replaced(*arguments)

    monkeypatch.setattr("mumoe_tensor.browser.run.Replaced", replaced)
    monkeypatch.chdir(tmp_path)
    (folder,) = Path("out", "layers").iterdir()
    html = browse(folder, PageConfig(shown=2, removed=1))
    assert limits == [limit]
    assert f"MixtureOfDecoders in place of {MODULE}" in html and "Texts: test.jsonl." in html
    assert "Texts: training.jsonl." in browse(
        folder, PageConfig(texts=tmp_path / "training.jsonl", rows=1, shown=2, removed=0)
    )


def test_settings_of_the_lowest_validation_error_are_taken(
    saved_llama: Path, paths: list[Path], tmp_path: Path, fits: list[Any]
) -> None:
    arms = {name: ARMS[name] for name in ("transcoder", "MOLT")}
    grid = replace(GRID, arms=arms, places=(Place(MODULE, (2,), (1,)),))
    rows = run_grid(saved_llama, paths, grid, tmp_path / "out")
    from mumoe_tensor.ledger import Ledger
    from mumoe_tensor.replace.grid import TUNING

    tuning = list(Ledger(tmp_path / "out" / "tuning.csv", TUNING))
    assert [row["learning_rate"] for row in tuning if row["arm"] == "transcoder"] == [0.01, 0.001]
    settings = [(row["seed"], row["learning_rate"], row["penalty"]) for row in (*tuning, *rows)]
    assert [each[3:] for each in fits] == settings
    for row in rows:
        tried = [other for other in tuning if other["arm"] == row["arm"]]
        sparse = [other for other in tried if other["active"] <= grid.tuned_at]
        best = min(sparse or tried, key=lambda other: other["nmse" if sparse else "active"])
        assert (row["learning_rate"], row["penalty"]) == (best["learning_rate"], best["penalty"])


def test_another_grid_in_the_folder_is_refused_and_a_larger_one_taken(
    saved_llama: Path, paths: list[Path], tmp_path: Path, fits: list[Any]
) -> None:
    arms = {"no experts": ARMS["no experts"]}
    grid = replace(GRID, arms=arms, places=(Place(MODULE, (2,), (1,)),))
    run_grid(saved_llama, paths, grid, tmp_path / "out")
    with pytest.raises(ValueError, match="context differ"):
        run_grid(saved_llama, paths, replace(grid, context=4), tmp_path / "out")
    changed = {"no experts": Arm("MixtureOfDecoders", {"experts": []}, parameters="2x")}
    with pytest.raises(ValueError, match="no experts differ"):
        run_grid(saved_llama, paths, replace(grid, arms=changed), tmp_path / "out")
    more = replace(grid, arms=arms | {"random": ARMS["random"]})
    assert [row["arm"] for row in run_grid(saved_llama, paths, more, tmp_path / "out")] == [
        "no experts",
        "random",
    ]
    # An arm that a call leaves out is not forgotten, and places may come while the activations are there.
    run_grid(saved_llama, paths, replace(grid, arms={"random": ARMS["random"]}), tmp_path / "out")
    with pytest.raises(ValueError, match="no experts differ"):
        run_grid(saved_llama, paths, replace(grid, arms=changed), tmp_path / "out")
    first = "model.layers.0.mlp"
    places = (Place(MODULE, (2,), (2,)), Place(first, (2,), (1,)))
    rows = run_grid(saved_llama, paths, replace(grid, places=places), tmp_path / "out")
    assert [row["module"] for row in rows] == [MODULE, MODULE, first, MODULE]
    # Seeds draw the layers; bounds and limits are those of the row's module.
    first_seed, *_, of_another_place, second_seed = (start for start, *_ in fits)
    assert first_seed == of_another_place != second_seed
    zeroed = [row["rise_zeroed"] for row in rows]
    assert zeroed == pytest.approx([zeroed[0], zeroed[0], zeroed[2], zeroed[0]]) and zeroed[0] != zeroed[2]
    store = Activations(tmp_path / "out" / "activations" / "training")
    for row in rows:
        place = load_in_place(tmp_path / "out" / "layers" / row["run"])[1]
        assert (place.module, place.limit) == (row["module"], 5 * store[row["module"]].median_norm)


def test_an_arm_without_a_row_may_change(
    saved_llama: Path, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    grid = replace(GRID, arms={"a": ARMS["MxD"]}, places=PLACES)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("mumoe_tensor.replace.frontier.evaluate", interrupted)
        run_grid(saved_llama, paths, grid, tmp_path / "out")
    assert list((tmp_path / "out" / "runs").glob("*/checkpoints/*"))
    grid = replace(grid, arms={"a": Arm("MixtureOfDecoders", learning_rates=(0.02,))})
    (row,) = run_grid(saved_llama, paths, grid, tmp_path / "out")
    (same,) = run_grid(saved_llama, paths, grid, tmp_path / "afresh")
    assert row["learning_rate"] == 0.02 and row["nmse"] == pytest.approx(same["nmse"])


def test_a_run_without_a_finite_loss_is_named(saved_llama: Path, paths: list[Path], tmp_path: Path) -> None:
    grid = replace(GRID, arms={"a": Arm("MixtureOfDecoders", learning_rates=(1e30,))}, places=PLACES)
    with pytest.raises(FloatingPointError, match=r"layers.1.mlp a K=2 seed=0: the loss must be"):
        run_grid(saved_llama, paths, grid, tmp_path / "out")
    with pytest.raises(ValueError, match=r"must be the folder of one layer; choose one in .*layers"):
        browse(tmp_path / "out")


def test_a_learning_rate_that_diverges_is_not_chosen(
    saved_llama: Path, paths: list[Path], tmp_path: Path
) -> None:
    grid = replace(GRID, arms={"a": Arm("MixtureOfDecoders", learning_rates=(1e30, 0.01))}, places=PLACES)
    (row,) = run_grid(saved_llama, paths, grid, tmp_path / "out")
    assert row["learning_rate"] == 0.01
    assert "inf" in (tmp_path / "out" / "tuning.csv").read_text()
    # An interrupted grid reads the infinite error again.
    assert run_grid(saved_llama, paths, grid, tmp_path / "out") == [row]
    grid = replace(GRID, arms={"a": Arm("MixtureOfDecoders", learning_rates=(1e30, 1e29))}, places=PLACES)
    with pytest.raises(FloatingPointError, match=r"a diverges with every learning rate of the grid\."):
        run_grid(saved_llama, paths, grid, tmp_path / "worse")


def test_a_module_that_is_not_there_is_named(saved_llama: Path, paths: list[Path], tmp_path: Path) -> None:
    grid = replace(GRID, places=(Place("model.layers.9.mlp", (2,), (1,)),))
    with pytest.raises(ValueError, match=r"such as \['model.layers.0.mlp'"):
        run_grid(saved_llama, paths, grid, tmp_path / "out")


def test_processes_do_not_change_the_rows(
    saved_llama: Path, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # (In this process, as starting others takes seconds; what they get is pickled nevertheless.)
    monkeypatch.setattr(frontier, "side_by_side", lambda calls, _: enumerate(call() for call in calls))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    grid = replace(GRID, arms={"MxD": ARMS["MxD"]}, places=(Place(MODULE, (2,), (2,)),))
    rows = [
        sorted(run_grid(saved_llama, paths, grid, tmp_path / f"{n}", jobs=n), key=lambda row: row["run"])
        for n in (1, 2)
    ]
    for one, other in zip(*rows, strict=True):
        assert all(one[name] == pytest.approx(other[name]) for name in one if name != "seconds")


def test_one_test_document_has_no_interval(saved_llama: Path, paths: list[Path], tmp_path: Path) -> None:
    write_texts(paths[2], read_texts(paths[2])[:1])
    with pytest.raises(ValueError, match="at least two with 8 tokens"):
        run_grid(saved_llama, paths, GRID, tmp_path / "out")
    with pytest.raises(ValueError, match="paths for training, validation, test, got 2"):
        run_grid(saved_llama, paths[:2], GRID, tmp_path / "out")
