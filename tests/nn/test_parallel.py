"""Experts divided over two processes give what the whole ones give."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from forked import leave, start  # noqa: E402
from torch import distributed, nn  # noqa: E402

from mumoe_tensor.nn import Experts, MuMoE, MuMoEMLP, gather, parallelize  # noqa: E402

pytestmark = pytest.mark.skipif(
    not distributed.is_available(), reason="this torch has no distributed package"
)

#: Ranks of one and of two levels, and the bond that is divided: the largest, and in TT's two levels that of
#: the larger factors. The parts have different sizes, except for CP's.
RANKS: dict[str, tuple[Any, Any, str]] = {
    "cp": (6, 4, "r"),
    "tr": ((2, 3, 5), (2, 2, 3, 5), "b{}"),
    "tt": ((2, 5), (2, 5, 5), "b{}"),
    "tucker": ((2, 3, 5), (2, 2, 3, 5), "r_o"),
    # Sums: the bias of the first and the shared expert of the second have no bond.
    "btt": (5, 5, "t1_r"),
    "shared-expert": (5, 5, "t2_r"),
}
#: Format, class, levels, norm of the gate.
CASES = list(product(RANKS, (MuMoE, MuMoEMLP), (1, 2), ("layer", "batch")))


def gated_block(*args: Any, **options: Any) -> Any:
    return MuMoEMLP(*args, gated=True, **options)


CASES += [(format, gated_block, 1, "layer") for format in ("cp", "btt")]


def layer_of(format: str, kind: Any, levels: int, norm: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = (6, 8) if kind is MuMoE else (6, 9, 8)
    layer = kind(*sizes, (4, 3)[:levels], format, RANKS[format][levels - 1], gate_norm=norm, input_norm=True)
    nn.init.normal_(layer.gate.weight)
    return layer


def inputs() -> Any:
    return torch.randn(8, 2, 6, generator=torch.Generator().manual_seed(1))


def train(layer: Any, rows: Any) -> dict[str, Any]:
    """The first outputs and gradients, and the parameters after some steps."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    first: dict[str, Any] = {}
    for _ in range(3):
        optimizer.zero_grad()
        x = rows.clone().requires_grad_()
        y = layer(x)
        (y.square().mean() + y.sin().mean()).backward()
        if not first:
            gradients = {f"gradient of {name}": p.grad.clone() for name, p in layer.named_parameters()}
            first = {"outputs": y.detach(), "gradient of inputs": x.grad, **gradients}
        optimizer.step()
    return {**first, **{name: value.clone() for name, value in layer.state_dict().items()}}


def complaint(call: Any) -> tuple[str, str]:
    try:
        call()
    except (ValueError, TypeError) as error:
        return type(error).__name__, str(error)
    return "no error", ""


def complaints(group: Any) -> dict[str, tuple[str, str]]:
    divided = parallelize(MuMoE(6, 8, 4, "cp", 3), group)
    block = parallelize(MuMoEMLP(6, 8, 6, 4, "tr", (2, 2, 3)), group)
    return {
        name: complaint(call)
        for name, call in {
            "no bond": lambda: parallelize(MuMoE(6, 8, 4, "hadamard"), group),
            "small bond": lambda: parallelize(MuMoE(6, 8, 4, "tr", (1, 1, 1)), group),
            "no experts": lambda: parallelize(nn.Linear(2, 3), group),
            "divided already": lambda: parallelize(divided, group),
            "expert": lambda: divided.expert(1),
            "weight": lambda: divided.weight,
            "weights": lambda: block.weights,
            "to_published": lambda: block.to_published(),
            "keep_experts": lambda: divided.keep_experts(0, [1, 2]),
            "reset_parameters": lambda: block.up.reset_parameters(),
            "whole state": lambda: divided.load_state_dict(MuMoE(6, 8, 4, "cp", 3).state_dict()),
        }.items()
    }


def others(group: Any) -> list[Any]:
    """Outputs of modules divided and whole, and how much larger the factors of their experts are."""
    torch.manual_seed(0)
    experts = Experts(6, 8, (4, 3), "cp", 4)
    model = nn.Sequential(nn.Linear(6, 6), MuMoE(6, 5, 4, "cp", 4), nn.Tanh(), MuMoEMLP(5, 7, 8, 3, "cp", 4))
    calls = (
        (experts, lambda module: module(inputs(), [torch.rand(8, 2, 4), torch.rand(8, 2, 3)])),
        (model, lambda module: module(inputs())),
    )
    results = []
    for whole, call in calls:
        divided, outputs, sizes = parallelize(whole, group), [], []
        for module in (divided, whole):
            torch.manual_seed(1)
            outputs.append(call(module).detach())
            parts = [child for child in module.modules() if isinstance(child, Experts)]
            sizes.append(sum(p.numel() for part in parts for p in part.parameters()))
        results.append((*outputs, sizes[1] / sizes[0]))
    return results


def unusual(group: Any) -> tuple[list[Any], list[Any]]:
    """Frozen factors, edits, modes and copies of rows of a layer: whole, divided, gathered; its outputs."""
    layer = layer_of("cp", MuMoE, 2, "batch")
    layer.experts.add_edit("edit", [torch.rand(4), torch.rand(3)], torch.rand(8))
    layer.eval().input_norm.train()
    layer.experts.factor_1.requires_grad_(False)
    divided = parallelize(layer, group)
    layers = (layer, divided, gather(divided))
    described = [
        {
            "frozen": [name for name, parameter in each.named_parameters() if not parameter.requires_grad],
            "training": [name for name, module in each.named_modules() if module.training],
            "edits": {name: tensor for name, tensor in each.state_dict().items() if "edit" in name},
            "copies": each.gate.norm.copies,
        }
        for each in layers
    ]
    return described, [each(inputs()).detach() for each in layers]


def gradients_of_zeros(group: Any) -> list[Any]:
    """Gradients of coefficients, most of them zero, of many experts called by themselves: divided, whole."""
    torch.manual_seed(0)
    whole = Experts(6, 8, 1024, "cp", 4)
    coefficients = torch.zeros(3, 1024).index_fill_(1, torch.tensor([5, 700]), 0.5)
    gradients = []
    for experts in (parallelize(whole, group), whole):
        leaf = coefficients.clone().requires_grad_()
        experts(torch.ones(3, 6), [leaf]).sum().backward()
        gradients.append(leaf.grad)
    return gradients


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    group = distributed.new_group([0, 1])
    results: dict[Any, Any] = {"errors": complaints(group)}
    first = distributed.new_group([0])
    results["outsider"] = complaint(lambda: parallelize(MuMoE(6, 8, 4, "cp", 3), first))
    for case in CASES:
        # The processes start differently: that of the first counts.
        layer = layer_of(*case, seed=rank)
        before = copy.deepcopy(layer.state_dict())
        divided = parallelize(layer, group)
        experts = [child for child in divided.modules() if isinstance(child, Experts)]
        trained, whole = train(divided, inputs()), gather(divided)
        results[case] = {
            "part": trained,
            "whole": whole.state_dict(),
            "outputs": [m.eval()(inputs()).detach() for m in (divided, copy.deepcopy(divided), whole)],
            "bonds": {child.bond for child in experts},
            "flops": [child.plan.flops for child in experts],
            "same class and config": type(whole) is type(layer) and whole.config == layer.config,
            "layer unchanged": all(torch.equal(v, before[name]) for name, v in layer.state_dict().items()),
        }
    results["others"] = others(group)
    results["zeros"] = gradients_of_zeros(group)
    results["unusual"] = unusual(group)
    torch.save(results, f"{folder}/{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder: Path = tmp_path_factory.mktemp("parallel")
    start(worker, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1].__name__}-{case[2]}-{case[3]}")
def test_divided_equals_whole(case: Any, results: list[dict[Any, Any]]) -> None:
    alone = layer_of(*case)
    flops = [child.plan.flops for child in alone.modules() if isinstance(child, Experts)]
    expected = train(alone, inputs())
    first, second = (result[case] for result in results)
    close = dict(rtol=1e-5, atol=1e-5)
    divided = set()
    for name, value in expected.items():
        parts = [first["part"][name], second["part"][name]]
        axes = [k for k, (n, m) in enumerate(zip(parts[0].shape, value.shape, strict=True)) if n != m]
        for axis in axes:
            divided.add(name)
            parts = [torch.cat(parts, axis)]
        for part in parts:
            torch.testing.assert_close(part, value, **close, msg=lambda text, name=name: f"{name}: {text}")
    assert divided and not any("gate." in name or "norm" in name for name in divided)
    for result in (first, second):
        assert result["same class and config"] and result["layer unchanged"]
        assert result["bonds"] == {RANKS[case[0]][2].format(case[2] + 2)}
        assert all(part < whole for part, whole in zip(result["flops"], flops, strict=True))
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(result["whole"][name], value, **close)
        for outputs in result["outputs"]:
            torch.testing.assert_close(outputs, alone.eval()(inputs()).detach(), **close)


def test_models_and_experts(results: list[dict[Any, Any]]) -> None:
    for result in results:
        for divided, whole, parts in result["others"]:
            torch.testing.assert_close(divided, whole)
            assert parts == 2


SAYS = {
    "no bond": ("has none", "'hadamard'"),
    "small bond": ("as large as the group", "size 1", "2 processes"),
    "no experts": ("must have experts", "Linear"),
    "divided already": ("not divided yet", "ShardedExperts"),
    "whole state": ("match the config", "experts.factor_0"),
    **dict.fromkeys(("expert", "weight", "keep_experts"), ("must be whole", "'r'", "of 3", "gather")),
    **dict.fromkeys(
        ("weights", "to_published", "reset_parameters"), ("must be whole", "'b3'", "of 3", "gather")
    ),
}


@pytest.mark.parametrize("name", SAYS)
def test_errors(name: str, results: list[dict[Any, Any]]) -> None:
    for result in results:
        kind, message = result["errors"][name]
        assert kind == "ValueError" and all(words in message for words in SAYS[name]), (kind, message)


def worker_of_four(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=4)
    halves = [distributed.new_group([k, k + 1]) for k in (0, 2)]
    others = [distributed.new_group([k, k + 2]) for k in (0, 1)]
    divided = parallelize(layer_of("tr", MuMoE, 2, "batch"), halves[rank // 2])
    replicated = nn.parallel.DistributedDataParallel(divided, process_group=others[rank % 2])
    train(replicated, inputs()[rank // 2 :: 2])
    torch.save(gather(divided).state_dict(), f"{folder}/{rank}.pt")
    leave()


def test_divided_and_replicated(tmp_path: Path) -> None:
    start(worker_of_four, str(tmp_path), count=4)
    alone = layer_of("tr", MuMoE, 2, "batch")
    train(alone, inputs())
    for rank, (name, value) in product(range(4), alone.state_dict().items()):
        trained = torch.load(tmp_path / f"{rank}.pt")[name]
        torch.testing.assert_close(trained, value, rtol=1e-5, atol=1e-5)


def test_coefficients_that_are_zero_have_gradients(results: list[dict[Any, Any]]) -> None:
    for result in results:
        divided, whole = result["zeros"]
        torch.testing.assert_close(divided, whole, rtol=1e-5, atol=1e-6)
        assert (divided != 0).all()


def test_frozen_factors_edits_and_modes_stay(results: list[dict[Any, Any]]) -> None:
    for result in results:
        (whole, divided, gathered), (expected, *outputs) = result["unusual"]
        assert (whole["frozen"], whole["training"]) == (["experts.factor_1"], ["input_norm"])
        assert [each.pop("copies") for each in (whole, divided, gathered)] == [1, 2, 1]
        for each, y in zip((divided, gathered), outputs, strict=True):
            torch.testing.assert_close(each.pop("edits"), whole["edits"], rtol=0, atol=0)
            assert each == {name: whole[name] for name in each}
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_of_processes_only_those_of_the_group(results: list[dict[Any, Any]]) -> None:
    assert results[0]["outsider"] == ("no error", "")
    kind, message = results[1]["outsider"]
    assert kind == "ValueError" and "in the group" in message and "process 1" in message


def test_without_processes() -> None:
    with pytest.raises(ValueError, match="process group"):
        parallelize(MuMoE(6, 8, 4, "cp", 3))
