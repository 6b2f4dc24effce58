"""The folder of a study has everything."""

from __future__ import annotations

import re
from pathlib import Path

from mumoe_tensor import study as studies
from mumoe_tensor.study.charts import NAMES


def test_the_folder_has_everything(study: tuple[studies.Plan, studies.Results, Path]) -> None:
    _, _, out = study
    expected = ["report.html", "results.csv", "study.json"]
    expected += [f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg")]
    assert sorted(path.name for path in out.iterdir()) == sorted(expected)
    page = (out / "report.html").read_text()
    assert not re.search(r"<[^>]+ (src|href)=", page.split('<script id="panels"')[0])
    for title in ("Dense MLP", "Block Tensor Train", "Sparse mixture, top 2", "Best format"):
        assert title in page
