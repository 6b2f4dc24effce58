"""Run checks on problems drawn by Hypothesis."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from hypothesis import HealthCheck, given, note, settings

from mumoe_tensor.formats import Format, get_format, shared, sliced, sum_of
from mumoe_tensor.testing.checks import CHECKS, check_declaration
from mumoe_tensor.testing.strategies import Problem, installed_backends, jax_float64, problems

#: Divisors of the number of examples for slow checks.
DIVISORS = {"check_paths": 4, "check_gradients": 2}


def check_format(format: str | Format) -> None:
    """Run every check on a format, for various levels, sizes, ranks and dtypes, and all installed backends.

    The Hypothesis profile sets the number of problems. With the default profile, this takes about half a
    minute.

    Parameters
    ----------
    format : str or Format
        The name of a registered format, or an instance of a format, registered or not.

    Raises
    ------
    AssertionError
        If a property does not hold; Hypothesis reports a minimal failing problem.

    Examples
    --------
    >>> from mumoe_tensor.testing import check_format
    >>> check_format("cp")  # doctest: +SKIP
    """
    format = get_format(format)
    check_declaration(format)
    for check in CHECKS.values():
        for backend in installed_backends():
            run_check(check, format, backend=backend, share=4)


def run_check(
    check: Callable[[Problem], None],
    format: str | Format | None = None,
    *,
    backend: str = "numpy",
    share: int = 1,
) -> None:
    """Run one check on problems drawn by Hypothesis; its profile sets their number.

    Parameters
    ----------
    check : callable
        A function of one `Problem`; see ``CHECKS``.
    format : str or Format, optional
        All registered formats by default.
    backend : {"numpy", "pytorch", "jax"}, default "numpy"
    share : int, default 1
        Divisor of the number of examples. Slow checks reduce it further, and so does JAX, which compiles each
        operation for each shape.

    Raises
    ------
    AssertionError
        If the property does not hold; Hypothesis reports a minimal failing problem.
    """
    divisor = share * DIVISORS.get(check.__name__, 1) * (10 if backend == "jax" else 1)

    def run(problem: Problem) -> None:
        note(f"To see it again:\n\n{pasteable(check, problem)}\n")
        check(problem)

    # Hypothesis distinguishes tests, and stores failing examples, by name.
    name = "any" if format is None else get_format(format).name
    run.__name__ = run.__qualname__ = re.sub(r"\W", "_", f"{check.__name__}_{name}_{backend}")
    options = settings(
        max_examples=max(2, settings().max_examples // divisor),
        # No deadline, since JAX compiles, and some sizes are slow.
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    with jax_float64() if backend == "jax" else nullcontext():
        options(given(problems(format, backend=backend))(run))()


def pasteable(check: Callable[[Problem], None], problem: Problem) -> str:
    """Code that repeats a check on a problem."""
    call = f"{check.__name__}({problem!r})"
    lines = ["from mumoe_tensor import LayerSpec", "from mumoe_tensor.testing import Problem, jax_float64"]
    terms = [format for format, _ in problem.layer.format.summands(problem.layer.num_levels)]
    formats = [problem.layer.format, *terms, *(getattr(term, "format", term) for term in terms)]
    objects: dict[Any, None] = dict.fromkeys([check, sum_of, shared, sliced, *map(type, formats)])
    # Objects defined inside a function cannot be imported.
    lines += [
        f"from {x.__module__} import {x.__qualname__}"
        for x in objects
        if f"{x.__qualname__}(" in call and "<" not in x.__qualname__
    ]
    return "\n".join([*lines, "", f"with jax_float64():\n    {call}" if problem.backend == "jax" else call])
