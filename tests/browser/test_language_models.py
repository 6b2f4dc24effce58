"""The page of some layers of a language model from any library, with more experts than it shows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from views import views_of  # noqa: E402

from mumoe_tensor.analysis import loss_effects  # noqa: E402
from mumoe_tensor.browser import browse_language_model, collect, models  # noqa: E402
from mumoe_tensor.nn import MuMoE  # noqa: E402

EXPERTS, VOCABULARY = 1000, 31


class Language(nn.Module):
    """As of transformers: blocks in a list, and an output with logits in it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        gate = {"name": "relu_topk", "k": 3}
        options: dict[str, Any] = {"rank": 4, "gate": gate, "gate_norm": "none"}
        self.blocks = nn.ModuleList(MuMoE(8, 8, experts=n, **options) for n in (EXPERTS, 12, 5))
        self.blocks.append(MuMoE(8, 8, experts=(), format="dense"))

    def forward(self, tokens: Tensor) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return SimpleNamespace(logits=self.head(x))


@pytest.fixture(scope="module")
def model() -> Language:
    torch.manual_seed(0)
    return Language()


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(VOCABULARY, (6, 70), generator=torch.Generator().manual_seed(1))


def decode(tokens: list[int]) -> str:
    (token,) = tokens
    return f" {token}"


def content(html: str) -> Any:
    (view,) = views_of(html)
    return view


@pytest.fixture(scope="module")
def html(model: Language, windows: Tensor) -> str:
    layers = ["blocks.2", "blocks.0"]
    return browse_language_model(model, decode, windows, layers, experts=20, removed=2, k=4, about="Numbers.")


def test_the_most_used_experts_are_shown(html: str, model: Language, windows: Tensor) -> None:
    view = content(html)
    assert [(level["layer"], level["total"]) for level in view["levels"]] == [
        ("blocks.2", 5), ("blocks.0", EXPERTS),
    ]  # fmt: skip
    x, y = windows[:, :64], windows[:, 1:65]  # two passages of 32 tokens, and what follows
    with torch.no_grad():
        a = model.blocks[0](model.embed(x), return_coefficients=True)[1][0]
    mean = a.flatten(0, 1).mean(0)
    experts = view["levels"][1]["experts"]
    assert [expert["n"] for expert in experts] == mean.argsort(descending=True)[:20].sort().values.tolist()
    passages = a.reshape(12, 32, EXPERTS)
    for expert in experts:
        n = expert["n"]
        assert expert["mean"] == pytest.approx(mean[n].item(), abs=1e-6)
        assert expert["load"] == pytest.approx((a[..., n] > 0).double().mean().item(), abs=1e-6)
        best = passages[..., n].amax(1).topk(4)
        assert [top["a"] for top in expert["top"]] == pytest.approx(
            best.values[best.values > 0].tolist(), abs=1e-4
        )
        for top in expert["top"]:
            assert top["rows"] == pytest.approx(passages[top["i"], :, n].tolist(), abs=1e-3)
    shown = x.reshape(12, 32)
    for index, tokens in view["samples"].items():
        assert tokens == [f" {token}" for token in shown[int(index)].tolist()]
    # The most used two of each level were removed, in nats.
    for level, layer in zip(view["levels"], (model.blocks[2], model.blocks[0]), strict=True):
        removed = [expert for expert in level["experts"] if expert["effect"] is not None]
        assert len(removed) == 2
        expected = loss_effects(model, layer, [(x, y)], experts=[expert["n"] for expert in removed])
        assert [expert["effect"] for expert in removed] == pytest.approx(expected.tolist(), abs=2e-6)


def test_the_page_says_how_many_experts_are_used(html: str, model: Language, windows: Tensor) -> None:
    levels = collect(model, windows[:, :64], windows[:, 1:65], layers=["blocks.0"], removed=0)
    (usage,) = (level.usage for level in levels)
    view = content(html)["levels"][1]
    assert (view["total"], view["dead"]) == (EXPERTS, usage.dead)
    assert view["active"] == pytest.approx(usage.active * EXPERTS, abs=0.01)
    assert "Numbers." in html and "Load: tokens with a coefficient above zero." in html
    assert "measured for the 2 most used experts of each level on 384 tokens" in html


def test_the_page_has_a_size_that_does_not_grow_with_the_experts(model: Language, windows: Tensor) -> None:
    few, many = (
        len(browse_language_model(model, decode, windows, ["blocks.0"], experts=n, removed=0))
        for n in (20, 40)
    )
    assert many < 2 * few and many - few < 20 * 4096


def test_batches_change_nothing(model: Language, windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = []
    for tokens in (2048, 128):  # (of 64 tokens a window, two passages each)
        monkeypatch.setattr(models, "BATCH_TOKENS", tokens)
        pages.append(content(browse_language_model(model, decode, windows, ["blocks.1"], removed=0)))
    assert pages[0]["samples"] == pages[1]["samples"]
    for one, other in zip(*(page["levels"][0]["experts"] for page in pages), strict=True):
        assert [top["i"] for top in one["top"]] == [top["i"] for top in other["top"]]
        for top, same in zip(one["top"], other["top"], strict=True):
            assert top["rows"] == pytest.approx(same["rows"], abs=2e-3)


def test_effects_are_those_in_the_first_inputs(model: Language, windows: Tensor) -> None:
    x, y = windows[:, :-1], windows[:, 1:]
    (level,) = collect(model, x, y, layers=["blocks.2"], removed=1, effect_inputs=2, batch_size=1)
    expert = int(level.usage.mean.argmax())
    expected = loss_effects(model, model.blocks[2], [(x[:2], y[:2])], experts=[expert])
    torch.testing.assert_close(level.effects[[expert]], expected, atol=2e-6, rtol=0)
    assert int(level.effects.isfinite().sum()) == 1


def test_experts_that_nothing_uses_are_not_shown(model: Language) -> None:
    view = content(browse_language_model(model, decode, torch.zeros(1, 2).int(), ["blocks.0"], removed=0))
    (level,) = view["levels"]
    assert len(level["experts"]) <= 3 and all(expert["mean"] > 0 for expert in level["experts"])


@pytest.mark.parametrize("length", [2, 5, 33, 65])
def test_windows_of_any_length(model: Language, length: int) -> None:
    windows = torch.arange(3 * length).reshape(3, length) % VOCABULARY
    view = content(browse_language_model(model, decode, windows, ["blocks.1"], removed=0))
    size = min(32, length - 1)
    assert {len(tokens) for tokens in view["samples"].values()} == {size}
    assert view["samples"]["0"] == [f" {token}" for token in windows[0, :size].tolist()]


def test_what_is_refused(model: Language, windows: Tensor) -> None:
    for layer in ("blocks.7", "blocks.3", "embed", "block"):
        with pytest.raises(ValueError, match=rf"must have experts, as \['blocks.0.gate'.*'{layer}' has none"):
            browse_language_model(model, decode, windows, [layer])
    for wrong in (windows[0], windows[:, :1], windows[:0]):
        with pytest.raises(ValueError, match="windows must have shape"):
            browse_language_model(model, decode, wrong, ["blocks.0"])
    with pytest.raises(TypeError, match="tokens must be integers"):
        browse_language_model(model, decode, windows.float(), ["blocks.0"])
    for name, value in (("k", 0), ("experts", 0), ("removed", -1)):
        with pytest.raises(ValueError, match=f"{name} must (be positive|not be negative)"):
            browse_language_model(model, decode, windows, ["blocks.0"], **{name: value})


@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_in_a_browser(html: str, visit: Any, tmp_path: Path, width: int) -> None:
    path = tmp_path / "experts.html"
    path.write_text(html, encoding="utf-8")
    tab, errors = visit(path, width)
    tab.wait_for_selector(".card .line")
    options = tab.evaluate("[...document.querySelectorAll('.level option')].map(o => o.textContent)")
    assert options == [
        "blocks.2, level 0 (5 experts)", "blocks.0, level 0 (the 20 most used of 1000 experts)",
    ]  # fmt: skip
    tab.select_option(".level", "1")
    tab.select_option("#sort", "effect")
    tab.wait_for_selector(".card .line")
    assert tab.locator(".card").count() == 20 and tab.inner_text(".count") == "20 of 20"
    first = tab.evaluate("document.querySelector('.card').expert")
    line = tab.inner_text(".card h2 + p >> nth=0")
    # Coefficients of this gate are no shares.
    assert f"mean coefficient {first['mean']:.4f}, load " in line and "without it" in line
    assert tab.evaluate("document.documentElement.scrollWidth") <= width and errors == []
