"""What subgraphs and cores are doing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neuron_ext._library import ops
from neuron_ext._subgraphs import holder


@dataclass(frozen=True)
class SubgraphStatus:
    """One subgraph of a module, at the moment of asking."""

    name: str
    state: str
    """``"unloaded"``, ``"loading"``, ``"loaded"`` or ``"failed"``."""
    cores: list[int]
    """The cores it is loaded on, in round-robin order."""
    start_nc: int
    """The placement that counts for its next load; -1 is automatic."""
    nc_count: int
    lazy_load: bool
    async_load: bool
    dynamic_batch: bool
    executions: list[int]
    """Inferences since the load, one count for each of ``cores``."""
    error: str
    """Why the last load or move failed; else empty."""
    quarantined: list[int]
    """Those of ``cores`` that get no inferences now: the replica failed again and again while
    others did not, or an inference on the core ran past ``NEURON_RT_EXEC_TIMEOUT`` and has not come
    back."""


@dataclass(frozen=True)
class CoreStats:
    """One visible core, at the moment of asking."""

    index: int
    """Its number in this process."""
    global_index: int
    """Its number on this machine."""
    cpus: list[int]
    """The CPUs it computes on."""
    models: int
    """Replicas loaded on it."""
    executions: int
    busy_seconds: float
    quarantined: bool
    """Whether it gets no inferences now, of one subgraph at least."""


def status(module: torch.nn.Module) -> list[SubgraphStatus]:
    """One entry per subgraph of ``module``, in the order of attributes.

    Thread-safe; waits for nothing.
    """
    return [SubgraphStatus(*fields) for fields in ops.status(holder(module))]


def visible_core_count() -> int:
    """How many cores this process may use. Initialises the runtime.

    Raises:
        RuntimeError: the runtime cannot be initialised: a variable holds junk, or a core is taken.
    """
    return int(ops.visible_core_count())


def core_stats() -> list[CoreStats]:
    """One entry per visible core. Initialises the runtime; thread-safe.

    Raises:
        RuntimeError: as for :func:`visible_core_count`.
    """
    return [CoreStats(*fields) for fields in ops.core_stats()]
