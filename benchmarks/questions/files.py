"""How large a saved file is, against the weights in it."""

from __future__ import annotations

from benchmarks import models
from benchmarks.harness.measure import rows_of
from benchmarks.harness.options import Options
from benchmarks.harness.table import Table
from benchmarks.questions import _saved_files as saved

ALLOWANCE = 300_000
"""Bytes for code, graph and description."""

OURS = "neuron_ext"
PLAIN = "plain ScriptModule"
WEIGHTS = "weights plus 300 KB"


def files(options: Options) -> list[Table]:
    """A table for each model."""
    names = ("affine", "mlp") if options.quick else ("affine", "mlp", "resnet50", "bert")
    tables = []
    for name in names:
        weights = saved.weight_bytes(name, options)
        values = {
            WEIGHTS: [(weights + ALLOWANCE) / 1e6],
            OURS: [models.traced(name, options).stat().st_size / 1e6],
            PLAIN: [saved.plain(name, options).stat().st_size / 1e6],
        }
        tables.append(
            Table(
                f"files.{name}",
                f"saved file of {name}, against its weights plus 300 KB",
                "MB",
                "lower",
                WEIGHTS,
                OURS,
                rows_of(values, reference=WEIGHTS),
                must=1.1,
                aim=1.02,
                notes=["MB are 10^6 bytes; the weights are the model's parameters and buffers"],
            )
        )
    return tables


QUESTIONS = {"files": files}
