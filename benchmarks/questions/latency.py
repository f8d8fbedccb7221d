"""Latency under load: requests that arrive at their own times, at 80 % of what two cores can do."""

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
# A subject nearer to its limit than this only collects a queue; its percentiles say nothing.
SUSTAINED = 0.95
# A percentile takes requests, and a queue some time to come and go.
REQUESTS, WINDOWS = 300, 2


def latency(options: Options, model: str) -> list[Table]:
    """Poisson arrivals at 80 % of our own throughput, as it is before each measurement."""
    if options.quick and not options.only and model != "mlp":  # long windows: one model will do
        return []
    starts = {
        OURS: ours(model, options, replicas=2, threads=2),
        MANY: ours(model, options, replicas=2, threads=16),
        **two_callers(model, options),
    }
    found: dict[str, list[list[float]]] = {name: [] for name in starts}
    with Fleet(starts) as fleet:
        limits = {name: median(own) for name, own in fleet.throughputs(options).items()}
        for number in range(options.rounds):
            for name in rotated(list(starts), number):
                found[name].append(_latencies(fleet, name, options.window, seed=number))
        fleet.check_idle()
        notes = fleet.notes()
    shares = {name: LOAD * limits[OURS] / limit for name, limit in limits.items()}
    loads = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    fewest = min(len(own) for rounds in found.values() for own in rounds)
    notes += [
        f"Before each measurement {OURS!r} is asked what it can do just then: requests arrive at "
        f"{LOAD:.0%} of that, about {LOAD * limits[OURS]:.1f} a second, {fewest} or more each "
        f"time. As a share of what each can do: {loads}.",
        f"The best peer is the one with the lowest p99/p50 among those below {SUSTAINED:.0%}.",
    ]
    ratios = _percentiles(found, lambda own: percentile(own, 0.99) / percentile(own, 0.5))
    best = _best_peer(ratios, shares)
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


def _latencies(fleet: Fleet, name: str, window: float, seed: int) -> list[float]:
    """Seconds per request of one subject, at a rate that is right for the machine as it is now."""
    rate = LOAD * float(fleet.workers[OURS].call("throughput", seconds=window))
    seconds = max(WINDOWS * window, REQUESTS / rate)
    found: list[float] = fleet.workers[name].call(
        "latencies", rate=rate, seconds=seconds, seed=seed
    )
    return found


def _percentiles(
    found: dict[str, list[list[float]]], value: Callable[[list[float]], float]
) -> dict[str, list[float]]:
    return {name: [value(own) for own in rounds] for name, rounds in found.items()}


def _best_peer(ratios: dict[str, list[float]], loads: dict[str, float]) -> str:
    peers = [name for name in ratios if name not in (OURS, MANY)]
    able = [name for name in peers if loads[name] <= SUSTAINED]
    if not able:  # then the one that comes nearest to carrying the load
        return min(peers, key=lambda name: loads[name])
    return min(able, key=lambda name: median(ratios[name]))


QUESTIONS: dict[str, Question] = {
    f"latency.{model}": partial(latency, model=model) for model in ("mlp", "minilm", "resnet50")
}
