"""The table of ratios in the README, from the figures that are kept: ``python -m benchmarks.readme``."""

from __future__ import annotations

from pathlib import Path

MEASURED = Path(__file__).parent / "measured" / "layers.txt"
RUNS = ("eager", "compiled")
#: Shape, experts and format as in the table of layers, and how the README calls them.
ROWS = {
    ("GPT-2 block", "256", "cp"): "MLP block of GPT-2 (1,024 tokens), CP, 256 experts",
    ("GPT-2 block", "256", "tr"): "the same, Tensor Ring",
    ("GPT-2 block", "1024x1024", "cp"): "the same, CP, 1024 × 1024 experts in two levels",
    ("Mixer channel block", "64", "cp"): "channel block of MLP-Mixer S-16, CP, 64 experts",
    ("CLIP head", "128", "cp"): "head 768 → 1000 (256 inputs), CP, 128 experts",
}


def table() -> str:
    """Time over that of a dense layer of as many parameters, as Markdown."""
    ratios = {}
    for line in MEASURED.read_text(encoding="utf-8").splitlines():
        cells = line.rsplit(maxsplit=12)
        if len(cells) == 13 and cells[3] in RUNS:
            ratios[tuple(cells[:5])] = cells[8]
    lines = ["| time over the dense layer's | eager: forward, step | compiled: forward, step |"]
    lines += ["|---|---|---|"]
    for key, title in ROWS.items():
        cells = (f"{ratios[*key, run, 'forward']}, {ratios[*key, run, 'step']}" for run in RUNS)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
