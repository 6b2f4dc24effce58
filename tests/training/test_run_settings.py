"""Settings are read from TOML with the key in every complaint; those that come with the library are right."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pydantic")

import numpy as np  # noqa: E402

from mumoe_tensor.training import TrainConfig  # noqa: E402
from mumoe_tensor.training.settings import RUNS, GPT2Run, MixerRun, packaged, read_settings  # noqa: E402

#: Parameters of the published configurations.
PUBLISHED = {
    "mixer-s16-mlp": 18_528_264,
    "mixer-s16-cp": 18_630_616,
    "mixer-s16-tr": 18_290_792,
    "gpt2-124m-mlp": 124_373_760,
    "gpt2-124m-cp-64": 124_487_976,
    "gpt2-124m-cp-256": 124_789_536,
    "gpt2-124m-tr-64": 124_790_880,
    "gpt2-124m-tr-256": 125_159_136,
}
TEXT = """
[data]
inputs = "images.npz"
[model]
width = 32
experts = [4, 4]
[train]
epochs = 3
warmup = 7
betas = [0.5, 0.25]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "own.toml").write_text(TEXT)
    return tmp_path / "own.toml"


# ---- those of the library ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_parameters(name: str) -> None:
    model = read_settings(name.split("-")[0], name).make_model("meta")
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_these_come_with_the_library() -> None:
    assert {name for kind in RUNS for name in packaged(kind)} == {"mixer", "gpt2", *PUBLISHED}
    for kind, run in RUNS.items():
        assert isinstance(read_settings(kind), run) and read_settings(kind) == read_settings(kind, kind)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("mixer")])
def test_published_training_of_the_mixer(name: str) -> None:
    actual = read_settings("mixer", name)
    assert isinstance(actual, MixerRun)
    assert actual.train == TrainConfig(
        epochs=300, batch_size=4096, learning_rate=1e-3, schedule="linear", warmup=10_000, weight_decay=1e-4,
        clip=1.0, mixup=0.5, keep="last", precision="bf16", compile=True, evaluation_batch_size=512,
        workers=12,
    )  # fmt: skip
    assert actual.data.augment == (2, 15) and actual.model.stochastic_depth == 0.1
    # As an integer it is steps, not a share.
    assert type(actual.train.warmup) is int


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("gpt2")])
def test_published_training_of_gpt2(name: str) -> None:
    actual = read_settings("gpt2", name)
    assert isinstance(actual, GPT2Run)
    train = actual.train
    assert train.steps == 100_000 and train.batch_size * actual.model.context == 983_040
    assert (train.learning_rate, train.final_learning_rate, train.schedule) == (6e-4, 6e-5, "cosine")
    assert (train.warmup, train.betas, train.weight_decay, train.clip) == (2000, (0.9, 0.95), 0.1, 1.0)
    assert (train.precision, train.compile, train.keep) == ("bf16", True, "last")
    for processes in (4, 8, 16, 64):
        assert train.batch_size % (train.accumulation * processes) == 0


def test_the_laptops_models_have_about_as_many_parameters_with_experts_as_without() -> None:
    for kind in RUNS:
        counts = [
            sum(
                p.numel()
                for p in read_settings(kind, None, [f"model.format={format}"]).make_model("meta").parameters()
            )
            for format in ("mlp", "cp", "tr")
        ]
        # Ranks are whole numbers, and the smallest blocks have few parameters for each.
        assert all(abs(count / counts[0] - 1) < 0.03 for count in counts), (kind, counts)


# ---- reading ----------------------------------------------------------------------------------------------


def test_own_settings(config: Path) -> None:
    actual = read_settings("mixer", config)
    assert isinstance(actual, MixerRun)
    assert actual.data.inputs == "images.npz" and actual.model.width == 32 and actual.model.experts == (4, 4)
    assert actual.train == TrainConfig(epochs=3, warmup=7, betas=(0.5, 0.25))
    assert actual.model == type(actual.model)(width=32, experts=(4, 4))


def test_overrides_take_the_place_of_what_is_there(config: Path) -> None:
    overrides = [
        "train.epochs=5", "train.learning_rate = 2e-3", "model.format=cp", 'model.gate="softmax"',
        "model.gate_norm=none", "model.token_rank=[3]", "train.clip=none", "data.validation=other",
        "train.compile=true", "train.epochs=6",
    ]  # fmt: skip
    actual = read_settings("mixer", str(config), overrides)
    assert isinstance(actual, MixerRun)
    assert (actual.train.epochs, actual.train.learning_rate, actual.train.warmup) == (6, 2e-3, 7)
    assert actual.train.clip is None and actual.train.compile is True
    assert (actual.model.format, actual.model.gate, actual.model.gate_norm) == ("cp", "softmax", "none")
    assert actual.model.token_rank == (3,) and actual.data.validation == "other"
    # A table that the file does not have can be given, too.
    config.write_text('[data]\ninputs = "a.npz"')
    assert read_settings("mixer", config, ["train.seed=4"]).train.seed == 4
    reset = read_settings("gpt2", "gpt2-124m-cp-64", ["model.rank=none"])
    assert asdict(reset.model)["rank"] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=-1", r"^train: batch_size must be positive, got -1\.$"),
        ("train.batch_size=3x", r"^train\.batch_size: .*integer, got '3x'\.$"),
        ('train.batch_size="3"', r"^train\.batch_size: .*integer, got '3'\.$"),
        ("train.batch_size=true", r"^train\.batch_size: .*integer, got True\.$"),
        ("train.batch_size=2.0", r"^train\.batch_size: .*integer, got 2\.0\.$"),
        ("train.batch_size=none", r"^train\.batch_size: .*integer, got 'none'\.$"),
        ("train.warmup=long", r"^train\.warmup.*: .*number, got 'long'\.$"),
        ("train.betas=[0.1]", r"^train\.betas.*: "),
        ("train.schedule=stairs", r"^train\.schedule: .*'cosine' or 'linear', got 'stairs'\.$"),
        ("train.learning_rate=nan", r"^train: learning_rate must be finite .*, got nan\.$"),
        ("train.learning_rate=1979-05-27", r"^train\.learning_rate: .*number, got '1979-05-27'\.$"),
        ("kind.speed=3", r"^kind: Unexpected keyword argument, got \{'speed': 3\}\.$"),
        ("train.speed=3", r"^train\.speed: Unexpected keyword argument, got 3\.$"),
        ("model.experts=4", r"^model\.experts: .* got 4\.$"),
        ("model.experts=[0]", r"^model: every number of experts must be positive, got 0\.$"),
        ("model.patch=5", r"^model: .*image_size=28 is not a multiple of patch=5\.$"),
        ("data.validation=2", r"^data: validation must be a fraction"),
        ("speed.train=3", r"^speed: Unexpected keyword argument, got "),
        ("epochs=3", r"as train\.epochs=3; got 'epochs=3'\.$"),
        ("train.epochs", r"as train\.epochs=3; got 'train\.epochs'\.$"),
        ("train.=3", r"as train\.epochs=3; got 'train\.=3'\.$"),
    ],
)
def test_a_complaint_names_the_key(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_settings("mixer", None, [override])
    assert "\n" not in str(error.value) and "Value error" not in str(error.value)


def test_files_that_are_no_settings(config: Path, tmp_path: Path) -> None:
    for text, message in [
        ("[data", r"own\.toml: settings must be TOML: "),
        ("data = 3", r"own\.toml: data: .*object, got 3"),
        ("", r"own\.toml: .*empty"),
        ("\n", "data: .*required"),
        ("[data]", r"own\.toml: data\.inputs: .*required"),
        ('[data]\ninputs = "a"\n[train]\nepochs = "3"', r"own\.toml: train\.epochs: .*integer, got '3'"),
    ]:
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_settings("mixer", config)
    with pytest.raises(FileNotFoundError):
        read_settings("mixer", tmp_path / "none.toml")
    with pytest.raises(
        ValueError, match="one of mixer, mixer-s16-cp, mixer-s16-mlp, mixer-s16-tr; got 'gpt2'"
    ):
        read_settings("mixer", "gpt2")


# ---- model and data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", ["model.channels=3", "model.image_size=14", "model.classes=9"])
def test_images_must_be_those_of_the_model(override: str, tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, x=np.random.rand(40, 7, 7), y=np.arange(40) % 10)
    overrides = [f"data.inputs={path}", "data.labels=none", "data.validation=0.5", "model.patch=7"]
    fits = read_settings("mixer", None, [*overrides, "model.image_size=7"])
    assert [len(rows) for rows in fits.read_data()] == [20, 20]
    with pytest.raises(ValueError, match=r"the model takes images of shape .*\(1, 7, 7\) and 10 classes"):
        read_settings("mixer", None, [*overrides, "model.image_size=7", override]).read_data()


@pytest.mark.parametrize("size", ["width=100_000_000_000_000_000_000", "width=1_000_000", "depth=1_000_000"])
def test_a_model_must_fit_into_memory(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MixerRun, "read_data", lambda self: ((), ()))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2**30))
    with pytest.raises(ValueError, match=r"^a model must fit into memory.*\.$"):
        read_settings("mixer", None, [f"model.{size}"]).job()


def test_tokens_must_be_those_of_the_model(tmp_path: Path) -> None:
    np.arange(100, dtype="<u2").tofile(tmp_path / "t.bin")
    overrides = [f"data.{part}={tmp_path / 't.bin'}" for part in ("training", "validation")]
    fits = read_settings("gpt2", None, [*overrides, "model.context=10", "model.vocabulary=100"])
    assert [len(rows) for rows in fits.read_data()] == [9, 9]
    with pytest.raises(ValueError, match="ids must be from 0 to 98"):
        read_settings("gpt2", None, [*overrides, "model.context=10", "model.vocabulary=99"]).read_data()
    with pytest.raises(ValueError, match="a window of 128 tokens"):
        read_settings("gpt2", None, overrides).read_data()
