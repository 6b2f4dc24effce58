"""Settings of the whole suite: Hypothesis profiles, one thread a worker, JAX with float64 on request."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from vision import define_operators

# A test that needs fewer examples than the rest takes a share of the profile's number,
# `@settings(max_examples=settings().max_examples // 4)`, so that "thorough" multiplies it too.
EXAMPLES = 25
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=EXAMPLES, **_common)
settings.register_profile("ci", max_examples=EXAMPLES, derandomize=True, print_blob=True, **_common)
# For a planted fault it matters only that some example fails, not which one is the smallest.
_first = {
    "max_examples": 2 * EXAMPLES,
    "phases": [Phase.explicit, Phase.generate],
    "report_multiple_bugs": False,
}
settings.register_profile("fault", settings.get_profile("ci"), **_first)
settings.register_profile("thorough", max_examples=40 * EXAMPLES, **_common)
settings.load_profile(os.environ.get("MUMOE_HYPOTHESIS_PROFILE", "default"))

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores. The variables reach NumPy's BLAS and the processes that tests start.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)


gc.disable()  # imports and collection leave little garbage


def pytest_collection_finish() -> None:
    """Collect garbage more rarely, and without looking at modules and tests, which stay."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def jax_x64() -> Iterator[None]:
    """JAX with float64 for one test. Under ``@given`` use ``with jax.enable_x64(True):`` instead."""
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of formats for one test."""
    from mumoe_tensor.formats import registry

    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


@pytest.fixture(scope="session")
def torchvision_schemas() -> Iterator[None]:
    """What torchvision, and so timm, needs to be imported beside another build of torch than its own.

    A test that imports either asks for this first; see `define_operators`.
    """
    pytest.importorskip("torch")
    library = define_operators()
    if library is None:
        pytest.skip("torchvision is not installed")
    yield
    del library


@pytest.fixture
def transformers(request: pytest.FixtureRequest) -> Any:
    """The package, which imports torchvision where that is."""
    if importlib.util.find_spec("torchvision") is not None:
        request.getfixturevalue("torchvision_schemas")
    return pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium. Tests that need it are skipped where there is none; under CI they fail."""
    give_up = pytest.fail if os.environ.get("CI") else pytest.skip
    if importlib.util.find_spec("playwright") is None:
        give_up("playwright is not installed")
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((path for path in map(shutil.which, names) if path), None)
    if chromium is None:
        give_up("no Chromium on this machine")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as run:
        started = run.chromium.launch(executable_path=chromium, args=arguments)
        yield started
        started.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[[Path, int], tuple[Any, list[str]]]]:
    """Opens a page in a window of some width, without a network: its tab, and the list of its complaints.

    These are errors, what is written to the console, and requests to the network.
    """
    contexts = []

    def opened(path: Path, width: int) -> tuple[Any, list[str]]:
        contexts.append(browser.new_context(offline=True, viewport={"width": width, "height": 900}))
        tab, events = contexts[-1].new_page(), []
        tab.on("console", lambda message: events.append(message.text))
        tab.on("pageerror", lambda error: events.append(str(error)))
        tab.on("request", lambda sent: events.append(sent.url) if sent.url.startswith("http") else None)
        tab.goto(path.as_uri())
        return tab, events

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def hostile() -> list[str]:
    """Names that must appear as they are, and do nothing."""
    return [
        "<!--<script>",
        "--></script><script>window.hacked=1</script>",
        "</title></style></textarea><img src=x onerror=window.hacked=1>",
        '"><img src=x onerror=window.hacked=1>',
        "' onmouseover='window.hacked=1",
        "${window.hacked=1} `${1}` %{x} {{1}} {0} %s",
        "back\\slash \\u003c \\n \\",
        "line\u2028separator\u2029s",
        "&lt;b&gt; &amp; &#60; &copy",
        "<b>bold</b><br><a href='javascript:window.hacked=1'>a</a><sub>2</sub>",
        "$x$ ${1}$ $\\frac$",
        "עברית \u202eabc\u202c",
        "👩\u200d🔬 é e\u0301 ∞",
        "NaN",
        "__proto__",
        '=1+1,"a";b\t',
        "long " * 200,
    ]
