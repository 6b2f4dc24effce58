"""A training step of GPT-2 124M, dense and with experts."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from functools import partial
from importlib import resources
from itertools import product
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.harness import MIB, Row, quartiles
from mumoe_tensor.measure.memory import growth
from mumoe_tensor.measure.timing import compare
from mumoe_tensor.models import GPT2, GPT2Config

DENSE, EXPERTS = "mlp", ("cp-256", "tr-256")
TOY = {"vocabulary": 64, "context": 16, "width": 32, "depth": 1, "heads": 2, "hidden": 64, "experts": [4]}


def model_of(name: str, toy: bool) -> GPT2:
    """A model of the packaged settings."""
    path = resources.files("mumoe_tensor.configs") / f"gpt2-124m-{name}.toml"
    setting = tomllib.loads(path.read_text(encoding="utf-8"))["model"]
    if toy:
        setting |= TOY | {"rank": None}
    torch.manual_seed(0)
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in setting.items()}
    return GPT2(GPT2Config(**options))


def gpt2(device: str, toy: bool) -> Iterator[Row]:
    """A training step: forward and backward pass in bfloat16 with autocast, and AdamW."""
    models = {name: model_of(name, toy).to(device) for name in (DENSE, *EXPERTS)}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
        for name, model in models.items()
    }
    tokens = torch.randint(50, (2 if toy else 8, models[DENSE].config.context + 1), device=device)

    def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(tokens[:, :-1])
            loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()

    for run, experts in product(("eager",) if toy else ("eager", "compiled"), EXPERTS):
        calls = {}
        for name in (DENSE, experts):
            model = torch.compile(models[name]) if run == "compiled" else models[name]
            calls[name] = partial(step, model, optimizers[name])
        timings = compare(calls, DENSE, rounds=9, limit=4, device=device)
        for name, call in calls.items():
            seconds = timings.spread(name).median
            row = {
                "model": name,
                "run": run,
                "ms": 1e3 * seconds,
                "tokens/s": tokens[:, 1:].numel() / seconds,
            }
            yield row | quartiles(timings.ratio(name), "to dense") | {"peak MiB": growth(call, device) / MIB}
