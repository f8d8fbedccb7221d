"""Whether buckets can be compiled in processes of their own."""

from __future__ import annotations

import ast
import multiprocessing
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

from neuron_ext.buckets.job import Job


class NotParallelError(Exception):
    """Buckets have to be compiled in this process; the text says why."""


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def pickled_jobs(jobs: Sequence[Job]) -> list[bytes]:
    """The jobs for new processes.

    Raises:
        NotParallelError: if one cannot be pickled, or new processes could not begin to work: they
            import the main script, which therefore has to have a guard.
    """
    if multiprocessing.current_process().daemon:
        raise NotParallelError("this is a daemonic process, which may not start others")
    problem, imported = _look_at_main()
    if problem:
        raise NotParallelError(problem)
    try:
        pickled = [pickle.dumps(job) for job in jobs]
    except Exception as error:  # what users hand over may raise anything
        raise NotParallelError(
            f"func, its arguments or the example inputs cannot be pickled "
            f"({type(error).__name__}: {error})"
        ) from error
    if not imported and any(b"__main__" in one for one in pickled):
        raise NotParallelError(
            "func is defined in an interactive session or another place that a new process cannot "
            "import"
        )
    return pickled


def _look_at_main() -> tuple[str, bool]:
    """What is wrong with the main script, if anything, and whether a new process imports it."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    # As of `python -m package` and `python folder`: multiprocessing leaves these alone.
    if spec is not None and (spec.name == "__main__" or spec.name.endswith(".__main__")):
        return "", False
    path = getattr(main, "__file__", None)
    if path is None:
        return "", False
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
    except (OSError, SyntaxError, ValueError) as error:
        return f"the main script {path} cannot be read again ({error})", False
    if any(isinstance(node, ast.If) and _is_guard(node.test) for node in tree.body):
        return "", True
    return (
        f'the main script {path} has no `if __name__ == "__main__":`, below which what it does '
        "has to stand, since new processes import it"
    ), False


def _is_guard(test: ast.expr) -> bool:
    """Whether a condition compares ``__name__`` with ``"__main__"``."""
    for node in ast.walk(test):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq):
            sides = (node.left, *node.comparators)
            named = any(isinstance(one, ast.Name) and one.id == "__name__" for one in sides)
            main = any(isinstance(one, ast.Constant) and one.value == "__main__" for one in sides)
            if named and main:
                return True
    return False
