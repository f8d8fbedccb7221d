"""What a loaded subgraph takes, at rest and at its peak, alone and shared."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Mapping

import torch

from benchmarks import models
from benchmarks.harness.measure import in_new_process, rows_of
from benchmarks.harness.options import Options
from benchmarks.harness.table import Table
from benchmarks.questions import _saved_files as saved
from benchmarks.questions._resident import FRESH_PAGES, peak, reset_peak, resident

OURS = "neuron_ext"
PLAIN = "plain ScriptModule"
WEIGHTS = "the weights"

_NOTES = [
    "MB are 10^6 bytes of private resident memory (Private_Clean and Private_Dirty of smaps_rollup)"
    " on top of a process that has loaded and run another model; a peak counts all resident pages; "
    "each value is of a process of its own; the weights are the model's parameters and buffers",
]


def memory(options: Options) -> list[Table]:
    """Of one file, of the same file twice, and while it is loaded."""
    name = "mlp" if options.quick else "bert"
    subjects = {OURS: models.traced(name, options), PLAIN: saved.plain(name, options)}
    affine, inputs = models.traced("affine", options), saved.example_inputs(name, options)
    # The same in each process, but for what the kernel and malloc round.
    measured: dict[str, list[dict[str, float]]] = {subject: [] for subject in subjects}
    for _ in range(min(options.rounds, 3)):
        for subject, file in subjects.items():
            measured[subject].append(
                in_new_process(
                    f"{__name__}:load_and_measure",
                    environment=FRESH_PAGES,
                    file=str(file),
                    inputs=str(inputs),
                    affine=str(affine),
                )
            )
    weights = saved.weight_bytes(name, options) / 1e6
    count = len(measured[OURS])
    carried = measured[OURS][0]["carried"]
    notes = [*_NOTES, f"the file of {OURS} carries {carried:.1f} MB of weights"]

    def values(labels: Mapping[str, tuple[str, str]]) -> dict[str, list[float]]:
        return {
            label: [one[key] for one in measured[subject]]
            for label, (subject, key) in labels.items()
        }

    def against_weights(
        question: str, title: str, must: float, aim: float, labels: Mapping[str, tuple[str, str]]
    ) -> Table:
        rows = rows_of({WEIGHTS: [weights] * count, **values(labels)}, reference=WEIGHTS)
        return Table(question, title, "MB", "lower", WEIGHTS, OURS, rows, must, aim, notes)

    once = f"{OURS}, loaded once"
    twice = f"{OURS}, loaded twice"
    return [
        against_weights(
            "memory.loaded",
            f"memory of a loaded subgraph ({name}), against its weights",
            1.25,
            1.05,
            {
                OURS: (OURS, "once"),
                PLAIN: (PLAIN, "once"),
                f"{OURS}, after a forward": (OURS, "used"),
                f"{PLAIN}, after a forward": (PLAIN, "used"),
            },
        ),
        Table(
            "memory.twice",
            f"memory of the same file loaded twice ({name}), against once",
            "MB",
            "lower",
            once,
            twice,
            rows_of(
                values(
                    {
                        once: (OURS, "once"),
                        twice: (OURS, "twice"),
                        f"{OURS}, loaded once and deep-copied": (OURS, "copied"),
                        f"{PLAIN}, loaded once": (PLAIN, "once"),
                        f"{PLAIN}, loaded twice": (PLAIN, "twice"),
                        f"{PLAIN}, loaded once and deep-copied": (PLAIN, "copied"),
                    }
                ),
                reference=once,
            ),
            must=1.1,
            aim=1.0,
            notes=notes,
        ),
        against_weights(
            "memory.peak",
            f"memory peak during a load ({name}), against the weights",
            2.2,
            1.2,
            {
                OURS: (OURS, "peak"),
                PLAIN: (PLAIN, "peak"),
                f"{OURS}, while loading it a second time": (OURS, "peak_of_second"),
                f"{PLAIN}, while loading it a second time": (PLAIN, "peak_of_second"),
            },
        ),
    ]


# ------------------------------------------------------------------------- in a process of its own


def load_and_measure(file: str, inputs: str, affine: str) -> dict[str, float]:
    """Megabytes on top of what the process had before."""
    warnings.simplefilter("ignore")
    import neuron_ext  # registers the class that the files hold

    example_inputs = torch.load(inputs)
    # Runtime, core threads, the interpreter, pages of libraries: there once, whatever is loaded.
    x = torch.ones(3)
    warm = torch.jit.load(affine)
    warm(x, x)
    again = [torch.jit.load(affine), copy.deepcopy(warm)]
    _carried(warm)
    del again
    gc.collect()
    before = resident()
    reset_peak()

    first = torch.jit.load(file)
    values = {"once": (resident() - before).private, "peak": peak() - before.all}
    values["carried"] = _carried(first)

    copied = copy.deepcopy(first)
    neuron_ext.wait(copied)
    values["copied"] = (resident() - before).private
    del copied
    gc.collect()

    reset_peak()
    second = torch.jit.load(file)
    values["twice"] = (resident() - before).private
    values["peak_of_second"] = peak() - before.all
    del second
    gc.collect()

    with torch.no_grad():
        first(*example_inputs)
    values["used"] = (resident() - before).private
    return values


def _carried(module: torch.jit.ScriptModule) -> float:
    """Megabytes of weights in the subgraphs of ``module``; 0 for a plain one."""
    import neuron_ext

    return sum(
        subgraph.__getstate__()[0][5]["weights"].numel() / 1e6
        for subgraph in neuron_ext._subgraphs.find_subgraphs(module)
        if "weights" in subgraph.__getstate__()[0][5]
    )


QUESTIONS = {"memory": memory}
