"""Latency under load: requests that arrive at their own times, at 80 % of what a subject can do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

from benchmarks.harness.load import percentile
from benchmarks.harness.measure import rotated, rows_of
from benchmarks.harness.options import Options, Question
from benchmarks.harness.table import Table
from benchmarks.subjects.fleet import Fleet, ours, two_callers

OURS, MANY = "neuron_ext, 2 replicas, 2 callers", "neuron_ext, 2 replicas, 16 callers"
LOAD = 0.8
# A percentile takes requests, and a queue some time to come and go.
REQUESTS, WINDOWS = 300, 2


def latency(options: Options, model: str) -> list[Table]:
    """Poisson arrivals at 80 % of the subject's throughput, as it is just before.

    At one rate for all, the slower subjects would only collect a queue: their p99/p50 says nothing.
    """
    if options.quick and not options.only and model != "mlp":  # long windows: one model will do
        return []
    starts = {
        OURS: ours(model, options, replicas=2, threads=2),
        MANY: ours(model, options, replicas=2, threads=16),
        **two_callers(model, options),
    }
    found: dict[str, list[list[float]]] = {name: [] for name in starts}
    rates: dict[str, list[float]] = {name: [] for name in starts}
    with Fleet(starts) as fleet:
        for number in range(options.rounds):
            for name in rotated(list(starts), number):
                rate = LOAD * float(fleet.workers[name].call("throughput", seconds=options.window))
                rates[name].append(rate)
                found[name].append(_latencies(fleet, name, rate, options.window, seed=number))
        fleet.check_idle()
        notes = fleet.notes()
    loads = ", ".join(f"{name} {median(own):.1f}" for name, own in rates.items())
    fewest = min(len(own) for rounds in found.values() for own in rounds)
    notes += [
        "Before each measurement the subject is asked what it can do just then: requests arrive "
        f"at {LOAD:.0%} of that, {fewest} or more each time. Requests per second: {loads}.",
        "The best peer is the one with the lowest p99/p50.",
    ]
    ratios = _percentiles(found, lambda own: percentile(own, 0.99) / percentile(own, 0.5))
    best = min(set(ratios) - {OURS, MANY}, key=lambda name: median(ratios[name]))
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


def _latencies(fleet: Fleet, name: str, rate: float, window: float, seed: int) -> list[float]:
    """Seconds per request of one subject, for ``rate`` requests per second."""
    seconds = max(WINDOWS * window, REQUESTS / rate)
    found: list[float] = fleet.workers[name].call(
        "latencies", rate=rate, seconds=seconds, seed=seed
    )
    return found


def _percentiles(
    found: dict[str, list[list[float]]], value: Callable[[list[float]], float]
) -> dict[str, list[float]]:
    return {name: [value(own) for own in rounds] for name, rounds in found.items()}


QUESTIONS: dict[str, Question] = {
    f"latency.{model}": partial(latency, model=model) for model in ("mlp", "minilm", "resnet50")
}
