"""Two processes train as one, batch norm of the logits included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from forked import leave, start  # noqa: E402
from torch import distributed, nn  # noqa: E402

import mumoe_tensor as mt  # noqa: E402
from mumoe_tensor.nn import MuMoEMLP  # noqa: E402

pytestmark = pytest.mark.skipif(
    not distributed.is_available(), reason="this torch has no distributed package"
)


#: The bias of this one is a term.
SUM = mt.sum_of(mt.shared("kron"), "cp")
FORMATS = {"tr": (2, 2, 2, 3), SUM: (2, 3)}


def block(format: Any) -> Any:
    torch.manual_seed(0)
    made = MuMoEMLP(6, 8, 6, (4, 2), format, FORMATS[format])
    nn.init.normal_(made.gate.weight)
    return made


def train(module: Any, x: Any, masks: Any) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for mask in masks:
        optimizer.zero_grad()
        module(x, mask=mask).square().mean().backward()
        optimizer.step()


def replicated(module: Any) -> Any:
    return nn.parallel.DistributedDataParallel(module)


def sharded(module: Any) -> Any:
    """Every process holds a part of each parameter."""
    from torch.distributed.fsdp import fully_shard

    for child in (module.gate, module.up, module.down, module):
        fully_shard(child)
    return module


CASES = {"replicated": (replicated, "tr"), "sharded": (sharded, "tr"), "sharded sum": (sharded, SUM)}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    data = torch.load(f"{folder}/data.pt", weights_only=True)
    half = slice(8 * rank, 8 * rank + 8)
    states = {}
    for case, (spread, format) in CASES.items():
        module = block(format)
        train(spread(module), data["x"][half], [None if m is None else m[half] for m in data["masks"]])
        state = module.state_dict()
        states[case] = {
            name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in state.items()
        }
    if rank == 0:
        torch.save(states, f"{folder}/trained.pt")
    leave()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.manual_seed(1)
    # The first rows are larger, and the mask leaves more of them out: the halves have other statistics.
    x = torch.randn(16, 6) * torch.linspace(3, 0.5, 16)[:, None]
    masks = [None, torch.arange(16) > 4, None, torch.arange(16) < 13, None]
    torch.save({"x": x, "masks": masks}, tmp_path / "data.pt")
    start(worker, str(tmp_path))
    states = torch.load(tmp_path / "trained.pt", weights_only=True)
    for case, (_, format) in CASES.items():
        alone = block(format)
        train(alone, x, masks)
        for name, value in alone.state_dict().items():
            where = f"{case}, {name}: {{}}"
            torch.testing.assert_close(states[case][name], value, rtol=1e-5, atol=1e-5, msg=where.format)
