"""The product of sparse coefficients with a factor, by the share of nonzero coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from benchmarks.gpu.rows import BRIEF, Row
from mumoe_tensor.measure.timing import compare
from mumoe_tensor.nn.sparse import SparseCoefficients, _support, indexed_product

Route = Callable[[Tensor, Tensor], Tensor]
#: Maximum number of elements that a gather may copy.
MOST_COPIED = 2**31


def routes(coefficients: Tensor) -> dict[str, Route]:
    """Ways to compute the product, the dense one first."""
    support = _support(coefficients)
    most = int((coefficients != 0).sum(1).max())
    places = coefficients.topk(most).indices

    def bag(a: Tensor, factor: Tensor, support: tuple[Tensor, ...]) -> Tensor:
        position, _, column, starts = support
        return embedding_bag(column, factor, starts, mode="sum", per_sample_weights=a.reshape(-1)[position])

    def gather(a: Tensor, factor: Tensor) -> Tensor:
        values, index = a.topk(most)
        return torch.bmm(values.unsqueeze(1), factor[index]).squeeze(1)

    def indexed(a: Tensor, factor: Tensor) -> Tensor:
        return indexed_product(SparseCoefficients(a.gather(1, places), places, a.shape[1]), factor)

    return {
        "dense": torch.matmul,
        "indexed": indexed,
        "embedding_bag": lambda a, factor: bag(a, factor, _support(a.detach())),
        "bag, indices given": lambda a, factor: bag(a, factor, support),
        "gather": gather,
    }


def sparse(device: str, toy: bool) -> Iterator[Row]:
    """Times relative to the dense product."""
    rank, tokens = (8, 16) if toy else (556, 4096)
    densities = (0.05,) if toy else (0.002, 0.01, 0.05, 0.2)
    for experts, density in product((64,) if toy else (4096, 1024, 16_384), densities):
        torch.manual_seed(0)
        chosen = torch.rand(tokens, experts, device=device) < density
        a = (torch.rand(tokens, experts, device=device) * chosen).requires_grad_()
        factor = torch.randn(experts, rank, device=device, requires_grad=True)
        gradient = torch.randn(tokens, rank, device=device)
        ways = routes(a.detach())
        if tokens * experts * density * rank > MOST_COPIED:
            del ways["gather"]

        def forward(way: Route, a: Tensor = a, factor: Tensor = factor) -> None:
            with torch.no_grad():
                way(a, factor)

        def step(way: Route, a: Tensor = a, factor: Tensor = factor, gradient: Tensor = gradient) -> None:
            torch.autograd.grad(way(a, factor), (a, factor), gradient)

        for call in (forward, step):
            calls = {name: partial(call, way) for name, way in ways.items()}
            timings = compare(calls, "dense", **BRIEF, device=device)
            row = {"experts": experts, "density": density, "pass": call.__name__}
            row |= {"dense ms": 1e3 * timings.spread("dense").median}
            yield row | {name: timings.ratio(name).median for name in calls if name != "dense"}
