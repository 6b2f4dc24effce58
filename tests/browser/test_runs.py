"""The pages of a Mixer and a GPT-2 that `mumoe-tensor train` trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")
pytest.importorskip("accelerate")
pytest.importorskip("pydantic")
pytest.importorskip("tokenizers")
pytest.importorskip("typer")

from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402
from typer.testing import CliRunner  # noqa: E402
from views import views_of  # noqa: E402

from mumoe_tensor.analysis import ablate, loss_effects  # noqa: E402
from mumoe_tensor.browser import Images  # noqa: E402
from mumoe_tensor.cli import app  # noqa: E402
from mumoe_tensor.models import Backbone  # noqa: E402
from mumoe_tensor.training import TrainConfig  # noqa: E402
from mumoe_tensor.training.head import HeadSetting  # noqa: E402
from mumoe_tensor.training.run import read_run, run  # noqa: E402
from mumoe_tensor.training.settings import read_settings  # noqa: E402


def content(page: Path) -> Any:
    (view,) = views_of(page.read_text(encoding="utf-8"))
    return view


def inspect(*line: str) -> Any:
    return CliRunner().invoke(app, ["inspect", *line])


@pytest.fixture(scope="module")
def mixer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixer")
    generator = np.random.default_rng(0)
    np.savez(folder / "x.npz", x=generator.random((60, 8, 8), dtype=np.float32), y=np.arange(60) % 3)
    sizes = "image_size=8 patch=4 width=8 depth=2 token_hidden=6 channel_hidden=6 classes=3 format=cp"
    ranks = "experts=[5] token_rank=[3] channel_rank=[4]"
    overrides = [f"data.inputs={folder / 'x.npz'}", "data.labels=none", "data.validation=0.4"]
    overrides += [f"model.{size}" for size in f"{sizes} {ranks}".split()]
    overrides += ["train.epochs=2", "train.learning_rate=0.05", "train.batch_size=9"]
    run(read_settings("mixer", None, overrides), folder / "run")
    return folder / "run"


def test_a_head_on_folders_shows_its_images_and_the_names_of_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    for number in range(30):
        colour = [(200, 20, 20), (20, 200, 20), (20, 20, 200)][number % 3]
        folder = tmp_path / "images" / ("red", "green", "blue")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(folder / f"{number:02}.png")
    network = Backbone(torch.nn.Conv2d(3, 6, 2), 8, 0.5, 1.0).eval()
    for place in ("training.head", "browser.run"):
        monkeypatch.setattr(f"mumoe_tensor.{place}.load_backbone", lambda *_: network)
    setting = HeadSetting(
        str(tmp_path / "images"), {"experts": 4, "rank": 4}, TrainConfig(epochs=2, batch_size=8),
        backbone="tiny", weights="tiny.pth", size=8, validation=0.4,
    )  # fmt: skip
    run(setting, tmp_path / "run")
    done = inspect(str(tmp_path / "run"), "--rows", "5")
    assert done.exit_code == 0, done.stderr
    view = content(tmp_path / "run" / "experts.html")
    assert view["classes"] == {"0": "blue", "1": "green", "2": "red"}
    assert '"data:image/png;base64,' in (tmp_path / "run" / "experts.html").read_text(encoding="utf-8")


def test_a_mixer_is_inspected(mixer: Path) -> None:
    done = inspect(str(mixer), "--classes", "a,b,c", "--rows", "20", "--removed", "2", "--shown", "4")
    assert done.exit_code == 0, done.stderr
    view = content(mixer / "experts.html")
    assert [level["layer"] for level in view["levels"]] == [
        f"blocks.{block}.{kind}" for block in (0, 1) for kind in ("token_mlp", "channel_mlp")
    ]
    settings, model = read_run(mixer)
    _, kept = settings.read_data()
    x, y = kept.batch(torch.arange(20))
    level = view["levels"][3]
    with torch.no_grad():
        seen: list[Any] = []
        handle = model.blocks[1].channel_mlp.gate.register_forward_hook(
            lambda *arguments: seen.append(arguments[2])
        )
        right = model(x).argmax(1) == y
        handle.remove()
        ((a,),) = seen
        # Patches of the images with the largest mean, as they lie.
        for expert in level["experts"]:
            best = a[..., expert["n"]].mean(1).topk(4)
            assert [top["i"] for top in expert["top"]] == best.indices.tolist()
            for top in expert["top"]:
                assert top["rows"] == pytest.approx(a[top["i"], :, expert["n"]].tolist(), abs=1e-3)
        removed = [expert for expert in level["experts"] if expert["effect"] is not None]
        assert len(removed) == 2
        for expert in removed:
            with ablate(model.blocks[1].channel_mlp, [expert["n"]]):
                change = (model(x).argmax(1) == y).double() - right.double()
            expected = sum(abs(change[y == c].mean().item()) for c in range(3))
            assert expert["effect"] == pytest.approx(expected, abs=1e-5)
    assert view["grids"]["blocks.1.channel_mlp"] == [2, 2] and "blocks.1.token_mlp" not in view["grids"]
    assert not any(top["rows"] for expert in view["levels"][0]["experts"] for top in expert["top"])
    shown = Images(x[:, 0].numpy())
    assert all(uri == shown.shown(int(index)) for index, uri in view["samples"].items())
    assert set(view["classes"].values()) <= {"a", "b", "c"} and not view["language"]


def test_two_runs_side_by_side(mixer: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "page.html")
    done = inspect(str(mixer), "--beside", str(mixer), "--rows", "9", "--removed", "0", "--out", out)
    assert done.exit_code == 0, done.stderr
    one, other = views_of((tmp_path / "page.html").read_text())
    assert one == other and len(one["levels"]) == 4
    assert all(expert["effect"] is None for level in one["levels"] for expert in level["experts"])
    done = inspect(str(mixer), "--beside", str(tmp_path / "missing"))
    assert done.exit_code == 2 and "there is no folder" in done.stderr and done.stderr.count("\n") == 1


def write_vocabulary(folder: Path) -> Path:
    """Files as those of GPT-2, of two merges."""
    folder.mkdir()
    ids = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), "th", "the", "<|endoftext|>"])}
    (folder / "encoder.json").write_text(json.dumps(ids))
    (folder / "vocab.bpe").write_text("#version: 0.2\nt h\nth e\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    write_vocabulary(folder / "vocabulary")
    # Ids up to 263 are the model's; the text has those below 259.
    for part, count in (("training", 200), ("validation", 90)):
        tokens = np.random.default_rng(count).integers(0, 258, count)
        (folder / f"{part}.bin").write_bytes(tokens.astype("<u2").tobytes())
    sizes = "vocabulary=264 context=8 width=8 depth=1 heads=2 hidden=8 format=cp experts=[3,2] rank=[4]"
    overrides = [f"data.{part}={folder / part}.bin" for part in ("training", "validation")]
    overrides += [f"model.{size}" for size in f"{sizes} dropout=0.0".split()]
    overrides += ["train.epochs=1", "train.batch_size=5"]
    run(read_settings("gpt2", None, overrides), folder / "run")
    return folder / "run"


def test_a_gpt2_is_inspected(gpt2: Path) -> None:
    vocabulary = str(gpt2.parent / "vocabulary")
    done = inspect(str(gpt2), "--vocabulary-files", vocabulary, "--rows", "9", "--removed", "2")
    assert done.exit_code == 0, done.stderr
    view = content(gpt2 / "experts.html")
    assert [(level["layer"], level["level"]) for level in view["levels"]] == [
        ("blocks.0.mlp", 0), ("blocks.0.mlp", 1),
    ]  # fmt: skip
    settings, model = read_run(gpt2)
    _, kept = settings.read_data()
    x, y = kept.batch(torch.arange(9))
    assert view["language"] and all(len(tokens) == 8 for tokens in view["samples"].values())
    bytes_of = sorted(ByteLevel.alphabet())
    letters = {row: "".join(bytes_of[t] if t < 256 else "?" for t in x[row].tolist()) for row in range(9)}
    for row, tokens in view["samples"].items():
        for letter, token in zip(letters[int(row)], tokens, strict=True):
            # (What is no printed letter of one byte has another sign in the files of the vocabulary.)
            assert token == letter or not letter.isascii() or letter == "?"
    for level in view["levels"]:
        measured = [expert for expert in level["experts"] if expert["effect"] is not None]
        assert len(measured) == 2
        for expert in measured:
            (change,) = loss_effects(
                model, model.blocks[0].mlp, [(x, y)], level=level["level"], experts=[expert["n"]]
            )
            assert expert["effect"] == pytest.approx(change.item(), abs=2e-6)
    written = view["sample"]
    assert written["given"] == 4 and len(written["tokens"]) == 8
    _, coefficients = model.generate(
        x[4:5, :4], 4, temperature=0.8, top_k=40, generator=torch.Generator().manual_seed(0),
        return_coefficients=True,
    )  # fmt: skip
    a = coefficients["blocks.0.mlp.gate"]
    for level, of_level in enumerate(written["levels"]):
        for token, strongest in enumerate(of_level):
            for n, coefficient in strongest:
                assert coefficient == pytest.approx(a[level][0, token, n].item(), abs=1e-3)


def test_what_cannot_be_inspected(mixer: Path, gpt2: Path, tmp_path: Path) -> None:
    for line, wrong in (
        ([str(mixer), "--images", "x.npz"], "images can only be used with a head on features"),
        ([str(mixer), "--removed", "-1"], "removed must not be negative"),
        ([str(mixer), "--classes", "a,b"], "names, one per class"),
        ([str(gpt2), "--vocabulary-files", str(tmp_path)], "encoder.json"),
    ):
        done = inspect(*line)
        assert done.exit_code == 2 and wrong in done.stderr and done.stderr.count("\n") == 1, done.stderr
    (tmp_path / "config.json").write_bytes((mixer / "config.json").read_bytes())
    with pytest.raises(ValueError, match="must contain a finished run"):
        read_run(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((mixer / "model.safetensors").read_bytes())
    assert read_run(tmp_path)[0] == read_run(mixer)[0]
    (tmp_path / "config.json").write_text('{"settings": {"kind": "mixer"}}')
    with pytest.raises(
        ValueError,
        match=r"config\.json: a run has the keys settings and model",
    ):
        read_run(tmp_path)
