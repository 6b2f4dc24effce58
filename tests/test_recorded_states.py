"""States, files and folders of an earlier version load, and give the outputs recorded with them."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")
pytest.importorskip("accelerate")

import mumoe_tensor.nn as mnn  # noqa: E402
from mumoe_tensor.browser import PageConfig, browse  # noqa: E402
from mumoe_tensor.formats import formats  # noqa: E402
from mumoe_tensor.models import load_head, load_model  # noqa: E402
from mumoe_tensor.training.head import HeadSetting  # noqa: E402
from mumoe_tensor.training.run import read_config, run  # noqa: E402
from mumoe_tensor.training.settings import RUNS, Settings  # noqa: E402

STATES = Path(__file__).parent / "data" / "states"
CLOSE: Any = {"rtol": 1e-5, "atol": 1e-6}


def read(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of a file, the tensors by case and key."""
    with safetensors.safe_open(STATES / name, "pt") as file:
        cases: dict[str, Any] = {}
        for path in file.keys():  # noqa: SIM118 (it is not a dict)
            case, _, key = path.partition("/")
            cases.setdefault(case, {})[key] = file.get_tensor(path)
        return {case: json.loads(text) for case, text in (file.metadata() or {}).items()}, cases


CONFIGS, LAYERS = (
    whole | structured
    for whole, structured in zip(read("layers.safetensors"), read("structured.safetensors"), strict=True)
)
MODELS = read("models.safetensors")[1]


def state_of(case: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("state/"): value for key, value in case.items() if key.startswith("state/")}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_give_the_recorded_outputs(case: str) -> None:
    recorded, about = LAYERS[case], CONFIGS[case]
    layer = getattr(mnn, about["class"]).from_config(about["config"])
    layer.load_state_dict(state_of(recorded))
    torch.testing.assert_close(layer.eval()(recorded["x"]), recorded["y"], **CLOSE)
    # Saved again and loaded again, nothing is lost.
    again = type(layer).from_config(layer.config)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again.eval()(recorded["x"]), recorded["y"], **CLOSE)


def test_a_layer_in_a_model_and_on_meta_takes_a_recorded_state() -> None:
    recorded, about = LAYERS["cp-3x2-mlp"], CONFIGS["cp-3x2-mlp"]
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Identity(), getattr(mnn, about["class"])(**about["config"]))
    state = {f"1.{name}": value for name, value in state_of(recorded).items()}
    model.load_state_dict(state, assign=True)
    torch.testing.assert_close(model.eval()(recorded["x"]), recorded["y"], **CLOSE)


def test_a_pickled_state_with_its_config() -> None:
    recorded = torch.load(STATES / "tr-3x2-mlp.pt", weights_only=True)
    layer = mnn.MuMoEMLP.from_config(recorded["config"])
    layer.load_state_dict(recorded["state"])
    torch.testing.assert_close(layer.eval()(recorded["x"]), recorded["y"], **CLOSE)


def test_all_kinds_are_recorded() -> None:
    configs = [about["config"] for about in CONFIGS.values()]
    names = {f if isinstance(f, str) else f["name"] for config in configs for f in [config["format"]]}
    assert names == {*formats(), "sum"}
    for name, values in (
        ("gate", {"entmax15", "sparsemax", "softmax"}),
        ("gate_norm", {"batch", "layer", "none"}),
        ("bias", {True, False}),
        ("init", {"linear", "published"}),
        ("input_norm", {True, False}),
    ):
        assert {config[name] for config in configs} == values
    assert {len(config["experts"]) for config in configs} == {0, 1, 2}
    edited = {case.rpartition("-")[2] for case, tensors in LAYERS.items() if "edits" in " ".join(tensors)}
    assert edited == {"linear", "mlp"}


@pytest.mark.parametrize("case", MODELS)
def test_files_of_models_give_the_recorded_outputs(case: str) -> None:
    load: Any = load_head if case.startswith("head") else load_model
    y = load(STATES / f"{case}.safetensors")(MODELS[case]["x"])
    torch.testing.assert_close(y[0] if isinstance(y, tuple) else y, MODELS[case]["y"], **CLOSE)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recorded folders of runs, as the working folder."""
    with tarfile.open(STATES / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings_of(folder: Path) -> Settings:
    from pydantic import TypeAdapter

    settings = read_config(folder / "config.json")["settings"]
    return TypeAdapter(RUNS[settings.pop("kind")]).validate_python(settings)


@pytest.mark.parametrize("kind", ["mixer", "gpt2"])
def test_a_finished_run_is_not_trained_again_and_an_interrupted_one_resumes(runs: Path, kind: str) -> None:
    folder = runs / kind
    settings = settings_of(folder)
    done = run(settings, folder)
    assert not done["trained"]
    expected = load_model(folder / "model.safetensors").state_dict()
    (folder / "model.safetensors").unlink()
    (folder / "checkpoints" / "step-00000004.safetensors").unlink()
    resumed = run(settings, folder)
    assert resumed["trained"] and resumed["steps"] == done["steps"] == 4
    for name, value in load_model(folder / "model.safetensors").state_dict().items():
        torch.testing.assert_close(value, expected[name], **CLOSE)


def test_a_finished_head_is_not_trained_again(runs: Path) -> None:
    from pydantic import TypeAdapter

    recorded = read_config(runs / "head" / "config.json")["settings"]
    assert recorded.pop("kind") == HeadSetting.kind
    done = run(TypeAdapter(HeadSetting).validate_python(recorded), runs / "head")
    assert not done["trained"] and done["rank"] == [3]


def test_a_run_on_images_that_were_not_scaled_does_not_resume_with_scaled_ones(runs: Path) -> None:
    settings = settings_of(runs / "mixer")
    assert not settings.data.scale
    scaled = replace(settings, data=replace(settings.data, scale=True))
    with pytest.raises(ValueError, match=r"data\.scale is False there, True here"):
        run(scaled, runs / "mixer")
    raw, pixels = (made.read_data()[0].batch(torch.arange(5))[0] for made in (settings, scaled))
    torch.testing.assert_close(raw, 255 * pixels)


@pytest.mark.parametrize("kind", ["head", "mixer"])
def test_recorded_runs_are_browsed(runs: Path, kind: str) -> None:
    assert "experts" in browse(runs / kind, PageConfig(rows=12, shown=2, removed=2))


def test_a_recorded_experiment_resumes(runs: Path) -> None:
    pytest.importorskip("fairlearn")
    from mumoe_tensor.configs.bias import RECIPES
    from mumoe_tensor.experiments import bias
    from mumoe_tensor.training.attributes import read_adult

    task = read_adult(Path("adult"), ("income", 1), ("Male", 0))
    before = (runs / "bias" / "results.csv").read_text()
    experiment = bias.Experiment(task, RECIPES["adult"].quick(), runs / "bias")
    experiment.validate()
    assert (runs / "bias" / "results.csv").read_text() == before
    experiment.test()
    rows = {row["method"]: row for row in experiment.rows("test")}
    assert 0 < float(rows["mumoe"]["accuracy"]) < 1
