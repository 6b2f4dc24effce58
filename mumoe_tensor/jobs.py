"""Independent computations side by side. Timings, which need the machine alone, are none of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def side_by_side(calls: Sequence[Callable[[], T]], jobs: int = 1) -> Iterator[tuple[int, T]]:
    """Call functions in several processes, and yield each result as it comes.

    Processes are joblib's. A backend that `joblib.parallel_config` has set, such as that of Dask for a
    cluster, is used in their place.

    Parameters
    ----------
    calls : sequence of callable
        Without arguments. What they refer to is pickled by cloudpickle, if there are several jobs.
    jobs : int, default 1
        Processes at most; with one, the functions are called in this process, in their order.

    Yields
    ------
    int
        The position of the call.
    object
        Its result.

    Raises
    ------
    Exception
        What a call raises. Others that have begun are ended.
    """
    from joblib import Parallel, delayed

    yield from Parallel(jobs, return_as="generator_unordered")(
        delayed(_numbered)(number, call) for number, call in enumerate(calls)
    )


def _numbered(number: int, call: Callable[[], T]) -> tuple[int, T]:
    return number, call()
