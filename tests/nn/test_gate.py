"""The gate of the layers: the fast entmax15, batch norm with masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nasty_rows import nasty

import mumoe_tensor as mt

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

from mumoe_tensor.nn import ExpertGate, MuMoE, entmax, entmax15, functional  # noqa: E402

#: Of each dtype, how far two results may lie apart that are rounded once from 3e-7 (float64: 5e-14) apart.
DTYPES = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 6e-7, torch.float64: 5e-14}


def test_entmax15_is_the_core_gate_with_its_first_and_second_derivatives() -> None:
    logits = 2 * torch.randn(6, 9, dtype=torch.float64)
    logits[0, 3] = -torch.inf
    logits[1] = 0
    torch.testing.assert_close(entmax15(logits), mt.entmax15(logits))
    assert entmax15(logits)[0, 3] == 0
    finite = logits[1:].requires_grad_()
    assert torch.autograd.gradcheck(entmax15, finite)
    assert torch.autograd.gradgradcheck(entmax15, finite[1:])
    bad = torch.tensor([[0.0, torch.nan], [torch.inf, 0.0], [-torch.inf, -torch.inf], [1.0, 1.0]])
    assert entmax15(bad).isnan().any(-1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("n", [1, 2, 31, 256, 4096, 2**17])
def test_entmax15_in_float32_is_as_exact_as_the_core_gate(n: int) -> None:
    rows = torch.randn(8, n) * torch.logspace(-6, 6, 8)[:, None]
    rows[0, 0] += 1e4
    shifted = torch.randn(4, n) * torch.tensor([1.0, 1e-2, 10.0, 0.0])[:, None] + 1e4
    cloud = 1 + 1e-6 * torch.rand(1, n)
    cloud[0, 0] = 2.5
    rows = torch.cat([rows, shifted, -shifted, cloud, cloud.sqrt(), torch.ones(1, n)])
    near = entmax15(rows)
    exact = mt.entmax15(rows.double())
    assert (near - exact).abs().max() <= 3e-7
    assert (near.sum(-1) - 1).abs().max() <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_is_that_of_the_core(dtype: torch.dtype) -> None:
    logits = torch.from_numpy(np.stack([*nasty(9).values()])).to(dtype)
    bad = torch.tensor([[torch.nan], [torch.inf], [-torch.inf]], dtype=dtype).expand(3, 9).clone()
    bad[:2, 1:] = 0
    for x in (logits, bad, logits[:0]):
        torch.testing.assert_close(functional.softmax(x), mt.softmax(x), equal_nan=True)
    layer = MuMoE(4, 3, 2, gate=mt.softmax, rank=2)
    assert layer.gate.gate is functional.softmax and layer.config["gate"] == "softmax"


#: What decides how a CPU computes: each way for calls of any size.
WAYS: dict[str, dict[str, float]] = {
    "by size": {},
    "in chunks": {"FEW": 0, "CHUNK": 1000},
    "closed form": {"FEW": 10**9},
    "Newton": {"FEW": 0, "LONG": 10**9},
    "few entries": {"FEW": 0, "LONG": 32, "SHARE": 1.0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "rounding"), DTYPES.items())
def test_the_fast_entmax15_is_the_general_one_on_nasty_rows(
    dtype: torch.dtype, rounding: float, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in WAYS[way].items():
        monkeypatch.setattr(entmax, name, value)
    for n in (1, 2, 17, 256, 4096):
        rows = torch.tensor(np.stack(list(nasty(n).values()))).to(dtype).requires_grad_()
        # (Float16 has no 1e6: these rows become NaN in both.)
        fast, general = entmax15(rows), mt.entmax15(rows)
        assert fast.dtype == dtype
        torch.testing.assert_close(fast, general, atol=rounding, rtol=0, equal_nan=True)
        if dtype == torch.float64:
            gradient = torch.randn(rows.shape, dtype=dtype)
            pair = [torch.autograd.grad(p, rows, gradient)[0] for p in (fast, general)]
            torch.testing.assert_close(*pair, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [3.0, 1e-3])
def test_long_rows_and_their_gradients_by_few_entries(scale: float) -> None:
    logits = scale * torch.randn(3, 4, 2 * entmax.LONG)
    logits[0, 1, ::2] = -torch.inf
    x, wide = (logits[..., : entmax.LONG].to(dtype).requires_grad_() for dtype in (torch.float, torch.double))
    assert not x.is_contiguous()
    p, exact = entmax15(x), mt.entmax15(wide)
    is_few = entmax._of_few_entries(x.detach().reshape(-1, entmax.LONG)) is not None
    assert is_few == (scale > 1)
    assert (p - exact).abs().max() <= 3e-7
    gradient = torch.randn(4, entmax.LONG).expand(p.shape)
    p.backward(gradient)
    exact.backward(gradient.double())
    torch.testing.assert_close(x.grad, wide.grad.float(), atol=1e-6, rtol=1e-3)
    # A row that is not finite makes no other so.
    bad = logits[..., : entmax.LONG].reshape(12, -1).clone()
    bad[2, 5], bad[4, 7], bad[5] = torch.nan, torch.inf, -torch.inf
    bad.requires_grad_()
    is_nan = torch.zeros(12, dtype=torch.bool)
    is_nan[[2, 4, 5]] = True
    p = entmax15(bad)
    assert p.isnan().all(-1).equal(is_nan) and p.isnan().any(-1).equal(is_nan)
    p.backward(gradient.reshape(12, -1))
    assert bad.grad.isnan().all(-1).equal(is_nan) and bad.grad.isnan().any(-1).equal(is_nan)


def test_gradients_in_float16_are_computed_in_float32() -> None:
    logits = (0.05 * torch.randn(2, 20_000)).half()
    gradient = torch.randn(2, 20_000).half()
    gradients = []
    for dtype in (torch.float16, torch.float64):
        x = logits.to(dtype, copy=True).requires_grad_()
        entmax15(x).backward(gradient.to(dtype))
        gradients.append(x.grad.double())
    assert (gradients[0] - gradients[1]).norm() < 2e-3 * gradients[1].norm()


def test_padded_rows_may_hold_anything() -> None:
    layer = MuMoE(5, 4, 3, rank=2, dtype=torch.float64)
    torch.nn.init.normal_(layer.gate.weight)
    x, mask = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) < 4
    expected = layer(x, mask=mask)[:4]
    statistics = layer.gate.norm.running_var.clone()
    layer.gate.norm.reset_parameters()
    x[4:] = torch.nan
    torch.testing.assert_close(layer(x, mask=mask)[:4], expected)
    torch.testing.assert_close(layer.gate.norm.running_var, statistics)


@pytest.mark.parametrize("masked", [True, False])
def test_the_mean_of_all_batches_as_running_statistics(masked: bool) -> None:
    norm, x = ExpertGate(5, [3], dtype=torch.float64).norm, torch.randn(4, 6, 3, dtype=torch.float64)
    assert norm is not None
    norm.momentum = None
    mask = torch.ones(6, dtype=torch.bool) if masked else None
    for batch in x:
        norm(batch, mask)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 1)))
    torch.testing.assert_close(norm.running_var, x.var(1).mean(0))


def test_a_gate_starts_with_equal_coefficients() -> None:
    (a,) = ExpertGate(5, [8])(torch.randn(3, 5))
    torch.testing.assert_close(a, torch.full((3, 8), 1 / 8))


def test_mask_leaves_padded_tokens_out_of_batch_norm() -> None:
    layer = MuMoE(5, 4, (3, 2), rank=2, dtype=torch.float64)
    torch.nn.init.normal_(layer.gate.weight)
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    mask = torch.rand(4, 6) < 0.6
    masked = MuMoE(5, 4, (3, 2), rank=2, dtype=torch.float64)
    masked.load_state_dict(layer.state_dict())
    y, a = masked(x, mask=mask, return_coefficients=True)
    short, b = layer(x[mask], return_coefficients=True)
    torch.testing.assert_close(y[mask], short)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one[mask], other)
    for name, value in masked.state_dict().items():
        torch.testing.assert_close(value, layer.state_dict()[name])


@pytest.mark.parametrize("rows", [0, 1])
def test_batch_norm_needs_two_rows_in_training(rows: int) -> None:
    layer = MuMoE(5, 4, 3, rank=2)
    with pytest.raises(ValueError, match="gate_norm='batch'"):
        layer(torch.zeros(rows, 5))
    with pytest.raises(ValueError, match="gate_norm='batch'"):
        layer(torch.zeros(6, 5), mask=torch.arange(6) < rows)
    assert layer.eval()(torch.zeros(rows, 5)).shape == (rows, 4)
    assert MuMoE(5, 4, 3, rank=2, gate_norm="layer")(torch.zeros(rows, 5)).shape == (rows, 4)


@pytest.mark.parametrize("gate_norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("experts", [(5,), (4, 4, 4), (3, 5)])
def test_few_logits_in_evaluation_without_gradients(experts: tuple[int, ...], gate_norm: Any) -> None:
    gate = ExpertGate(6, experts, gate_norm=gate_norm)
    nn.init.normal_(gate.weight)
    gate(torch.randn(9, 6))
    gate.eval()
    for shape in ((7, 6), (2, 3, 6), (6,), (0, 6)):
        z = 3 * torch.randn(shape)
        if len(shape) == 2:
            z[1:2, 0], z[2:3, 1] = torch.inf, torch.nan
        with torch.no_grad():
            levels = gate(z)
        for a, expected, n in zip(levels, gate(z), experts, strict=True):
            assert a.shape == (*shape[:-1], n) and a.dtype == torch.float32
            torch.testing.assert_close(a, expected, atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("experts", [(5,), (4, 4, 4), (3, 5)])
def test_calls_share_no_memory_and_leave_their_inputs(experts: tuple[int, ...]) -> None:
    gate = ExpertGate(6, experts).eval()
    nn.init.normal_(gate.weight)
    inputs, before = (torch.randn(4, 6, 7, generator=torch.Generator().manual_seed(0)).mT for _ in range(2))
    assert not inputs[0].is_contiguous()
    for function in (gate, lambda x: (entmax15(x),)):
        with torch.no_grad():
            expected = [tuple(a.clone() for a in function(x.contiguous())) for x in inputs]
            results = [function(x) for x in inputs]
            torch.testing.assert_close(results, expected, rtol=0, atol=1e-6)
            assert inputs.equal(before)


def test_forward_mode_derivatives() -> None:
    z, tangent = torch.randn(7, 6), torch.randn(7, 6)
    gate = ExpertGate(6, [5])
    nn.init.normal_(gate.weight)
    for function in (entmax15, lambda x: gate.eval()(x)[0]):
        expected = torch.autograd.functional.jvp(function, z, tangent)[1]
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), forward_ad.dual_level():
                dual = function(forward_ad.make_dual(z, tangent))
                torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)


def test_few_logits_after_a_norm_that_is_more_than_its_statistics() -> None:
    gate, z = ExpertGate(6, [5]), torch.randn(7, 6)
    nn.init.normal_(gate.weight)
    norm = gate.norm
    assert norm is not None
    with torch.no_grad():
        a = gate.eval()(z)[0]
        norm.double()
        torch.testing.assert_close(gate(z)[0], a)
        assert gate(z)[0].dtype == torch.float32
        norm.float().register_forward_hook(lambda module, inputs, output: 0 * output)
        torch.testing.assert_close(gate(z)[0], torch.full((7, 5), 0.2))


def test_few_logits_after_a_norm_in_training_alone() -> None:
    gate, z = ExpertGate(6, [5]).eval(), torch.randn(7, 6)
    nn.init.normal_(gate.weight)
    assert gate.norm is not None
    gate.norm.train()
    logits = z @ gate.weight.T.detach()
    normed = (logits - logits.mean(0)) / (logits.var(0, correction=0) + gate.norm.eps).sqrt()
    with torch.no_grad():
        torch.testing.assert_close(gate(z)[0], entmax15(normed))


@pytest.mark.parametrize("n", [1, 2, 17, 100, 256])
def test_few_logits_without_float64(n: int) -> None:
    for name, row in nasty(n).items():
        logits = torch.tensor(row)[None]
        exact = mt.entmax15(logits.double())
        for p in (entmax.coefficients_in_float32(logits), entmax._sorted(logits)):
            assert p is not None and (p - exact).abs().max() <= 3e-7, name
            assert abs(p.sum() - 1) <= 2e-6 and not (p[exact == 0] > 1e-13).any(), name


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("gate", [entmax15, mt.sparsemax, mt.softmax, lambda x: entmax15(x)])
def test_levels_of_one_size_are_as_levels_alone(gate: Any, norm: str) -> None:
    torch.manual_seed(0)
    made = ExpertGate(6, (5, 5, 5), gate=gate, gate_norm=norm, dtype=torch.float64)
    nn.init.normal_(made.weight)
    alone = [ExpertGate(6, (5,), gate=gate, gate_norm=norm, dtype=torch.float64) for _ in range(3)]
    with torch.no_grad():
        for one, weight in zip(alone, made.weight.split(5), strict=True):
            one.weight.copy_(weight)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    for is_training in (True, False):
        made.train(is_training)
        results = []
        for level in alone:
            level.train(is_training)
        for parts in (made(x), tuple(level(x)[0] for level in alone)):
            loss = sum(((k + 1) * p).square().sum() for k, p in enumerate(parts))
            results.append((parts, loss))
        torch.testing.assert_close(results[0][0], results[1][0])
        gradient = torch.autograd.grad(results[0][1], made.weight)[0]
        expected = torch.autograd.grad(results[1][1], [level.weight for level in alone])
        torch.testing.assert_close(gradient, torch.cat(expected))


@pytest.mark.parametrize("shape", [(3, 5), (256, 4096), (300, 2048)])
def test_batches_of_gradients(shape: tuple[int, int]) -> None:
    # As `torch.autograd.functional.jacobian` with `vectorize` has them; each way of the backward pass.
    x, gradients = torch.randn(shape, requires_grad=True), torch.randn(2, *shape)
    p = entmax15(x)
    (batched,) = torch.autograd.grad(p, x, gradients, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(p, x, gradient, retain_graph=True)[0] for gradient in gradients]
    torch.testing.assert_close(batched, torch.stack(alone), atol=1e-6, rtol=1e-4)
