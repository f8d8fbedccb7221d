"""What it costs to put other weights into a running module."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness.measure import in_new_process, rounds_of, rows_of
from benchmarks.harness.options import Options
from benchmarks.harness.table import Table
from benchmarks.questions import _saved_files as saved

REPLACE = "replace_weights"
COPY = "copying the tensors one by one"


def replace(options: Options) -> Table:
    """All weights of a model against as many ``Tensor.copy_``."""
    name = "mlp" if options.quick and not options.only else "bert"
    values = in_new_process(
        f"{__name__}:time_replacing",
        file=str(saved.separated(name, options)),
        rounds=max(options.rounds, 5),
    )
    return Table(
        question="weights.replace",
        title=f"replace_weights of all weights of a loaded module ({name})",
        unit="ms",
        better="lower",
        reference=COPY,
        subject=REPLACE,
        rows=rows_of(values, reference=COPY),
        must=1.1,
        aim=0.6,
        notes=[
            "both write to memory that is there already, PyTorch with its threads for both CPUs"
        ],
    )


# ------------------------------------------------------------------------ in processes of their own


def time_replacing(file: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds, one value a round."""
    import neuron_ext

    module = torch.jit.load(file)
    weights = {name: torch.rand_like(own) for name, own in module.state_dict().items()}
    copies = {name: torch.zeros_like(own) for name, own in weights.items()}

    def copy() -> None:
        with torch.no_grad():
            for name, own in copies.items():
                own.copy_(weights[name])

    def milliseconds(work: Callable[[], None]) -> float:
        begin = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - begin)

    subjects: dict[str, Callable[[], None]] = {
        COPY: copy,
        REPLACE: lambda: neuron_ext.replace_weights(module, weights),
    }
    return rounds_of({label: partial(milliseconds, own) for label, own in subjects.items()}, rounds)


QUESTIONS = {"weights.replace": replace}
