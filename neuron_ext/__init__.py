"""Compiled subgraphs inside TorchScript modules, placed on NeuronCores.

Importing loads the library that registers the class ``torch.classes.neuron_ext.NeuronSubgraph``,
which ``torch.jit.load`` needs. It takes no core: that happens at first need.
"""

from typing import TYPE_CHECKING
from typing import Any as _Any

from neuron_ext import experimental
from neuron_ext._forks import watch_forks as _watch_forks
from neuron_ext._library import PACKAGE as _PACKAGE
from neuron_ext._version import __version__
from neuron_ext.batching import dynamic_batch
from neuron_ext.data_parallel import DataParallel
from neuron_ext.loading import async_load, lazy_load, unload, wait
from neuron_ext.placement import (
    multicore_context,
    neuron_cores_context,
    set_multicore,
    set_neuron_cores,
)
from neuron_ext.signing import sign, verify
from neuron_ext.status import CoreStats, SubgraphStatus, core_stats, status, visible_core_count
from neuron_ext.weights import move_trace_to_device, replace_weights, reset_state

if TYPE_CHECKING:
    from neuron_ext._trace import trace
    from neuron_ext.buckets import BucketModelConfig, bucket_model_trace
    from neuron_ext.partition import PartitionerConfig, analyze

_watch_forks()

cmake_prefix_path = str(_PACKAGE / "share" / "cmake")
"""For ``CMAKE_PREFIX_PATH``, so that ``find_package(NeuronExt)`` finds the C++ side."""


def __getattr__(name: str) -> _Any:
    # Who serves models does not compile: what `trace` needs is imported when it is first asked for.
    if name == "trace":
        from neuron_ext._trace import trace

        globals()["trace"] = trace
        return trace
    if name in ("BucketModelConfig", "bucket_model_trace"):
        from neuron_ext import buckets

        globals()[name] = getattr(buckets, name)
        return globals()[name]
    if name in ("PartitionerConfig", "analyze"):
        from neuron_ext import partition

        globals()[name] = getattr(partition, name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "BucketModelConfig",
    "CoreStats",
    "DataParallel",
    "PartitionerConfig",
    "SubgraphStatus",
    "__version__",
    "analyze",
    "async_load",
    "bucket_model_trace",
    "cmake_prefix_path",
    "core_stats",
    "dynamic_batch",
    "experimental",
    "lazy_load",
    "move_trace_to_device",
    "multicore_context",
    "neuron_cores_context",
    "replace_weights",
    "reset_state",
    "set_multicore",
    "set_neuron_cores",
    "sign",
    "status",
    "trace",
    "unload",
    "verify",
    "visible_core_count",
    "wait",
]
