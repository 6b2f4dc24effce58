"""Independent computations side by side. Timings, which need the machine alone, are none of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TypeVar

T = TypeVar("T")


def side_by_side(calls: Sequence[Callable[[], T]], jobs: int | str = 1) -> Iterator[tuple[int, T]]:
    """Call functions in several processes, and yield each result as it comes.

    Processes are joblib's. A backend that `joblib.parallel_config` has set, such as that of Dask for a
    cluster, is used in their place.

    Parameters
    ----------
    calls : sequence of callable
        Without arguments. What they refer to is pickled by cloudpickle, if there are several jobs.
    jobs : int or str, default 1
        Processes at most; with one, the functions are called in this process, in their order. Text is the
        address of a Dask scheduler, such as ``"tcp://host:8786"``, whose workers call them.

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
    from joblib import Parallel, delayed, parallel_config

    with ExitStack() as stack:
        if isinstance(jobs, str):
            from distributed import Client

            stack.enter_context(Client(jobs))
            stack.enter_context(parallel_config("dask"))
            jobs = -1
        yield from Parallel(jobs, return_as="generator_unordered")(
            delayed(_numbered)(number, call) for number, call in enumerate(calls)
        )


def _numbered(number: int, call: Callable[[], T]) -> tuple[int, T]:
    return number, call()
