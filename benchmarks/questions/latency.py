"""Latency under load: requests that arrive at their own times, at 80 % of what two cores can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from statistics import median

from benchmarks.harness.load import percentile
from benchmarks.harness.measure import rounds_of, rows_of
from benchmarks.harness.options import Options, Question
from benchmarks.harness.table import Table
from benchmarks.harness.worker import Worker
from benchmarks.subjects.fleet import Fleet, ours, two_callers

OURS = "neuron_ext, 2 replicas, 16 callers"
LOAD = 0.8
# A subject nearer to its limit than this only collects a queue; its percentiles say nothing.
SUSTAINED = 0.95
# Percentiles need many requests: windows are longer than those for throughput, rounds are fewer.
QUICK_WINDOWS, FULL_WINDOWS, ROUNDS = 4, 8, 3


def latency(options: Options, model: str) -> list[Table]:
    """The same arrivals for everybody: a Poisson process at 80 % of our own throughput."""
    if options.quick and not options.only and model != "mlp":  # long windows: one model will do
        return []
    starts = {OURS: ours(model, options, replicas=2, threads=16), **two_callers(model, options)}
    seconds = options.window * (QUICK_WINDOWS if options.quick else FULL_WINDOWS)
    found: dict[str, list[list[float]]] = {name: [] for name in starts}
    with Fleet(starts) as fleet:
        limits = {name: median(own) for name, own in fleet.throughputs(options).items()}
        rate = LOAD * limits[OURS]
        rounds_of(
            {
                name: _measure(worker, rate, seconds, found[name])
                for name, worker in fleet.workers.items()
            },
            min(ROUNDS, options.rounds),
            warmup=0,
        )
        fleet.check_idle()
        notes = fleet.notes()
    loads = ", ".join(f"{name} {rate / limit:.0%}" for name, limit in limits.items())
    notes += [
        f"{rate:.1f} requests/s, about {rate * seconds:.0f} per round: {LOAD:.0%} of what "
        f"{OURS!r} can do, the same arrivals for everybody. As a share of what each can do: "
        f"{loads}.",
        f"The best peer is the one with the lowest p99/p50 among those below {SUSTAINED:.0%}.",
    ]
    ratios = _percentiles(found, lambda own: percentile(own, 0.99) / percentile(own, 0.5))
    best = _best_peer(ratios, {name: rate / limit for name, limit in limits.items()})
    tables = []
    for what, unit, values in (
        ("p99/p50", "p99/p50", ratios),
        ("p99", "ms", _percentiles(found, lambda own: 1e3 * percentile(own, 0.99))),
        ("p50", "ms", _percentiles(found, lambda own: 1e3 * percentile(own, 0.5))),
    ):
        asked = what == "p99/p50"
        tables.append(
            Table(
                question=f"latency.{model}.{what.replace('/', '_')}",
                title=f"{model}: {what} latency at {LOAD:.0%} load on 2 cores",
                unit=unit,
                better="lower",
                reference=best,
                subject=OURS,
                rows=rows_of(values, reference=best),
                must=1.0 if asked else None,
                aim=0.8 if asked else None,
                notes=notes,
            )
        )
    return tables


def _measure(
    worker: Worker, rate: float, seconds: float, found: list[list[float]]
) -> Callable[[], float]:
    seeds: Iterator[int] = count()

    def measure() -> float:
        found.append(worker.call("latencies", rate=rate, seconds=seconds, seed=next(seeds)))
        return percentile(found[-1], 0.99)

    return measure


def _percentiles(
    found: dict[str, list[list[float]]], value: Callable[[list[float]], float]
) -> dict[str, list[float]]:
    return {name: [value(own) for own in rounds] for name, rounds in found.items()}


def _best_peer(ratios: dict[str, list[float]], loads: dict[str, float]) -> str:
    peers = [name for name in ratios if name != OURS]
    able = [name for name in peers if loads[name] <= SUSTAINED]
    if not able:  # then the one that comes nearest to carrying the load
        return min(peers, key=lambda name: loads[name])
    return min(able, key=lambda name: median(ratios[name]))


QUESTIONS: dict[str, Question] = {
    f"latency.{model}": partial(latency, model=model) for model in ("mlp", "minilm", "resnet50")
}
