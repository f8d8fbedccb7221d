"""What one more replica of a loaded subgraph costs, and what a move from core to core takes."""

from __future__ import annotations

import gc
import time
import warnings

import torch

from benchmarks import models
from benchmarks.harness.measure import in_new_process, rows_of
from benchmarks.harness.options import Options
from benchmarks.harness.table import Table
from benchmarks.questions import _saved_files as saved
from benchmarks.questions._resident import FRESH_PAGES, resident

REPLICAS = 16
"""Cores of the process that measures, whatever CPUs there are: nothing computes meanwhile."""

ONE_MORE = "one more replica"
ONE_MORE_USED = "one more replica, after a forward on it"
PLAIN = "one more torch.jit.load of a plain ScriptModule"
MOVE = "a move from core to core"
DOUBLE = "a move from one core to two"
MOST = f"a move from one core to {REPLICAS}"

_NOTES = [
    f"a move loads all its replicas anew, so one more is the difference between a move to "
    f"{REPLICAS} cores and a move to one, divided by {REPLICAS - 1}",
    "the garbage collector runs before each move, so that caches are not warm from the last one",
    "MB are 10^6 bytes of private resident memory",
]


def moves(options: Options) -> list[Table]:
    """Times and memory, for each as many values as there are rounds."""
    name = "mlp" if options.quick else "bert"
    arguments = {
        "file": str(models.traced(name, options)),
        "plain": str(saved.plain(name, options)),
        "inputs": str(saved.example_inputs(name, options)),
    }
    environment = {**FRESH_PAGES, "NEURON_EXT_HOST_CORES": str(REPLICAS)}
    times = in_new_process(
        f"{__name__}:time_moves", environment=environment, rounds=options.rounds, **arguments
    )
    sizes: dict[str, list[float]] = {}
    for _ in range(min(options.rounds, 3)):
        sized = in_new_process(f"{__name__}:size_replicas", environment=environment, **arguments)
        for label, value in sized.items():
            sizes.setdefault(label, []).append(value)

    def table(
        question: str, title: str, unit: str, subject: str, values: dict[str, list[float]]
    ) -> Table:
        return Table(
            question,
            title,
            unit,
            "lower",
            subject,
            subject,
            rows_of(values, reference=None),
            must=2.0,
            aim=0.5,
            notes=list(_NOTES),
            compare="value",
        )

    return [
        table(
            "moves.replica_time",
            f"one more replica of a loaded subgraph ({name}): time",
            "ms",
            ONE_MORE,
            {label: times[label] for label in (ONE_MORE, PLAIN)},
        ),
        table(
            "moves.replica_memory",
            f"one more replica of a loaded subgraph ({name}): private memory",
            "MB",
            ONE_MORE,
            {label: sizes[label] for label in (ONE_MORE, ONE_MORE_USED, PLAIN)},
        ),
        table(
            "moves.core_to_core",
            f"a move from core to core of a loaded subgraph ({name})",
            "ms",
            MOVE,
            {label: times[label] for label in (MOVE, DOUBLE, MOST)},
        ),
    ]


# ------------------------------------------------------------------------ in processes of their own


def time_moves(file: str, plain: str, inputs: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds, one value a round."""
    import neuron_ext

    module = _loaded_and_used(file, inputs)

    def moved(start_nc: int, nc_count: int) -> float:
        neuron_ext.set_neuron_cores(module, 0, 1)
        gc.collect()  # and other work in between, as in a server: caches are not warm from a move
        begin = time.perf_counter()
        neuron_ext.set_neuron_cores(module, start_nc, nc_count)
        return 1e3 * (time.perf_counter() - begin)

    values: dict[str, list[float]] = {}
    for number in range(1 + rounds):
        one = {MOVE: moved(1, 1), DOUBLE: moved(0, 2), MOST: moved(0, REPLICAS)}
        one[ONE_MORE] = (one[MOST] - one[MOVE]) / (REPLICAS - 1)
        begin = time.perf_counter()
        other = torch.jit.load(plain)
        one[PLAIN] = 1e3 * (time.perf_counter() - begin)
        del other
        if number > 0:  # the first warms up
            for label, value in one.items():
                values.setdefault(label, []).append(value)
    return values


def size_replicas(file: str, plain: str, inputs: str) -> dict[str, float]:
    """Megabytes of private memory."""
    import neuron_ext

    module = _loaded_and_used(file, inputs)
    example_inputs = torch.load(inputs)
    before = resident()
    neuron_ext.set_neuron_cores(module, 0, REPLICAS)
    loaded = resident()
    with torch.no_grad():
        for _ in range(REPLICAS):  # round robin: one on each
            module(*example_inputs)
    used = resident()
    other = torch.jit.load(plain)
    with_plain = resident()
    del other
    return {
        ONE_MORE: (loaded - before).private / (REPLICAS - 1),
        ONE_MORE_USED: (used - before).private / (REPLICAS - 1),
        PLAIN: (with_plain - used).private,
    }


def _loaded_and_used(file: str, inputs: str) -> torch.jit.ScriptModule:
    """On core 0, after a forward."""
    warnings.simplefilter("ignore")
    import neuron_ext

    with neuron_ext.neuron_cores_context(0, 1):
        module = torch.jit.load(file)
    with torch.no_grad():
        module(*torch.load(inputs))
    gc.collect()
    return module


QUESTIONS = {"moves": moves}
