"""Independent computations in parallel; not for timings, which need an otherwise idle machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TypeVar

T = TypeVar("T")


def side_by_side(calls: Sequence[Callable[[], T]], jobs: int | str = 1) -> Iterator[tuple[int, T]]:
    """Call functions in several processes, and yield each result as soon as it is available.

    The processes are started by joblib, or by a backend set with `joblib.parallel_config`, such as Dask for a
    cluster.

    Parameters
    ----------
    calls : sequence of callable
        Functions without arguments. With several jobs, cloudpickle pickles them.
    jobs : int or str, default 1
        Maximum number of processes. With one, the functions are called in order in this process. A string is
        the address of a Dask scheduler, such as ``"tcp://host:8786"``, whose workers call the functions.

    Yields
    ------
    int
        The index of the call.
    object
        Its result.

    Raises
    ------
    Exception
        Any exception that a call raises. Calls in progress are then terminated.
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
