"""Small studies: one that is really run, and one whose measurements are set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("plotly")
pytest.importorskip("sklearn")

from samples import MEASURED, SMALL, measurements  # noqa: E402

from mumoe_tensor import study as studies  # noqa: E402
from mumoe_tensor.study import sweep as sweeps  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products in several threads wait for each other more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[studies.Plan, studies.Results, Path]:
    """A study that is run, but for the processes that measure memory."""
    out = tmp_path_factory.mktemp("study") / "not" / "there" / "yet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "peaks", lambda subject, batch, device: (1000, 2000 + batch))
        results = studies.run(**MEASURED, out=out)
    return studies.plan(studies.prepare(**MEASURED)), results, out


@pytest.fixture(scope="session")
def made_up() -> tuple[studies.Plan, studies.Results]:
    """A study whose costs are computed and whose measurements are set."""
    planned = studies.plan(studies.prepare(**SMALL))
    results = studies.Results()
    results.add(measurements(planned), {"machine": "none"})
    return planned, results
