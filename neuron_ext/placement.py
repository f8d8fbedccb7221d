"""Placement on NeuronCores: at load time by a context, later by moving a loaded module.

The functions behave as the "NeuronCore Placement APIs" page of the Neuron documentation says,
except that contexts are thread-local and moves are transactions: see ``docs/design.md``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from neuron_ext._library import ops
from neuron_ext._subgraphs import holder
from neuron_ext.status import visible_core_count


def _whole_number(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(
            f"{name}={value!r} is not a whole number: use a core number, or -1 for automatic"
        ) from None
    if not -(2**63) <= number < 2**63:  # more than TorchScript can pass on
        cores = visible_core_count()
        raise ValueError(
            f"{name}={number} is out of range: this process sees {cores} cores (0-{cores - 1}); "
            "use a core number, or -1 for automatic"
        )
    return number


def set_neuron_cores(trace: torch.nn.Module, start_nc: int = -1, nc_count: int = -1) -> None:
    """Moves every subgraph of ``trace``, live, to ``nc_count`` cores from ``start_nc`` on.

    The new cores are loaded first; then requests go there, those in flight finish, and the old
    cores are freed. All subgraphs move, or none. A module that was not loaded gets loaded. With
    the async flag the call returns at once and the next ``forward`` waits. Thread-safe.

    Args:
        trace: a module with traced subgraphs, at any depth; one without any is left alone.
        start_nc: the first core, counted among those visible to this process; -1 takes the least
            used.
        nc_count: how many cores, one replica each; -1 is one. Executions go round robin over them.

    Raises:
        ValueError: the placement does not fit the visible cores.
        RuntimeError: the runtime cannot be initialised, or the load failed; the module still runs
            where it was.
    """
    start_nc, nc_count = _whole_number("start_nc", start_nc), _whole_number("nc_count", nc_count)
    ops.set_neuron_cores(holder(trace), start_nc, nc_count)


def set_multicore(trace: torch.nn.Module) -> None:
    """Replicates every subgraph of ``trace`` onto all visible cores.

    See :func:`set_neuron_cores`.
    """
    ops.set_multicore(holder(trace))


@contextmanager
def neuron_cores_context(start_nc: int = -1, nc_count: int = -1) -> Iterator[None]:
    """Places what ``torch.jit.load`` loads inside it, on this thread; also a decorator.

    A lazy module that is loaded later still goes where the context said, and so does a module
    traced inside it when it is first used. Contexts nest, the innermost counts, before the
    placement saved in the file. Modules already loaded, and what gets saved, are not affected.

    Args:
        start_nc: as in :func:`set_neuron_cores`.
        nc_count: as in :func:`set_neuron_cores`.

    Raises:
        ValueError: on entry; the placement does not fit the visible cores.
        RuntimeError: on entry; the runtime cannot be initialised.
    """
    start_nc, nc_count = _whole_number("start_nc", start_nc), _whole_number("nc_count", nc_count)
    token = ops.enter_neuron_cores_context(start_nc, nc_count)
    try:
        yield
    finally:
        ops.exit_context(token)


@contextmanager
def multicore_context() -> Iterator[None]:
    """Has ``torch.jit.load`` replicate onto all visible cores. See :func:`neuron_cores_context`."""
    token = ops.enter_multicore_context()
    try:
        yield
    finally:
        ops.exit_context(token)
