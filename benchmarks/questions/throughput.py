"""Calls per second: how replicas scale, and against the best peer on the same two cores."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any

from benchmarks.artifacts import artifact
from benchmarks.harness.measure import rows_of
from benchmarks.harness.options import Options, Question
from benchmarks.harness.table import Table
from benchmarks.harness.worker import Worker
from benchmarks.models import traced
from benchmarks.subjects.fleet import Fleet, ours, peers

OURS = "neuron_ext, 2 replicas"
ONE, BOUND = "1 replica, 1 thread", "2 processes, 1 replica each"


class TwoProcesses(Worker):
    """Two processes with a replica and a CPU each, called together: what two cores can do at best.

    What they lose against twice one process is lost to memory and caches that the cores share.
    """

    def __init__(self, name: str, options: Options) -> None:
        first, second = sorted(os.sched_getaffinity(0))[:2]
        settings: dict[str, Any] = {
            "file": str(traced(name, options)),
            "data": str(artifact("data", name, options)),
            "replicas": 1,
            "threads": 1,
        }
        function = "benchmarks.subjects.pytorch:Ours"
        super().__init__(function, cpus=[first], **settings)
        try:
            self._other = Worker(function, cpus=[second], **settings)
        except BaseException:
            self.close()
            raise
        self._pool = ThreadPoolExecutor(1)

    def call(self, method: str, **kwargs: Any) -> Any:
        other = self._pool.submit(self._other.call, method, **kwargs)
        mine = super().call(method, **kwargs)
        result = other.result()
        self.idle_share = max(self.idle_share, self._other.idle_share)
        return max(mine, result) if method == "error" else mine + result

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        self._other.close()
        self.close()


def scaling(options: Options, model: str) -> list[Table]:
    """Two replicas against one, with 2 and with 16 callers."""
    if not options.takes(model):
        return []
    starts = {
        ONE: ours(model, options, replicas=1, threads=1),
        "2 replicas, 2 threads": ours(model, options, replicas=2, threads=2),
        "2 replicas, 16 threads": ours(model, options, replicas=2, threads=16),
        BOUND: lambda: TwoProcesses(model, options),
    }
    with Fleet(starts) as fleet:
        values = fleet.throughputs(options)
        notes = fleet.notes()
    rows = rows_of(values, reference=ONE)
    notes.append(f"{BOUND!r} is the bound that the machine sets: nothing is shared but the memory.")
    return [
        Table(
            question=f"scaling.{model}.{threads}_threads",
            title=f"{model}: throughput of 2 replicas with {threads} calling threads",
            unit="calls/s",
            better="higher",
            reference=ONE,
            subject=f"2 replicas, {threads} threads",
            rows=rows,
            must=1.93,
            aim=1.98,
            notes=notes,
        )
        for threads in (2, 16)
    ]


def against_peers(options: Options, model: str) -> list[Table]:
    """All of two cores, in float32, against whoever is best at it."""
    if not options.takes(model):
        return []
    starts = {OURS: ours(model, options, replicas=2, threads=2), **peers(model, options)}
    with Fleet(starts) as fleet:
        values = fleet.throughputs(options)
        notes = fleet.notes()
    best = best_of({name: own for name, own in values.items() if name != OURS})
    return [
        Table(
            question=f"peers.{model}",
            title=f"{model}: throughput on 2 cores in float32, against the best peer",
            unit="calls/s",
            better="higher",
            reference=best,
            subject=OURS,
            rows=rows_of(values, reference=best),
            must=1.0,
            aim=1.1,
            notes=notes,
        )
    ]


def best_of(values: dict[str, list[float]]) -> str:
    """The subject with the largest median."""
    rows = rows_of(values, reference=None)
    return max(rows, key=lambda row: row.sample.median).subject


_SCALING = ("mlp", "resnet50", "bert")
_PEERS = ("mlp", "minilm", "minilm_batch8", "resnet50", "bert")
QUESTIONS: dict[str, Question] = {
    **{f"scaling.{model}": partial(scaling, model=model) for model in _SCALING},
    **{f"peers.{model}": partial(against_peers, model=model) for model in _PEERS},
}
