"""Latency under load: requests that arrive at their own times, at 80 % of what a subject can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

from benchmarks.harness.load import arrivals, at_constant_speed, percentile
from benchmarks.harness.machine import stolen_share
from benchmarks.harness.measure import rotated, rows_of
from benchmarks.harness.options import Options, Question
from benchmarks.harness.table import Table
from benchmarks.harness.worker import Worker
from benchmarks.subjects.fleet import Fleet, ours, two_callers

OURS, MANY = "neuron_ext, 2 replicas, 2 callers", "neuron_ext, 2 replicas, 16 callers"
# How far two subjects can be from each other that do not differ.
AGAIN = "neuron_ext, 2 replicas, 2 callers, again"
# What a queue alone makes of the same arrivals: the mark for all, however fast they are.
STEADY = "2 cores of constant speed, calculated"
# What the machine makes of them: requests that all take the same instructions, as long as ours.
FIXED = "the same hashes each time, 2 callers"
LOAD = 0.8
# A shared machine is at half its speed for seconds, and at a tenth for moments. One such moment is
# the p99 of all that is measured together with it, be it minutes: so there are many short turns,
# each with percentiles of its own, and the median of them is told.
TURNS_PER_ROUND = 8
# A queue takes some requests to come.
REQUESTS = 100


def latency(options: Options, model: str) -> list[Table]:
    """Poisson arrivals at 80 % of the subject's throughput, as it is just before.

    At one rate for all, the slower subjects would only collect a queue: their p99/p50 says nothing.
    """
    if options.quick and not options.only and model != "mlp":  # long windows: one model will do
        return []
    starts = {
        OURS: ours(model, options, replicas=2, threads=2),
        AGAIN: ours(model, options, replicas=2, threads=2),
        MANY: ours(model, options, replicas=2, threads=16),
        **two_callers(model, options),
        FIXED: _fixed_work,
    }
    found: dict[str, list[list[float]]] = {name: [] for name in [*starts, STEADY]}
    loads: dict[str, list[_AtLoad]] = {name: [] for name in starts}
    with Fleet(starts) as fleet, stolen_share() as stolen:
        pace = fleet.workers[OURS].call("throughput", seconds=options.window)
        fleet.workers[FIXED].call("last_as_long_as", throughput=pace, seconds=options.window)
        for turn in range(options.rounds * TURNS_PER_ROUND):
            for name in rotated(list(starts), turn):
                loads[name].append(_measure(fleet.workers[name], options.window, seed=turn))
                found[name].append(loads[name][-1].latencies)
            found[STEADY].append(loads[OURS][-1].at_constant_speed(seed=turn))
        fleet.check_idle()
        notes = fleet.notes()
    fewest = min(len(turn) for turns in found.values() for turn in turns)
    rates = ", ".join(
        f"{name} {median(one.rate for one in own):.1f}" for name, own in loads.items()
    )
    notes += [
        "In each turn every subject is asked what it can do just then, and has requests at "
        f"{LOAD:.0%} of that, about {REQUESTS} or more; {fewest} or more in a turn. Values are "
        f"medians of turns. Requests per second: {rates}. The hypervisor took {stolen():.1%} of "
        "the CPUs' time away.",
        f"{AGAIN}: a second process of the same. What is between the two is chance.",
        f"{STEADY}: the arrivals of {OURS}, with requests that all take what they took on average "
        "before. What a subject is above it comes of inferences that take longer than others.",
        f"{FIXED}: no model, no memory, the same instructions for each request, as long as one of "
        f"{OURS} took in the beginning. What it is above constant speed is the machine's.",
        "The best peer is the one with the lowest p99/p50.",
    ]
    ratios = _percentiles(found, lambda own: percentile(own, 0.99) / percentile(own, 0.5))
    best = min(
        set(ratios) - {OURS, AGAIN, MANY, STEADY, FIXED}, key=lambda name: median(ratios[name])
    )
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


@dataclass(frozen=True)
class _AtLoad:
    """Seconds per request at ``rate`` requests per second for ``seconds``."""

    latencies: list[float]
    rate: float
    seconds: float

    def at_constant_speed(self, seed: int) -> list[float]:
        """What the latencies were if two cores always did what the load is `LOAD` of."""
        return at_constant_speed(arrivals(self.rate, self.seconds, seed), 2, 2 * LOAD / self.rate)


def _fixed_work() -> Worker:
    return Worker("benchmarks.subjects.fixed_work:FixedWork", threads=2)


def _measure(worker: Worker, window: float, seed: int) -> _AtLoad:
    """One turn of a subject: a quarter of ``window`` as fast as it can, half of it under load."""
    rate = LOAD * float(worker.call("callers_throughput", seconds=window / 4))
    seconds = max(window / 2, REQUESTS / rate)
    found: list[float] = worker.call("latencies", rate=rate, seconds=seconds, seed=seed)
    return _AtLoad(found, rate, seconds)


def _percentiles(
    found: dict[str, list[list[float]]], value: Callable[[list[float]], float]
) -> dict[str, list[float]]:
    return {name: [value(turn) for turn in turns] for name, turns in found.items()}


QUESTIONS: dict[str, Question] = {
    f"latency.{model}": partial(latency, model=model) for model in ("mlp", "minilm", "resnet50")
}
