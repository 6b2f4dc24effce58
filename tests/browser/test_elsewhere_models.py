"""The page of a model of the user's own, in Python and by the command."""

from __future__ import annotations

import base64
import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for package in ("PIL", "jinja2", "pydantic", "safetensors", "typer"):
    pytest.importorskip(package)

from torch import Tensor, nn  # noqa: E402
from typer.testing import CliRunner  # noqa: E402
from views import views_of  # noqa: E402

from mumoe_tensor.analysis import ablation_effects  # noqa: E402
from mumoe_tensor.browser import Images, View, browse_model, collect, models, page  # noqa: E402
from mumoe_tensor.cli import app  # noqa: E402
from mumoe_tensor.formats import shared, sum_of  # noqa: E402
from mumoe_tensor.nn import MuMoE, MuMoEMLP  # noqa: E402
from mumoe_tensor.replace import collect_coefficients  # noqa: E402


class Several(nn.Module):
    """Patches of images through a sum of formats, a gated block of two levels and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = MuMoE(
            4, 8, experts=5, format=sum_of("cp", shared("lowrank")), rank=(4, 2), gate_norm="layer"
        )
        self.second = MuMoEMLP(8, 6, 8, experts=(4, 3), rank=4, gated=True, gate_norm="layer")
        self.head = nn.Linear(8, 3)
        for gate in (self.first.gate, self.second.gate):
            nn.init.normal_(gate.weight)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
        return self.head(self.second(self.first(patches)).mean(1))


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return torch.rand(30, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(30) % 3


def test_sums_levels_and_gated_blocks(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    model = Several()
    grids = dict.fromkeys(("first", "second"), (3, 3))
    html = browse_model(
        model, x, y, samples=Images(x), classes=["a", "b", "c"], grids=grids, k=4, removed=2, batch_size=7
    )
    (view,) = views_of(html)
    levels = [("first", 0, 5), ("second", 0, 4), ("second", 1, 3)]
    assert [(level["layer"], level["level"], level["total"]) for level in view["levels"]] == levels
    assert "2 most used experts of each level on 30 inputs" in html and "largest coefficient of its" in html
    with torch.no_grad():
        patches = x.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
        a = model.second(model.first(patches), return_coefficients=True)[1][1]
    for expert in view["levels"][2]["experts"]:
        of_images = a[..., expert["n"]].amax(1)
        assert [top["i"] for top in expert["top"]] == of_images.sort(descending=True, stable=True).indices[
            :4
        ].tolist()
        for top in expert["top"]:
            assert top["rows"] == pytest.approx(a[top["i"], :, expert["n"]].tolist(), abs=1e-3)
    removed = [expert for expert in view["levels"][1]["experts"] if expert["effect"] is not None]
    numbers = [expert["n"] for expert in removed]
    effects = ablation_effects(model, model.second, [(x, y)], 3, level=0, experts=numbers).abs().sum(1)
    assert len(removed) == 2
    assert [expert["effect"] for expert in removed] == pytest.approx(effects.tolist(), abs=1e-5)
    # The heat map: the share of each class in an expert's coefficients.
    drawn = view["levels"][0]["map"]
    with torch.no_grad():
        pooled = model.first(patches, return_coefficients=True)[1][0].amax(1)
    shares = torch.stack([pooled[y == c].sum(0) for c in range(3)], 1)
    shares /= shares.sum(1, keepdim=True)
    drawn_shares = np.frombuffer(base64.b64decode(drawn["data"]), np.uint8).reshape(5, 3)
    assert drawn["labels"] == [0, 1, 2] and np.abs(drawn_shares / 255 - shares.numpy()).max() < 0.003


def test_plain_rows_without_labels() -> None:
    torch.manual_seed(0)
    html = browse_model(nn.Sequential(MuMoE(6, 2, experts=4, rank=2)), torch.randn(9, 6), k=2)
    (view,) = views_of(html)
    (level,) = view["levels"]
    assert level["layer"] == "0" and level["map"] is None and not view["samples"]
    assert all(not expert["bars"] and expert["effect"] is None for expert in level["experts"])


def test_a_classifier_that_returns_more_than_logits() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = MuMoE(6, 3, experts=4, rank=2, gate="softmax", gate_norm="none")

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.layer(x))

    model, x, y = Outer(), torch.randn(20, 6), torch.arange(20) % 3
    (of_outer,), (of_layer,) = (collect(each, x, y) for each in (model, model.layer))
    assert torch.equal(of_outer.effects, of_layer.effects) and of_outer.effects.abs().sum() > 0


def test_rare_tokens_are_one_label(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = MuMoE(4, 9, experts=3, rank=2)
    model = nn.Sequential(nn.Embedding(9, 4), layer)
    tokens = torch.tensor([[0, 1, 1, 2, 2, 2, 3, 4]])
    whole = collect(model, tokens, tokens, removed=0)[0]
    monkeypatch.setattr(import_module("mumoe_tensor.browser.collect"), "MOST_SUMS", 9)
    (level,) = collect(model, tokens, tokens, removed=0)
    assert level.labels.tolist() == [1, 2, -1] and level.frequency.tolist() == [0.25, 0.375, 0.375]
    torch.testing.assert_close(level.sums[:, 2], whole.sums[:, [0, 3, 4]].sum(1))
    torch.testing.assert_close(level.sums[:, :2], whole.sums[:, 1:3])
    (view,) = views_of(page(View([level])))
    assert {bar[0] for expert in view["levels"][0]["experts"] for bar in expert["bars"]} <= {1, 2}


def test_stored_coefficients_in_the_place_of_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = MuMoE(4, 9, experts=(5, 3), rank=2, gate_norm="layer")
    nn.init.normal_(layer.gate.weight)
    model = nn.Sequential(nn.Embedding(9, 4), layer)
    tokens = torch.randint(9, (7, 8))
    stored = collect_coefficients(model, [*tokens], tmp_path / "coefficients", shard_rows=20, batch_size=2)
    options = {"k": 3, "passage": 4, "batch_size": 3, "removed": 1}
    expected = collect(model, tokens, tokens, **options)
    made = collect(model, tokens, tokens, coefficients=stored, **options)
    for one, other in zip(made, expected, strict=True):
        assert torch.equal(one.top, other.top) and torch.equal(one.rows, other.rows)
        torch.testing.assert_close(one.sums, other.sums)
        torch.testing.assert_close(one.usage.mean, other.usage.mean)
        torch.testing.assert_close(one.effects, other.effects, equal_nan=True)
    with pytest.raises(ValueError, match="must be for the 6 inputs"):
        collect(model, tokens[:6], coefficients=stored)
    with pytest.raises(ValueError, match=r"must include the gate '1\.gate' with"):
        collect(nn.Sequential(model[0], MuMoE(4, 9, experts=5, rank=2)), tokens, coefficients=stored)


def test_a_page_shows_something() -> None:
    with pytest.raises(ValueError, match="must have at least one view"):
        page()
    layer, x = MuMoE(6, 2, experts=4, rank=2), torch.randn(9, 6)
    for name, wrong in (("k", 0), ("removed", -1), ("experts", 0), ("batch_size", 0)):
        with pytest.raises(ValueError, match=f"{name} must"):
            browse_model(layer, x, **{name: wrong})
    with pytest.raises(ValueError, match="2 names, one per class"):
        browse_model(layer, x, torch.arange(9) % 2, classes=["a"])


@pytest.mark.parametrize("width", [1280, 420])
def test_two_models_in_a_browser(visit: Any, data: tuple[Tensor, Tensor], tmp_path: Path, width: int) -> None:
    x, y = data
    views = []
    for experts in (70, 30):
        torch.manual_seed(experts)
        layer = MuMoE(36, 3, experts=(4, experts), rank=2, gate="softmax", gate_norm="none")
        nn.init.normal_(layer.gate.weight)
        levels = collect(nn.Sequential(nn.Flatten(), layer), x, y, k=3, removed=0)
        views.append(View(levels, Images(x), title=f"{experts} experts", classes=["a", "b", "c"]))
    path = tmp_path / "two.html"
    path.write_text(page(*views), encoding="utf-8")
    tab, errors = visit(path, width)
    tab.wait_for_selector(".card")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    heads = tab.locator("h1")
    assert [heads.nth(k).is_visible() for k in (0, 1)] == [True, width == 1280]
    # An address opens an expert of the level and the model that it names.
    tab.evaluate("location.hash = 'expert=27&layer=1&level=1&model=2'")
    tab.wait_for_selector(".opened")
    assert tab.inner_text(".opened h2") == "Expert 27" and heads.nth(1).is_visible()
    assert tab.evaluate("views[1].level.level") == 1 and tab.evaluate("views[0].level.level") == 0
    box = tab.locator(".opened").bounding_box()
    assert box is not None and 0 < box["y"] < 900
    assert tab.inner_text(".opened h2 a") == "Expert 27"
    assert tab.get_attribute(".opened h2 a", "href") == "#expert=27&layer=1&level=1&model=2"
    # A column of the map is an expert with its class, and its card one click away.
    tab.evaluate("""() => {
        const canvas = document.querySelectorAll('.map canvas')[1];
        const {left, top} = canvas.getBoundingClientRect();
        for (const kind of ['mousemove', 'click'])
            canvas.dispatchEvent(new MouseEvent(kind, {clientX: left + 3, clientY: top + 3}));
    }""")
    first = tab.evaluate("views[1].columns[0].expert.n")
    tab.wait_for_function(f"document.querySelector('.opened h2')?.textContent === 'Expert {first}'")
    levels = views[1].levels[1]
    assert levels.sums is not None
    share = (levels.sums[first] / levels.sums[first].sum())[0]
    assert f"Expert {first}, a: {100 * share:.0f}"[:-1] in tab.locator(".map output").nth(1).inner_text()
    # Cards are as high as what they show.
    heights = "[...document.querySelectorAll('.card')].every(c => c.scrollHeight <= c.clientHeight + 1)"
    assert tab.evaluate(heights) and errors == []


@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_is_light_or_dark(browser: Any, tmp_path: Path, width: int) -> None:
    torch.manual_seed(0)
    path = tmp_path / "page.html"
    path.write_text(browse_model(MuMoE(6, 2, experts=4, rank=2), torch.randn(9, 6)), encoding="utf-8")
    colours = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(
            offline=True, color_scheme=scheme, viewport={"width": width, "height": 900}
        )
        tab = context.new_page()
        tab.goto(path.as_uri())
        style = "getComputedStyle(document.body)"
        colours[scheme] = tab.evaluate(
            f"[{style}.color, {style}.backgroundColor].map(c => +c.match(/\\d+/)[0])"
        )
        context.close()
    (text, back), (dark_text, dark_back) = colours["light"], colours["dark"]
    assert back - text > 150 and dark_text - dark_back > 150


# ---- by the command ---------------------------------------------------------------------------------------

CODE = """
import torch
from mumoe_tensor.nn import MuMoE

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), MuMoE(16, 3, experts=4, rank=2))

def text():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer = torch.nn.Embedding(128, 8), MuMoE(8, 128, experts=4, rank=2)
        def forward(self, tokens):
            return self.layer(self.embedding(tokens))
    class Tokenizer:
        def __call__(self, text, **options):
            return {"input_ids": [min(ord(letter), 127) for letter in text]}
        def decode(self, tokens):
            return "".join(map(chr, tokens))
    return Model(), Tokenizer()

def wrong():
    return 3

def mapping():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build()
        def forward(self, x):
            return {"logits": self.model(x)}
    return Model()

def damaged():
    model = build()
    torch.nn.init.constant_(model[1].experts.factor_0, float("nan"))
    return model

def fails():
    raise KeyError("no weights")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    name = f"own_model_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    x = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "rows.npz", x=x, y=np.arange(20) % 3)
    np.savez(tmp_path / "plain.npz", x=x / 255)
    np.savez(tmp_path / "wide.npz", x=np.ones((20, 5, 5)))
    np.savez(tmp_path / "counts.npz", x=np.ones((20, 4, 4), dtype=np.int64))
    np.savez(tmp_path / "missing.npz", x=np.full((20, 4, 4), np.nan))
    np.savez(tmp_path / "more.npz", x=x, y=np.arange(20) % 3 + 1)
    np.savez(tmp_path / "few.npz", x=x[:3])
    np.savez(tmp_path / "none.npz", x=x[:0])
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "Some words. " * 50}) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def inspect(folder: Path, function: str, line: str) -> Any:
    (code,) = folder.glob("*.py")
    return CliRunner().invoke(app, ["inspect", "--model", f"{code.stem}:{function}", *line.split()])


def test_a_model_is_built_and_inspected(folder: Path) -> None:
    done = inspect(folder, "build", "--data rows.npz --classes a,b,c --allow-import --out page.html")
    assert done.exit_code == 0, done.stderr
    (view,) = views_of((folder / "page.html").read_text())
    x = np.load("rows.npz")["x"]
    assert view["samples"] and view["classes"] == {"0": "a", "1": "b", "2": "c"}
    assert all(uri == Images(x).shown(int(index)) for index, uri in view["samples"].items())
    done = inspect(folder, "build", "--data plain.npz --images rows.npz --rows 5 --allow-import")
    assert done.exit_code == 0, done.stderr
    (view,) = views_of((folder / "experts.html").read_text())
    assert set(map(int, view["samples"])) <= set(range(5)) and not view["classes"]


def test_a_language_model_is_built_and_inspected(folder: Path) -> None:
    done = inspect(folder, "text", "--texts texts.jsonl --removed 1 --allow-import")
    assert done.exit_code == 0, done.stderr
    (view,) = views_of((folder / "experts.html").read_text(encoding="utf-8"))
    assert view["language"] and "".join(view["samples"]["0"]) == ("Some words. " * 3)[: models.PASSAGE]


@pytest.mark.parametrize(
    ("function", "line", "wrong"),
    [
        ("build", "--data rows.npz", "allow it with --allow-import"),
        ("build", "--allow-import", "exactly one of data and texts"),
        ("build", "run --data rows.npz --allow-import", "either the folder of a run or --model"),
        (
            "build",
            "--data rows.npz --beside run --allow-import",
            "--beside can only be used with folders of runs",
        ),
        (
            "wrong",
            "--data rows.npz --allow-import",
            "must return a torch.nn.Module, or a module and a tokenizer; got int",
        ),
        ("fails", "--data rows.npz --allow-import", "raises KeyError: 'no weights'"),
        ("missing", "--data rows.npz --allow-import", "raises AttributeError"),
        ("build", "--texts texts.jsonl --allow-import", "must return the model and its tokenizer"),
        ("build", "--data texts.jsonl --allow-import", "texts.jsonl: "),
        ("build", "--data rows.npz --rows 0 --allow-import", "rows must be positive"),
        ("build", "--data rows.npz --shown 0 --allow-import", "shown must be positive, got 0"),
        ("build", "--data rows.npz --removed -1 --allow-import", "removed must not be negative, got -1"),
        ("build", "--data rows.npz --classes a --allow-import", "3 names, one per class"),
        ("build", "--data wide.npz --allow-import", "must take inputs such as x, of shape (2, 5, 5)"),
        ("build", "--data counts.npz --allow-import", "torch.int64; it raises RuntimeError"),
        ("build", "--data missing.npz --allow-import", "inputs must be finite"),
        ("build", "--data more.npz --allow-import", "a logit for each of 4 classes, got (2, 3)"),
        ("damaged", "--data rows.npz --allow-import", "the parameter 1.experts.factor_0 is not finite"),
        ("build", "--data none.npz --allow-import", "x must have inputs; none.npz has none"),
        ("mapping", "--data rows.npz --allow-import", "a logit for each of 3 classes, got dict"),
        (
            "build",
            "--data rows.npz --images few.npz --allow-import",
            "one image for each of 20 inputs, got 3",
        ),
        ("text", "--texts texts.jsonl --classes a,b --allow-import", "images and classes need data"),
    ],
)
def test_what_is_refused(folder: Path, function: str, line: str, wrong: str) -> None:
    done = inspect(folder, function, line)
    assert done.exit_code == 2 and wrong in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(folder.glob("*.html"))
