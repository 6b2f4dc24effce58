"""Replaced layers of a language model; the protocol is ``docs/experiments/replacement.md``.

    python -m paper_figures.experiments.replacement texts     split the entries of the Jargon File
    python -m paper_figures.experiments.replacement probe     sparse probes of experts, latents and neurons
    python -m paper_figures.experiments.replacement probes    the results of the probes
    python -m paper_figures.experiments.replacement rises     the results, as means over seeds
    python -m paper_figures.experiments.replacement claims    the differences that the claims are about

Needs `make data`. Texts are in ``data/replacement``; the layers to probe are in ``results/replacement``,
where ``mumoe-tensor replace`` writes them.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mumoe_tensor.interval import interval
from mumoe_tensor.ledger import Row
from mumoe_tensor.nn import load
from mumoe_tensor.replace import (
    RULES,
    Activations,
    Grid,
    load_language_model,
    read_texts,
    sparse_probe,
    token_labels,
    windows,
)
from mumoe_tensor.replace.frontier import PARTS
from mumoe_tensor.replace.language import write_texts
from paper_figures.experiments import command
from paper_figures.experiments.tables import DATA, ROOT, difference, grouped, table, write_table

MODEL, FOLDER, RESULTS = DATA / "smollm2", DATA / "replacement", ROOT / "results" / "replacement"
GRID = Path(__file__).with_suffix(".toml")
#: The reference for the other arms.
REFERENCE = "MxD"
#: Arms without experts, or with experts chosen at random or by distance.
NULLS = ("MxD, random experts", "MxD, nearest centres", "no experts", "no experts, same width")
#: The layers to probe, and the numbers of features of a probe.
MODULE, PROBED_AT, FEATURES = "model.layers.11.mlp", 32, (1, 5)

#: Minimum number of characters of a document: most documents are one window of 256 tokens, or slightly more.
LEAST = 1200
#: Shares of the documents for validation and test; the rest is for training.
SHARES = (0.09, 0.09)


def entries(text: str) -> list[str]:
    """The entries of the Jargon File, one paragraph per line, without the braces of cross-references."""
    glossary = text[text.index("\nGlossary\n") :]
    parts = re.split(r"\n(?=   :[^\n]*:)", glossary)[1:]
    paragraphs = ([" ".join(lines.split()) for lines in part.split("\n\n")] for part in parts)
    return [re.sub(r"[{}]", "", "\n\n".join(filter(None, lines))) for lines in paragraphs]


def documents(parts: Sequence[str], least: int = LEAST) -> list[str]:
    """Join neighbouring entries until each document has `least` characters; the rest is left out."""
    joined, left = [], ""
    for part in parts:
        left = f"{left}\n\n{part}" if left else part
        if len(left) >= least:
            joined.append(left)
            left = ""
    return joined


def split(texts: Sequence[str]) -> dict[str, list[str]]:
    """Training, validation and test documents, drawn with a seed."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    sizes = [round(share * len(texts)) for share in SHARES]
    parts = order.split([len(texts) - sum(sizes), *sizes])
    return {name: [texts[i] for i in part.tolist()] for name, part in zip(PARTS, parts, strict=True)}


def write_parts() -> None:
    """Write the documents of the three parts, as JSON Lines files."""
    with gzip.open(DATA / "jargon" / "jargon.txt.gz", "rt", encoding="utf-8") as file:
        parts = split(documents(entries(file.read())))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, texts in parts.items():
        write_texts(FOLDER / f"{name}.jsonl", texts)
        print(f"{name}: {len(texts)} documents, {sum(map(len, texts)):,} characters")


@torch.no_grad()
def probe() -> list[Row]:
    """F1 of the best single feature for each rule, for the layers of one K and for the block's neurons.

    The feature and its threshold are chosen on the validation texts and evaluated on the test texts.
    """
    model, tokenizer = load_language_model(MODEL)
    tokens, edges = [], [0]
    for part in PARTS[1:]:
        tokens += windows(read_texts(FOLDER / f"{part}.jsonl"), tokenizer, Grid.read(GRID).context).tokens
        edges.append(sum(map(len, tokens)))
    words = [[tokenizer.decode([token]) for token in window] for window in tokens]
    labels = {rule: torch.cat([token_labels(window, rule) for window in words]) for rule in RULES}
    names = (MODULE, f"{MODULE}.down_proj")
    stored = Activations.collect(model, names, tokens, RESULTS / "activations" / "probes")
    inputs, neurons = (stored[name].batch(range(len(stored)))[0] for name in names)
    rows: list[Row] = []

    def judge(arm: str, seed: int, features: Any) -> None:
        for rule, of_rule in labels.items():
            for k in FEATURES:
                scored = sparse_probe(
                    features, of_rule, k=k, training=range(edges[1]), test=range(edges[1], edges[2])
                )
                scores = {"f1": scored.f1, "auc": scored.auc}
                rows.append({"arm": arm, "seed": seed, "rule": rule, "features": k, **scores})

    judge("neurons", 0, neurons)
    for row in table("replacement").of(module=MODULE, k=PROBED_AT):
        folder = RESULTS / "layers" / row["run"]
        if not folder.exists():
            print(f"{row['run']} is not probed: it is in the table, but its layer is not in {RESULTS}.")
            continue
        layer = load(folder)
        (coefficients,) = zip(*(layer.gate(part) for part in inputs.split(4096)), strict=True)
        judge(row["arm"], row["seed"], torch.cat(coefficients))
    return rows


def probes() -> list[Row]:
    """F1 of probes with five features for each rule, as means over seeds, and the mean over the rules."""
    records = []
    for arm, here in grouped(table("replacement_probes").of(features=FEATURES[-1]), "arm").items():
        f1 = {rule: fmean(row["f1"] for row in group) for rule, group in grouped(here, "rule").items()}
        records.append({"arm": arm, **f1, "mean": fmean(f1.values())})
    return sorted(records, key=lambda row: -row["mean"])


def rises() -> list[Row]:
    """Rise in nats per token, error, active and dead experts and minutes of training, as means over seeds."""
    records = []
    for (module, k, arm), here in grouped(table("replacement"), "module", "k", "arm").items():
        mean, half = interval([row["rise"] for row in here])
        means = {name: fmean(row[name] for row in here) for name in ("nmse", "active", "dead", "seconds")}
        records.append(
            {"module": module, "K": k, "arm": arm, "rise": mean, "half": half, **means, "seeds": len(here)}
        )
    return sorted(records, key=lambda row: (row["module"], row["K"], row["rise"]))


def claims() -> list[Row]:
    """Paired differences in rise from MxD, for each arm: mean and 95 % interval, in nats per token."""
    rows = table("replacement")
    records = []

    def by_seed(module: str, arm: str, k: int) -> dict[int, float]:
        here = rows.of(module=module, arm=arm)
        return {row["seed"]: row["rise"] for row in here if row["k"] in (k, 0)}

    for module, k in grouped(rows.of(arm=REFERENCE), "module", "k"):
        reference = by_seed(module, REFERENCE, k)
        for arm in grouped(rows, "arm"):
            other = by_seed(module, arm, k)
            if arm != REFERENCE and other.keys() & reference.keys():
                records.append({"module": module, "K": k, "arm": arm, **difference(other, reference)})
    return records


STEPS = {
    "texts": write_parts,
    "probe": lambda: write_table("replacement_probes", probe()),
    "probes": probes,
    "rises": rises,
    "claims": claims,
}

if __name__ == "__main__":
    command.run("replacement")
