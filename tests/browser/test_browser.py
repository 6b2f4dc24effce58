"""The page of experts says what the model does, and stays quick with many of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

from views import views_of  # noqa: E402

from mumoe_tensor.analysis import ablate, loss_effects  # noqa: E402
from mumoe_tensor.browser import Images, Sample, Texts, View, collect, page  # noqa: E402
from mumoe_tensor.models.gpt2 import GPT2, GPT2Config  # noqa: E402
from mumoe_tensor.nn import MuMoE, MuMoEMLP  # noqa: E402


class Two(torch.nn.Module):
    """A classifier with two layers of experts, of one and two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = MuMoE(6, 8, experts=5, rank=4, gate_norm="layer")
        self.second = MuMoEMLP(8, 7, 3, experts=(4, 3), rank=4, gate_norm="layer")
        for gate in (self.first.gate, self.second.gate):
            torch.nn.init.normal_(gate.weight)

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return Two()


@pytest.fixture
def data() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(70, 6, generator=generator), torch.arange(70) % 3


def test_figures_are_those_of_the_model(model: Any, data: tuple[Any, Any]) -> None:
    x, y = data
    model.train()
    levels = collect(model, x, y, k=4, batch_size=16)
    assert model.training and [(level.layer, level.level) for level in levels] == [
        ("first", 0), ("second", 0), ("second", 1),
    ]  # fmt: skip
    model.eval()
    with torch.no_grad():
        _, (a,) = model.first(x, return_coefficients=True)
        right = model(x).argmax(1) == y
        (first, *_) = levels
        torch.testing.assert_close(first.usage.mean, a.double().mean(0), atol=1e-6, rtol=1e-5)
        for n in range(5):
            best = a[:, n].sort(descending=True, stable=True)
            count = int((a[:, n] > 0).sum().clamp(max=4))
            assert first.top[n, :count].tolist() == best.indices[:count].tolist()
            torch.testing.assert_close(first.coefficients[n, :count].float(), best.values[:count])
            sums = [a[y == c, n].sum().item() for c in range(3)]
            torch.testing.assert_close(first.sums[n], torch.tensor(sums))
            with ablate(model.first, [n]):
                without = model(x).argmax(1) == y
            for c in range(3):
                change = (without[y == c].double().mean() - right[y == c].double().mean()).item()
                assert first.effects[n, c].item() == pytest.approx(change, abs=1e-6)
    assert levels[1].top.shape == (4, 4) and levels[2].top.shape == (3, 4)


def test_without_labels_there_are_no_classes(model: Any, data: tuple[Any, Any]) -> None:
    levels = collect(model, data[0])
    assert all(level.sums is None and level.effects is None and level.rows is None for level in levels)
    with pytest.raises(ValueError, match="each input or token must have one label"):
        collect(model, data[0], data[1][:3])
    with pytest.raises(ValueError, match="must have an ExpertGate"):
        collect(torch.nn.Linear(6, 3), data[0])


def test_tokens_have_their_coefficients(data: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    layer = MuMoE(6, 3, experts=4, rank=2, gate_norm="layer")
    torch.nn.init.normal_(layer.gate.weight)
    x = data[0].reshape(10, 7, 6)
    (level,) = collect(layer, x, k=2)
    with torch.no_grad():
        (a,) = layer.gate(x)
    for n in range(4):
        of_text = a[..., n].amax(1)
        assert level.top[n, 0] == of_text.argmax()
        torch.testing.assert_close(level.rows[n], a[level.top[n], :, n])
    assert level.usage.rows == 70


def test_the_rows_of_an_input_may_count_on_average(data: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    layer = MuMoE(6, 3, experts=4, rank=2, gate_norm="layer")
    torch.nn.init.normal_(layer.gate.weight)
    x, y = data[0].reshape(10, 7, 6), torch.arange(10) % 2
    (level,) = collect(layer, x, y, k=2, batch_size=4, pool="mean", removed=0)
    with torch.no_grad():
        a = layer.gate(x)[0].mean(1)
    assert level.top.tolist() == a.topk(2, dim=0).indices.T.tolist()
    torch.testing.assert_close(level.sums, torch.stack([a[y == c].sum(0) for c in range(2)], 1))


class Language(torch.nn.Module):
    """Predicts the next of 11 tokens from the last."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.layer = MuMoE(6, 11, experts=5, rank=4, gate_norm="layer")
        torch.nn.init.normal_(self.layer.gate.weight)

    def forward(self, tokens: Any) -> Any:
        return self.layer(self.embedding(tokens))


def test_passages_and_tokens_of_a_language_model() -> None:
    torch.manual_seed(0)
    model = Language()
    windows = torch.randint(11, (9, 13))
    x, y = windows[:, :-1], windows[:, 1:]
    (level,) = collect(model, x, y, k=3, batch_size=4, passage=4, removed=2, effect_inputs=5)
    with torch.no_grad():
        (a,) = model.layer.gate(model.embedding(x))
    passages = a.reshape(27, 4, 5)
    for n in range(5):
        best = passages[..., n].amax(1)
        assert level.coefficients[n].tolist() == pytest.approx(best.topk(3).values.tolist())
        torch.testing.assert_close(level.rows[n], passages[level.top[n], :, n])
        for place, token in enumerate(level.labels.tolist()):
            assert level.sums[n, place].item() == pytest.approx(a[x == token][:, n].sum().item(), abs=1e-5)
    assert level.frequency.tolist() == pytest.approx([(x == t).double().mean().item() for t in level.labels])
    # The two most used experts were removed, in the first five texts.
    used = level.usage.mean.topk(2).indices.sort().values.tolist()
    expected = loss_effects(model, model.layer, [(x[:5], y[:5])], experts=used)
    torch.testing.assert_close(level.effects[used], expected, atol=1e-6, rtol=1e-4)
    assert level.is_language and level.effects.isnan().sum() == 3
    with pytest.raises(ValueError, match="in whole passages of 5 rows"):
        collect(model, x, y, passage=5)
    names = {token: f"t{token}" for token in range(11)}
    # On the page: what the coefficients of the first expert go to beyond its frequency.
    view = content(page(View([level], Texts([["a", "b", "c", "d"]] * 27), classes=names)))
    (experts,) = (each["experts"] for each in view["levels"])
    excess = level.sums[0] / level.sums[0].sum() - level.frequency
    bars = experts[0]["bars"]
    assert [bar[1] for bar in bars] == sorted((bar[1] for bar in bars), reverse=True)
    ((label, share, remark),) = (bar for bar in bars if bar[0] == level.labels[excess.argmax()])
    assert label == level.labels[excess.argmax()] and view["classes"][str(label)] == f"t{label}"
    usual = level.frequency[excess.argmax()].item()
    assert share == pytest.approx(excess.max().item() + usual, abs=1e-5) and remark == f"×{share / usual:.1f}"
    assert [n for n in range(5) if experts[n]["effect"] is not None] == used


def test_images_are_shown_as_they_are() -> None:
    from base64 import b64decode
    from io import BytesIO

    from PIL import Image

    for pixels in (np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3), np.linspace(0, 1, 16).reshape(1, 4, 4)):
        uri = Images(pixels).shown(0)
        drawn = np.asarray(Image.open(BytesIO(b64decode(uri.partition(",")[2]))))
        expected = pixels[0] if pixels.dtype == np.uint8 else np.round(255 * pixels[0]).astype(np.uint8)
        np.testing.assert_array_equal(drawn, expected)
    with pytest.raises(ValueError, match="must have shape"):
        Images(np.zeros((3, 4)))


def content(html: str) -> Any:
    (view,) = views_of(html)
    return view


def test_the_page_has_the_samples_that_are_shown(model: Any, data: tuple[Any, Any]) -> None:
    x, y = data
    levels = collect(model, x, y, k=2)
    texts = Texts([["</script>", f"<b>{n}"] for n in range(70)])
    html = page(View(levels, texts, title="<i>x", classes=["a", "b", "c"]))
    assert "<i>x" not in html and "<b>1" in str(content(html)["samples"]) and html.count("</script>") == 2
    view = content(html)
    shown = {top["i"] for level in view["levels"] for expert in level["experts"] for top in expert["top"]}
    assert set(map(int, view["samples"])) == shown and view["classes"] == {"0": "a", "1": "b", "2": "c"}
    with pytest.raises(ValueError, match="every input must have a sample"):
        page(View(levels, Texts([["only one"]])))


def test_a_trained_head_is_inspected(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from mumoe_tensor.cli import app

    generator = np.random.default_rng(0)
    images = generator.random((40, 4, 4), dtype=np.float32)
    np.savez(tmp_path / "x.npz", x=images, y=np.arange(40) % 3)
    line = ["train", "head", "--features", str(tmp_path / "x.npz"), "--experts", "4", "--rank", "2"]
    run = CliRunner().invoke(
        app, [*line, "--epochs", "1", "--batch-size", "8", "--out", str(tmp_path / "run")]
    )
    assert run.exit_code == 0, run.stderr
    line = ["inspect", str(tmp_path / "run"), "--images", str(tmp_path / "x.npz"), "--classes", "a,b,c"]
    run = CliRunner().invoke(app, [*line, "--rows", "6"])
    assert run.exit_code == 0, run.stderr
    view = content((tmp_path / "run" / "experts.html").read_text())
    ((level),) = view["levels"]
    assert len(level["experts"]) == 4 and view["classes"] == {"0": "a", "1": "b", "2": "c"}
    assert set(map(int, view["samples"])) <= set(range(6))
    # The images are those of the validation rows, in their order.
    from mumoe_tensor.training import read_npz, split

    _, kept = split(read_npz(tmp_path / "x.npz"), 0.2, seed=0)
    shown = Images(kept.x.numpy() / max(1.0, float(images.max())))
    assert all(uri == shown.shown(int(index)) for index, uri in view["samples"].items())
    for line, wrong in (
        (["inspect", str(tmp_path)], "must contain a finished run"),
        (["inspect", str(tmp_path / "run"), "--rows", "0"], "rows must be positive"),
    ):
        run = CliRunner().invoke(app, line)
        assert run.exit_code == 2 and wrong in run.stderr and run.stderr.count("\n") == 1


# ---- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 1,000 experts with images."""
    torch.manual_seed(0)
    layer = MuMoE(6, 10, experts=1000, rank=4, gate="softmax", gate_norm="none")
    torch.nn.init.normal_(layer.gate.weight)
    x, y = torch.randn(200, 6), torch.arange(200) % 10
    images = Images(np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8))
    levels = collect(layer, x, y, removed=0)
    path = tmp_path_factory.mktemp("page") / "experts.html"
    path.write_text(page(View(levels, images, title="Many", classes=[f"class {c}" for c in "abcdefghij"])))
    return path


@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_in_a_browser(visit: Any, many: Path, width: int) -> None:
    tab, errors = visit(many, width)
    tab.wait_for_selector(".card img")
    assert tab.inner_text(".count") == "1000 of 1000"
    # Only what is near the window is drawn: that is why thousands do not lag.
    drawn = "document.querySelectorAll('.card').length"
    assert 0 < tab.evaluate(drawn) < 200
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    first = tab.inner_text(".card h2 >> nth=0")
    tab.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    tab.wait_for_function("[...document.querySelectorAll('.chunk')].at(-1).childElementCount > 0")
    assert tab.evaluate(drawn) < 200
    tab.evaluate("window.scrollTo(0, 0)")
    tab.select_option("#sort", "use")
    tab.wait_for_function("document.querySelector('.card h2') !== null")
    means = tab.evaluate("views[0].matches.map(expert => expert.mean)")
    assert means == sorted(means, reverse=True) and first == "Expert 0"
    tab.fill("#search", "37")
    tab.wait_for_function("document.querySelectorAll('.card h2').length === 1")
    assert tab.inner_text(".card h2") == "Expert 37" and tab.inner_text(".count") == "1 of 1000"
    tab.fill("#search", "class c")
    is_named = tab.evaluate("views[0].matches.every(e => e.bars.slice(0, 3).some(bar => bar[0] === 2))")
    assert is_named and tab.locator(".card").count() > 0
    assert errors == []


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 1,000 experts of a GPT-2, and of a text that it wrote."""
    torch.manual_seed(0)
    sizes = dict(vocabulary=50, context=16, width=12, depth=1, heads=2, hidden=8)
    model = GPT2(GPT2Config(**sizes, format="cp", experts=(1000,), rank=(4,), gate="softmax"))
    torch.nn.init.normal_(model.blocks[0].mlp.gate.weight)
    windows = torch.randint(50, (12, 17))
    levels = collect(model, windows[:, :-1], windows[:, 1:], passage=8, removed=3, k=3)
    tokens, coefficients = model.generate(windows[:1, :3], 9, return_coefficients=True)
    words = {token: f" word{token}" for token in range(50)}
    ((gate, (a,)),) = coefficients.items()
    written = Sample(
        [words[t] for t in tokens[0].tolist()], 3, {(gate.removesuffix(".gate"), 0): a[0]}, "Drawn."
    )
    texts = Texts([[words[t] for t in row] for row in windows[:, :-1].reshape(-1, 8).tolist()])
    path = tmp_path_factory.mktemp("page") / "language.html"
    path.write_text(page(View(levels, texts, classes=words, written=written)), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [1280, 420])
def test_tokens_are_shaded_in_a_browser(visit: Any, language: Path, width: int) -> None:
    tab, errors = visit(language, width)
    tab.wait_for_selector(".card .line")
    assert 0 < tab.evaluate("document.querySelectorAll('.card').length") < 200
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # The darkest token of a card is the one with the largest coefficient.
    shades = """card => {
        const rows = card.expert.top.flatMap(top => top.rows);
        const spans = [...card.querySelectorAll('.line span')];
        const alpha = span => parseFloat((span.style.background.match(/[0-9.]+(?=\\))/) || [0])[0]);
        return [rows, spans.map(alpha)];
    }"""
    rows, alphas = tab.eval_on_selector(".card", shades)
    assert len(rows) == len(alphas) == 24
    assert alphas.index(max(alphas)) == rows.index(max(rows)) and max(alphas) == pytest.approx(0.85)
    assert [a / 0.85 for a in alphas] == pytest.approx([row / max(rows) for row in rows], abs=0.01)
    tab.select_option("#sort", "effect")
    tab.wait_for_function("document.querySelector('.card h2') !== null")
    effects = tab.evaluate("views[0].matches.map(expert => expert.effect)")
    assert effects[:3] == sorted(effects[:3], reverse=True) and effects[3:] == [None] * 997
    assert "without it" in tab.inner_text(".card p >> nth=0")
    # The text it wrote: a token tells its experts, an expert shades the text.
    assert tab.locator(".written span").count() == 12 and tab.locator(".written .given").count() == 3
    tab.click(".written span >> nth=5")
    strongest = tab.evaluate("data[0].sample.levels[0][5]")
    assert len(strongest) == 8 and f"expert {strongest[0][0]}: " in tab.inner_text(".strongest")
    tab.fill("#search", str(strongest[0][0]))
    tab.click(".card h2 button")
    assert tab.inner_text(".shading").startswith(f"Shaded: expert {strongest[0][0]};")
    assert tab.evaluate("document.querySelectorAll('.written span')[5].style.background") != ""
    tab.fill("#search", "word7")
    named = "views[0].matches.map(e => e.bars.slice(0, 3).map(b => views[0].nameOf(b[0])))"
    cards = tab.evaluate(named)
    assert cards and all(any("word7" in name for name in names) for names in cards)
    assert errors == []


@pytest.mark.parametrize("width", [1280, 420])
def test_names_and_figures_appear_as_they_are(
    visit: Any, hostile: list[str], tmp_path: Path, width: int
) -> None:
    torch.manual_seed(0)
    head = MuMoE(6, len(hostile), experts=(6, 3), rank=4, gate_norm="layer")
    torch.nn.init.normal_(head.gate.weight)
    x, y = torch.randn(170, 6), torch.arange(170) % len(hostile)
    levels = collect(head, x, y, k=2)
    x[3, 0], x[4, 0] = torch.inf, torch.nan
    levels += collect(head, x, y, k=2)
    usage = replace(levels[0].usage, mean=torch.tensor([0.5, torch.nan, torch.inf, -torch.inf, 1e-5, 0.2]))
    lost = torch.tensor([0.5, -torch.inf, torch.nan, torch.inf, 0.0, 0.1])
    levels.append(replace(levels[0], usage=usage, effects=lost))
    levels = [replace(level, layer=name) for level, name in zip(levels * 4, hostile, strict=False)]
    assert [level.layer for level in levels] == hostile
    images = Images(np.random.default_rng(0).random((170, 4, 4)))
    path = tmp_path / "experts.html"
    title = " ".join(hostile)
    path.write_text(page(View(levels, images, title=title, about=title, classes=hostile)), encoding="utf-8")
    tab, errors = visit(path, width)
    tab.evaluate("document.querySelector('.cards').scrollIntoView()")
    tab.wait_for_selector(".card h2")
    shown = "selector => [...document.querySelectorAll(selector)].map(element => element.textContent)"
    assert tab.evaluate(shown, "title, h1, .about") == [title] * 3
    assert [text.partition(", level ")[0] for text in tab.evaluate(shown, ".level option")] == hostile
    named = set()
    for k, level in enumerate(levels):
        tab.select_option(".level", str(k))
        for order in ("use", "effect", "clarity", "number"):
            tab.select_option("#sort", order)
            tab.wait_for_selector(".card")
        assert tab.locator(".card").count() == len(level.top)
        named.update(tab.evaluate(shown, ".bars span"))
    assert named <= set(hostile) and len(named) > 10
    tab.select_option(".level", "4")
    means = ["50.0 %", "NaN %", "∞ %", "−∞ %", "< 0.01 %", "20.0 %"]
    effects = ["0.500", "−∞", None, "∞", "0.000", "0.100"]
    for n, (mean, effect) in enumerate(zip(means, effects, strict=True)):
        line = tab.inner_text(f".card:nth-child({n + 1}) h2 + p")
        assert line.startswith(f"mean coefficient {mean}, load ")
        assert line.endswith(f", effect {effect}") if effect else "effect" not in line
    for order, first in (("use", [2, 0, 5, 4]), ("effect", [3, 0, 5, 4])):
        tab.select_option("#sort", order)
        assert tab.evaluate("views[0].matches.map(expert => expert.n)")[:4] == first
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("window.hacked") is None and errors == []


def test_tokens_appear_as_they_are(visit: Any, hostile: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = dict(vocabulary=len(hostile), context=8, width=12, depth=1, heads=2, hidden=8)
    model = GPT2(GPT2Config(**sizes, format="cp", experts=(4,), rank=(4,), gate="softmax"))
    torch.nn.init.normal_(model.blocks[0].mlp.gate.weight)
    windows = torch.arange(len(hostile)).repeat(9)[: 16 * 9].reshape(16, 9)
    levels = collect(model, windows[:, :-1], windows[:, 1:], k=3)
    levels[0].rows[..., :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    coefficients = torch.rand(len(hostile), 4)
    coefficients[1], coefficients[2], coefficients[3, 0] = torch.nan, torch.inf, -torch.inf
    written = Sample(hostile, 2, {(levels[0].layer, 0): coefficients}, " ".join(hostile))
    texts = Texts([[hostile[t] for t in row] for row in windows[:, :-1].tolist()])
    path = tmp_path / "language.html"
    path.write_text(page(View(levels, texts, classes=hostile, written=written)), encoding="utf-8")
    tab, errors = visit(path, 1280)
    tab.wait_for_selector(".card .line")
    assert tab.locator(".card").count() == 4
    shown = "selector => [...document.querySelectorAll(selector)].map(element => element.textContent)"
    assert tab.evaluate(shown, ".written span") == hostile
    assert tab.evaluate(shown, ".sample h2 + p") == [" ".join(hostile)]
    spans = tab.evaluate(shown, ".card .line span")
    assert len(spans) == 4 * 3 * 8 and set(spans) <= set(hostile)
    titles = tab.evaluate(
        "[...document.querySelectorAll('.card .line')].map(x => [...x.children].map(s => s.title))"
    )
    assert all(each[:3] == ["NaN", "∞", "−∞"] for each in titles)
    for place, strongest in ((1, "NaN"), (2, "∞")):
        tab.evaluate("place => document.querySelectorAll('.written span')[place].click()", place)
        assert f"expert 0: {strongest}" in tab.inner_text(".strongest")
    assert tab.evaluate("window.hacked") is None and errors == []
