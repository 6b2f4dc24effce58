"""The experiment with bias correction, on a small population in which a subpopulation is got wrong."""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("fairlearn")
pytest.importorskip("typer")

import torch
from typer.testing import CliRunner

from mumoe_tensor.analysis import edit_bias, fairness, mean_coefficients
from mumoe_tensor.cli import app
from mumoe_tensor.configs.bias import RECIPES, Recipe
from mumoe_tensor.experiments import bias
from mumoe_tensor.experiments.bias import CORRECTIONS, METHODS, METRICS, MODELS, Experiment
from mumoe_tensor.interval import interval
from mumoe_tensor.nn.weights import read_weights
from mumoe_tensor.training import attributes
from mumoe_tensor.training.attributes import Population, Task, read_adult, read_celeba

RECIPE = Recipe(
    epochs=8, batch_size=256, seeds=2, experts=8, rank=16, hidden=8, learning_rates=(0.01, 0.03),
    repetitions=(4, 16), alphas=(0.1,), strengths=(0.0, 1.0, 2.0, 4.0, 6.0),
)  # fmt: skip


def population(rows: int, seed: int, label: int = 1) -> Population:
    """The label shows weakly; in group 1 it is rare, so a model goes by the group."""
    draw = torch.Generator().manual_seed(seed)
    group = (torch.rand(rows, generator=draw) < 0.5).long()
    y = (torch.rand(rows, generator=draw) < torch.where(group == 1, 0.04, 0.5)).long()
    y = y if label else 1 - y
    x = torch.randn(rows, 4, generator=draw)
    x[:, 0] += 1.5 * (2 * y - 1)
    x[:, 1] = 2 * group - 1.0
    return Population(x, y[:, None], group)


def task_of(label: int = 1) -> Task:
    parts = (population(rows, seed, label) for seed, rows in enumerate((3000, 1500, 1500)))
    return Task("planted", *parts, 0, (label, 1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    experiment = Experiment(task_of(), RECIPE, tmp_path_factory.mktemp("bias"))
    with pytest.raises(ValueError, match="validation must be finished"):
        experiment.test()
    experiment.validate()
    assert experiment.rows("test") == []
    experiment.test()
    return experiment


# ---- what comes out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_edit_lifts_the_subpopulation(finished: Experiment, split: str) -> None:
    rows = finished.rows(split)
    actual = {row["method"]: row for row in bias.summary(rows)}
    assert list(actual) == list(METHODS)
    assert actual["edit"]["target"] > actual["mumoe"]["target"] + 0.1
    assert actual["edit"]["worst"] > actual["mumoe"]["worst"] + 0.1
    assert actual["edit"]["deviation"] < actual["mumoe"]["deviation"]
    members = int(finished.task.members(getattr(finished.task, split)).sum())
    assert {row["members"] for row in rows} == {members}
    p = actual["edit"]["target"]
    assert actual["edit"]["target_sampling"] == pytest.approx(1.96 * sqrt(p * (1 - p) / members))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_strength_zero_changes_nothing(finished: Experiment, split: str) -> None:
    rows = finished.rows(split)
    for seed in range(2):
        for name, corrected in CORRECTIONS.items():
            (zero,) = (r for r in rows if (r["method"], r["seed"], r["value"]) == (name, seed, 0))
            (model,) = (r for r in rows if (r["method"], r["seed"]) == (corrected, seed))
            # Of what is not chosen, curves have the accuracies alone.
            names = METRICS if zero["chosen"] else METRICS[:3]
            assert [zero[m] for m in names] == [model[m] for m in names]


def test_curves_have_the_figures_of_fairness(finished: Experiment) -> None:
    for split in ("validation", "test"):
        part = getattr(finished.task, split)
        logits = torch.randn(len(part), 1, generator=torch.Generator().manual_seed(0))
        actual = bias.rates(finished.task, part, logits)
        right = fairness((logits[:, 0] > 0).long(), part.y[:, 0], part.group, finished.task.target)
        assert actual == pytest.approx({name: getattr(right, name) for name in METRICS[:3]})
    chosen = [row for row in finished.rows("test") if row["chosen"]]
    assert all(row[name] == row[name] for row in chosen for name in METRICS)


def test_settings_are_chosen_on_validation_rows(finished: Experiment) -> None:
    chosen = {
        split: {(r["method"], r["seed"]): r["value"] for r in finished.rows(split) if r["chosen"]}
        for split in ("validation", "test")
    }
    assert chosen["validation"] == chosen["test"]
    assert set(chosen["test"]) == {(method, seed) for method in METHODS for seed in range(2)}
    for (method, seed), value in chosen["test"].items():
        rows = finished.ledger.of(method=method, seed=seed, split="validation")
        if method in CORRECTIONS:
            assert len(rows) == len(RECIPE.strengths)
            assert max(r["worst"] for r in rows) == next(r["worst"] for r in rows if r["value"] == value)
        else:
            tried = finished.ledger.of(method=method, split="tuning")
            assert value in {r["value"] for r in tried}
            if method in bias.ARCHITECTURES:
                assert min(r["loss"] for r in tried) == next(r["loss"] for r in tried if r["value"] == value)


def test_test_rows_are_those_of_the_test_part(finished: Experiment) -> None:
    """The figures of a kept model, counted by hand."""
    (path,) = finished.folder.glob("models/*mumoe-1.safetensors")
    model = bias.build("mumoe", 4, 1, RECIPE).eval()
    model.load_state_dict(read_weights(path))
    rows = finished.task.test
    with torch.no_grad():
        right = (model(rows.x)[:, 0] > 0).long() == rows.y[:, 0]
    (row,) = finished.ledger.of(method="mumoe", seed=1, split="test")
    members = (rows.y[:, 0] == 1) & (rows.group == 1)
    assert row["accuracy"] == pytest.approx(float(right.float().mean()), abs=2e-5)
    assert row["target"] == pytest.approx(float(right[members].float().mean()), abs=2e-5)


def test_what_is_done_is_not_done_again(finished: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished.folder / "results.csv").read_bytes()
    for name in ("fit", "debiased", "logits_of"):
        monkeypatch.setattr(bias, name, lambda *args, **kwargs: pytest.fail("was run again"))
    again = Experiment(finished.task, RECIPE, finished.folder)
    again.validate()
    again.test()
    assert bias.summary(again.rows("test")) == bias.summary(finished.rows("test"))
    assert (finished.folder / "results.csv").read_bytes() == before


def test_a_stopped_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, calls, fit = RECIPE.quick(), [], bias.fit

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(bias, "fit", stopping)
    with pytest.raises(KeyboardInterrupt):
        Experiment(task_of(), recipe, tmp_path).validate()
    steps: list[str] = []
    Experiment(task_of(), recipe, tmp_path).validate(lambda done, total, text: steps.append(text))
    assert len(steps) == len(set(steps)) == 3 + len(MODELS)
    # The linear models of the tuning were not trained again, but for the adversaries of one.
    assert calls[:4] == ["linear", "high-rank linear", "mumoe", "mumoe"]


# ---- corrections -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0, 1])
def test_directions(label: int) -> None:
    task = task_of(label)
    model, _ = bias.fit(task, "mumoe", 0.03, 0, RECIPE)
    members = task.training.x[task.members(task.training)]
    names = set(CORRECTIONS) - {"linear threshold"}
    actual = {name: bias.direction_of(name, task, model, task.training) for name in names}
    with torch.no_grad():
        (a,) = model.gate(task.training.x)
    mean = a[task.members(task.training)].mean(0)
    toward = 2 * label - 1
    expected = toward * (a @ mean) / (mean @ mean)
    torch.testing.assert_close(actual["edit"], expected, rtol=0, atol=2e-5)
    # All are scaled alike, and the edit is the larger where an input is like the subpopulation.
    for direction in actual.values():
        assert float(direction[task.members(task.training)].mean()) == pytest.approx(toward, abs=1e-4)
    assert float((toward * actual["edit"])[task.training.group == 0].mean()) < 0.9
    assert not actual["group threshold"][task.training.group == 0].any()
    assert model.experts.edits is None
    # An edit of strength s is s times the direction.
    before = bias.logits_of(model, task.test.x)
    means = mean_coefficients(model, model, [members])
    edit_bias(model, "three", means, 0, 3 * toward / float(means[0].square().sum()))
    here = bias.direction_of("edit", task, model, task.test)
    after = bias.moved(task, before, 3 * here)
    torch.testing.assert_close(bias.logits_of(model, task.test.x), after, rtol=0, atol=1e-4)


def test_area_by_hand() -> None:
    curve = [{"accuracy": a, "worst": w} for a, w in ((0.9, 0.1), (0.8, 0.5), (0.7, 0.3), (0.6, 0.9))]
    # From 0.9: 0.1 up to a loss of 0.1, then 0.5 up to 0.25; the loss of 0.3 is too large.
    assert bias.area(curve, 0.9) == pytest.approx((0.1 * 0.1 + 0.15 * 0.5) / 0.25, abs=0.002)
    assert bias.area(curve, 0.95) == pytest.approx((0.05 * 0 + 0.1 * 0.1 + 0.1 * 0.5) / 0.25, abs=0.004)
    assert bias.area(curve[:1], 0.9) == pytest.approx(0.1)


def test_the_weakest_of_the_best_is_chosen() -> None:
    rows = [{"value": v, "worst": w} for v, w in ((3.0, 0.5), (1.0, 0.5), (0.0, 0.4))]
    assert bias.best(rows) == 1.0


def test_intervals_are_those_of_student() -> None:
    # Of five values the quantile is 2.776; their deviation is sqrt(2.5).
    middle, half = interval([1, 2, 3, 4, 5])
    assert middle == 3 and half == pytest.approx(2.776 * sqrt(2.5 / 5), abs=1e-3)
    assert interval([1]) == (1, None)


def test_differences_are_taken_seed_by_seed(finished: Experiment) -> None:
    rows = finished.rows("test")
    own = [bias.by_seed(rows, method)["worst"] for method in ("edit", "mumoe")]
    (row,) = (r for r in bias.comparisons(rows) if (r["metric"], r["minus"]) == ("worst", "mumoe"))
    differences = [a - b for a, b in zip(*own, strict=True)]
    assert (row["difference"], row["half"]) == pytest.approx(interval(differences))


# ---- models ------------------------------------------------------------------------------------------------


def test_every_label_is_that_of_its_row() -> None:
    """Of several outputs each learns its own label, with rows repeated and without."""
    parts = []
    for seed, rows in enumerate((2000, 500, 500)):
        x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
        parts.append(Population(x, (x > 0).long(), (x[:, 0] > 0.5).long()))
    task = Task("signs", *parts, 2, (1, 1))
    for repetitions in (1, 5):
        model, loss = bias.fit(task, "linear", 0.1, 0, replace(RECIPE, epochs=10), repetitions)
        right = (bias.logits_of(model, task.test.x) > 0).long() == task.test.y
        assert bool((right.float().mean(0) > 0.9).all()) and loss < 0.3
    debiased = bias.debiased(task, model, 0.0, 0, RECIPE)
    right = (bias.logits_of(debiased, task.test.x)[:, 0] > 0).long() == task.test.y[:, 2]
    assert float(right.float().mean()) > 0.9


def test_training_changes_no_random_state() -> None:
    task, state = task_of(), torch.get_rng_state()
    model, _ = bias.fit(task, "linear", 0.01, 0, RECIPE.quick())
    bias.debiased(task, model, 0.1, 0, RECIPE.quick())
    assert torch.equal(torch.get_rng_state(), state)


# ---- data --------------------------------------------------------------------------------------------------

NAMES = ["Blond_Hair", "Male", "Smiling"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small CelebA and a small Adult."""
    monkeypatch.setattr(attributes, "CELEBA_PARTS", (600, 100, 100))
    values = np.random.default_rng(0).choice([-1, 1], (800, 3))
    lines = [f"{k:06}.jpg,{','.join(map(str, row))}" for k, row in enumerate(values)]
    (tmp_path / "celeba").mkdir()
    with zipfile.ZipFile(tmp_path / "celeba" / "celeba.csv.zip", "w") as archive:
        archive.writestr("celeba.csv", "\n".join([",".join(["filename", *NAMES]), *lines]))
    (tmp_path / "adult").mkdir()
    kinds = [
        f"{20 + k}, {'Private' if k % 3 else 'State-gov'}, 1, HS-grad, {k % 16}, Divorced, Sales, "
        f"{'?' if k == 7 else 'Wife'}, White, {'Male' if k % 2 else 'Female'}, 0, {k}, 40, Cuba, "
        f"{'>50K' if k % 5 < 2 else '<=50K'}"
        for k in range(200)
    ]
    (tmp_path / "adult" / "adult.data").write_text("\n".join(kinds) + "\n\n")
    tested = "\n".join(f"{line}." for line in kinds[:60])
    (tmp_path / "adult" / "adult.test").write_text(f"|1x3 Cross validator\n{tested}\n\n")
    return tmp_path


def test_celeba(data: Path) -> None:
    task = read_celeba(data / "celeba", ("Blond_Hair", 1), ("Male", 0))
    values = torch.from_numpy(np.random.default_rng(0).choice([-1, 1], (800, 3)))
    parts = (task.training, task.validation, task.test)
    assert [len(part) for part in parts] == [600, 100, 100]
    assert torch.equal(torch.cat([part.x for part in parts]), values[:, 1:].float())
    assert torch.equal(torch.cat([part.y for part in parts])[:, 0], (values[:, 0] > 0).long())
    assert torch.equal(torch.cat([part.group for part in parts]), (values[:, 1] > 0).long())
    assert task.target == (1, 0) and task.output == 0
    expected = (values[600:700, 0] > 0) & (values[600:700, 1] < 0)
    assert torch.equal(task.members(task.validation), expected)


def test_celeba_with_embeddings(data: Path) -> None:
    x = np.random.default_rng(1).normal(3, 2, (800, 5))
    np.savez(data / "e.npz", x=x)
    task = read_celeba(data / "celeba", ("Smiling", 0), ("Male", 1), data / "e.npz")
    assert task.training.x.shape == (600, 5) and task.training.y.shape == (600, 3) and task.output == 2
    assert task.training.x.mean().abs() < 1e-6 and task.training.x.square().mean() == pytest.approx(1)
    scale = np.sqrt(np.square(x[:600] - x[:600].mean(0)).mean())
    np.testing.assert_allclose(task.test.x, (x[700:] - x[:600].mean(0)) / scale, atol=1e-5)
    attributes_only = read_celeba(data / "celeba", ("Smiling", 0), ("Male", 1))
    assert torch.equal(task.labels(task.test), attributes_only.labels(attributes_only.test))
    assert task.name != attributes_only.name


def test_adult(data: Path) -> None:
    task = read_adult(data / "adult", ("income", 1), ("Male", 0))
    # One row of each file lacks an entry.
    assert [len(part) for part in (task.training, task.validation, task.test)] == [160, 39, 59]
    kept = [k for k in range(60) if k != 7]
    assert task.test.y[:, 0].tolist() == [int(k % 5 < 2) for k in kept]
    assert task.test.group.tolist() == [k % 2 for k in kept]
    # Five numbers, two workclasses, five categories of one value each, sex.
    assert task.training.x.shape == (160, 13)
    assert torch.equal(task.test.x[:, 5], torch.tensor([float(k % 3 > 0) for k in kept]))
    assert torch.equal(task.test.x[:, -1], task.test.group.float())
    varied = task.training.x[:, 0]
    assert varied.mean().abs() < 1e-6 and varied.std() == pytest.approx(1)
    train, held = (set(np.round(part.x[:, 0].tolist(), 4)) for part in (task.training, task.validation))
    assert len(train) == 160 and not train & held


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--target Hair --group Male", "must be one of Blond_Hair, Male, Smiling"),
        ("--target Smiling=2 --group Male", "--target must be an attribute"),
        ("--target Smiling --group Male --data other", "--data must be one of celeba, adult"),
        ("--target Smiling --group Male --data adult", "must be one of income"),
        (
            "--target income --group Male --data adult --embeddings e.npz",
            "--embeddings can only be used with celeba",
        ),
        ("--target Smiling --group Male --embeddings missing.npz", "missing.npz"),
        ("--target Smiling --group Male --embeddings {data}/short.npz", "must have shape (800, features)"),
        ("--target Smiling --group Male --embeddings {data}/empty.npz", "must have arrays x"),
        ("--target Smiling --group Male --folder nowhere", "mumoe-tensor data"),
        ("--data {data}/short.npz --target y --group g", "must have arrays"),
        ("--data {data}/own.npz --target y --group g", "g must be 0 or 1 for each row of x"),
        ("--target Smiling --group Male --seeds 0", "seeds must be positive"),
        ("--target Smiling --group Male --jobs 0", "--jobs must be positive"),
        ("--target Smiling --group Male --test", "validation must be finished"),
        ("--target Smiling --group Smiling=0", "have rows of the subpopulation"),
        ("--target Smiling --group Smiling", "both groups must have rows with label 1"),
    ],
)
def test_bad_input_is_one_line(line: str, words: str, data: Path) -> None:
    np.savez(data / "short.npz", x=np.zeros((3, 2)))
    np.savez(data / "empty.npz", y=np.zeros(3))
    np.savez(data / "own.npz", x=np.zeros((3, 2)), y=np.zeros(3), g=np.arange(3))
    if "--folder" not in line:
        line += f" --folder {data}"
    result = CliRunner().invoke(app, shlex.split(f"bias {line.format(data=data)} --out {data / 'out'}"))
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert words in result.stderr
    assert not (data / "out").exists()


def test_wrong_files_are_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "adult" / "adult.data").write_text("1, 2\n")
    with pytest.raises(ValueError, match="15 columns"):
        read_adult(data / "adult", ("income", 1), ("Male", 0))
    monkeypatch.setattr(attributes, "CELEBA_PARTS", (600, 100, 101))
    with pytest.raises(ValueError, match="801 rows"):
        read_celeba(data / "celeba", ("Smiling", 1), ("Male", 0))


def test_embeddings_of_the_user(data: Path) -> None:
    draw = np.random.default_rng(0)
    x, y, g = draw.normal(3, 2, (100, 5)), draw.integers(0, 2, 100), draw.integers(0, 2, 100)
    np.savez(data / "own.npz", x=x, y=y, g=g)
    task = attributes.read_embeddings(data / "own.npz", ("y", 0), ("g", 1))
    parts = (task.training, task.validation, task.test)
    assert [len(part) for part in parts] == [60, 20, 20] and task.target == (0, 1)
    assert task.training.x.mean().abs() < 1e-6 and task.training.x.square().mean() == pytest.approx(1)
    # Every row is in one part, with its attributes.
    first, labels, groups = (
        np.concatenate([np.asarray(of(part)) for part in parts])
        for of in (lambda p: p.x[:, 0], lambda p: p.y[:, 0], lambda p: p.group)
    )
    actual, order = np.argsort(first), np.argsort(x[:, 0])
    assert (labels[actual] == y[order]).all() and (groups[actual] == g[order]).all()


@pytest.fixture
def command(data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.setattr("mumoe_tensor.progress.LINE_SECONDS", 1e9)

    def run(line: str) -> Any:
        line = f"bias --target Smiling --group Male --quick --folder {data} --out {data / 'out'} {line}"
        result = CliRunner().invoke(app, shlex.split(line))
        assert result.exit_code == 0, result.stderr  # progress goes to stderr
        return result.stdout

    return run


def test_command(command: Callable[[str], Any], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, recipe in list(RECIPES.items()):
        monkeypatch.setitem(RECIPES, name, replace(recipe, batch_size=64))
    actual = json.loads(command("--json"))
    assert [row["method"] for row in actual["methods"]] == list(METHODS) and actual["split"] == "validation"
    assert len(actual["differences"]) == len(bias.COMPARED)
    assert json.loads(command("--test --json"))["split"] == "test"
    output = command("--test")
    assert "high-rank" in output and "results.csv" in output
    assert {p.name for p in (data / "out").iterdir()} == {"results.csv", "models"}
    np.savez(data / "e.npz", x=np.random.default_rng(1).normal(size=(800, 6)))
    other = json.loads(command(f"--embeddings {data / 'e.npz'} --json"))
    assert other["task"] != actual["task"]
    assert len(list((data / "out" / "models").iterdir())) == 2 * len(MODELS)


#: The attributes of CelebA, in the order of its file.
ALL = """
5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair
Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup
High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose
Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat
Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
"""
CELEBA = ALL.split()


def test_these_are_the_attributes_of_celeba() -> None:
    path = Path(__file__).parents[2] / "data" / "celeba" / "celeba.csv.zip"
    if not path.exists():
        pytest.skip("needs make data")
    with zipfile.ZipFile(path) as archive, archive.open("celeba.csv") as file:
        assert file.readline() == f"filename,{','.join(CELEBA)}\r\n".encode()
        assert file.readline().startswith(b"000001.jpg,-1,1,1,-1,")


def test_command_with_embeddings_and_all_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of which one number tells an attribute of their image let it be predicted."""
    monkeypatch.setattr(attributes, "CELEBA_PARTS", (600, 300, 300))
    for name, recipe in list(RECIPES.items()):
        monkeypatch.setitem(RECIPES, name, replace(recipe, batch_size=16))
    draw = np.random.default_rng(0)
    values = draw.choice([-1, 1], (1200, len(CELEBA)))
    lines = [f"{k:06}.jpg,{','.join(map(str, row))}" for k, row in enumerate(values, 1)]
    (tmp_path / "celeba").mkdir()
    with zipfile.ZipFile(tmp_path / "celeba" / "celeba.csv.zip", "w") as archive:
        archive.writestr("celeba.csv", "\r\n".join([",".join(["filename", *CELEBA]), *lines, ""]))
    x = draw.normal(size=(1200, 6))
    x[:, 0] += 3 * values[:, CELEBA.index("Blond_Hair")]
    np.savez(tmp_path / "embeddings.npz", x=x)
    line = (
        f"bias --target Blond_Hair --group Male --quick --folder {tmp_path} --out {tmp_path / 'out'} --json "
    )
    line += f"--embeddings {tmp_path / 'embeddings.npz'} "
    for split in ("validation", "test"):
        result = CliRunner().invoke(app, shlex.split(line + "--test" * (split == "test")))
        assert result.exit_code == 0, result.stderr  # progress goes to stderr
        actual = json.loads(result.stdout)
        assert actual["split"] == split and [row["method"] for row in actual["methods"]] == list(METHODS)
        (model,) = (row for row in actual["methods"] if row["method"] == "mumoe")
        assert model["accuracy"] > 0.9
