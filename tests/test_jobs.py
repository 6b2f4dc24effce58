"""Calls side by side give all their results, in this process, in several, and on a Dask cluster."""

from __future__ import annotations

import os

import pytest

joblib = pytest.importorskip("joblib")

from mumoe_tensor.jobs import side_by_side  # noqa: E402


def squares(jobs: int | str) -> tuple[dict[int, int], set[int]]:
    """Results by the number of their call, and the processes that made them."""
    results = dict(side_by_side([lambda n=n: (n * n, os.getpid()) for n in range(8)], jobs))
    return {number: square for number, (square, _) in results.items()}, {pid for _, pid in results.values()}


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_call_has_its_result(jobs: int) -> None:
    results, processes = squares(jobs)
    assert results == {n: n * n for n in range(8)}
    assert (os.getpid() in processes) is (jobs == 1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_call_raises_is_raised(jobs: int) -> None:
    with pytest.raises(ZeroDivisionError):
        list(side_by_side([lambda: 1, lambda: 1 // 0], jobs))


def test_a_cluster_takes_the_place_of_processes() -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        workers = set(client.run(os.getpid).values())
        results, processes = squares(cluster.scheduler_address)
    assert results == {n: n * n for n in range(8)} and processes <= workers
