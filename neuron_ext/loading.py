"""When subgraphs load: lazily, in the background, now, or again after an unload.

``lazy_load`` and ``async_load`` behave as the "Lazy and Asynchronous Loading API" page of the
Neuron documentation says.
"""

from __future__ import annotations

import torch

from neuron_ext._library import ops
from neuron_ext._subgraphs import holder


def lazy_load(trace: torch.nn.Module, enable_lazy_load: bool = True) -> None:
    """Sets whether ``torch.jit.load`` leaves the module off its core until its first use.

    First use is ``forward``, ``set_neuron_cores`` or ``wait``. The flag is saved with the module
    and counts for later loads of it. Thread-safe.

    Args:
        trace: a module with traced subgraphs; one without any is left alone.
        enable_lazy_load: on or off.
    """
    ops.set_lazy_load(holder(trace), bool(enable_lazy_load))


def async_load(trace: torch.nn.Module, enable_async_load: bool = True) -> None:
    """Sets whether what triggers a load returns at once while the load goes on in the background.

    ``forward`` waits for the load. A load that failed raises its error at the next ``forward`` or
    ``wait``; another ``forward`` tries again. The flag is saved with the module. Thread-safe.

    Args:
        trace: a module with traced subgraphs; one without any is left alone.
        enable_async_load: on or off.
    """
    ops.set_async_load(holder(trace), bool(enable_async_load))


def wait(module: torch.nn.Module, timeout: float | None = None) -> None:
    """Waits until every subgraph of ``module`` is loaded; starts loads that have not begun.

    Thread-safe; other threads run meanwhile.

    Args:
        module: a module with traced subgraphs; for one without any there is nothing to wait for.
        timeout: in seconds; None waits as long as it takes.

    Raises:
        RuntimeError: a load failed; the text is the load's own.
        TimeoutError: a load still runs after ``timeout``. It goes on.
        ValueError: ``timeout`` is negative.
    """
    if not ops.wait(holder(module), None if timeout is None else float(timeout)):
        raise TimeoutError(f"the module is still loading after {timeout} s; the load goes on")


def unload(module: torch.nn.Module) -> None:
    """Frees the cores of every subgraph of ``module``; the next use loads again.

    Waits for a load under way; requests in flight finish. Thread-safe.
    """
    ops.unload(holder(module))
