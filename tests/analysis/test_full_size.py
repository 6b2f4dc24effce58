"""The analysis of a stream, whose coefficients are never there all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from benchmarks.analysis import BATCH, KEPT, Analysis, main, measure  # noqa: E402
from mumoe_tensor.analysis import watch_coefficients  # noqa: E402


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system tells no peak memory")
def test_the_peak_is_far_below_all_coefficients() -> None:
    (row,) = measure(40_000, 500).rows
    assert (row["inputs"], row["experts"]) == (40_000, 500)
    assert row["at once MiB"] == 4 * 40_000 * 500 / 2**20
    assert row["peak MiB"] < row["at once MiB"] / 3


def test_a_stream_has_the_figures_of_all_coefficients_together() -> None:
    experts, inputs = 20, 2 * BATCH + 10
    analysis, seen = Analysis(experts), []
    with watch_coefficients(analysis.layer, lambda name, a: seen.extend(a)):
        analysis.run(inputs)
    a: Any = torch.cat(seen)
    usage = analysis.usage.statistics()
    assert len(a) == usage.rows == analysis.by_label.all.sum() == inputs
    torch.testing.assert_close(usage.mean, a.double().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(usage.load, (a >= 0.5).double().mean(0))
    assert torch.equal(analysis.by_label.statistics().counts.sum(1), (a > 0).sum(0))
    torch.testing.assert_close(analysis.top.coefficients, a.topk(KEPT, dim=0).values.T)


def test_sizes_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--inputs", "0"])
    assert "must be positive, got 0" in capsys.readouterr().err
