"""What `DataParallel` gains on two cores, and what a call of it costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks import models
from benchmarks.harness.measure import in_new_process, rounds_of, rows_of
from benchmarks.harness.options import Options, Question
from benchmarks.harness.table import Table

ONE = "the traced module on 1 core"
TWO = "DataParallel on 2 cores"
EAGER = "eager PyTorch, 1 thread"
CHUNKS = "the module, chunk after chunk"
CALL = "DataParallel"


def batches(options: Options, rows: int) -> list[Table]:
    """A batch on two cores against the same batch on one."""
    name = "mlp" if options.quick and not options.only else "resnet50"
    times = in_new_process(
        f"{__name__}:time_batches",
        name=name,
        file=str(models.traced(name, options)),
        rows=rows,
        rounds=options.rounds,
    )
    speeds = {label: [rows / seconds for seconds in own] for label, own in times.items()}
    return [
        Table(
            question=f"parallel.batch_{rows}",
            title=f"{name}: a batch of {rows} with DataParallel on 2 cores",
            unit="rows/s",
            better="higher",
            reference=ONE,
            subject=TWO,
            rows=rows_of(speeds, reference=ONE),
            must=1.9,
            aim=1.98,
            notes=["the traced module takes the batch by dynamic batching, as DataParallel does"],
        )
    ]


def call(options: Options) -> list[Table]:
    """A call on a tiny model against its chunks called one after another."""
    values = in_new_process(
        f"{__name__}:time_calls",
        file=str(models.traced("affine", options)),
        rounds=options.rounds,
    )
    return [
        Table(
            question="parallel.call",
            title="2*x+y: fixed cost of a DataParallel call of two chunks on 2 cores",
            unit="us",
            better="lower",
            reference=CHUNKS,
            subject=CALL,
            rows=rows_of(values, reference=CHUNKS, compare="difference"),
            must=50.0,
            aim=10.0,
            compare="difference",
        )
    ]


# ------------------------------------------------------------------------ in processes of their own


def time_batches(name: str, file: str, rows: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a batch, one value a round."""
    import neuron_ext

    torch.set_num_threads(1)
    eager, (example, *_) = models.build(name)
    with neuron_ext.neuron_cores_context(0, 1):
        one = neuron_ext.dynamic_batch(torch.jit.load(file))
    two = neuron_ext.DataParallel(torch.jit.load(file), [0, 1])
    batch = torch.rand(rows, *example.shape[1:])

    def seconds(module: Callable[[torch.Tensor], torch.Tensor]) -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            module(batch)
        return time.perf_counter() - begin

    torch.testing.assert_close(two(batch), one(batch))
    subjects = {ONE: one, TWO: two, EAGER: eager}
    return rounds_of({label: partial(seconds, own) for label, own in subjects.items()}, rounds)


def time_calls(file: str, rounds: int) -> dict[str, list[float]]:
    """Microseconds a call, one value a round."""
    import neuron_ext

    calls = 2000
    with neuron_ext.neuron_cores_context(0, 1):
        module = torch.jit.load(file)
    # A chunk is what was traced, one row of three numbers.
    parallel = neuron_ext.DataParallel(torch.jit.load(file), [0, 1], set_dynamic_batching=False)
    x, y = torch.rand(6), torch.rand(6)
    chunks = list(zip(x.split(3), y.split(3), strict=True))

    def one_after_another() -> None:
        for a, b in chunks:
            module(a, b)

    def microseconds(work: Callable[[], object]) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        return 1e6 * (time.perf_counter() - begin) / calls

    subjects: dict[str, Callable[[], object]] = {
        CHUNKS: one_after_another,
        CALL: lambda: parallel(x, y),
    }
    return rounds_of({label: partial(microseconds, own) for label, own in subjects.items()}, rounds)


QUESTIONS: dict[str, Question] = {
    **{f"parallel.batch_{rows}": partial(batches, rows=rows) for rows in (8, 64)},
    "parallel.call": call,
}
