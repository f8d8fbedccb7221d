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
# What a queue alone makes of the same arrivals: the mark for all, however fast they are.
STEADY = "2 cores of constant speed, calculated"
# What the machine makes of them: requests that all take the same instructions, as long as ours.
FIXED = "the same hashes each time, 2 callers"
LOAD = 0.8
# A percentile takes requests, and a queue some time to come and go.
REQUESTS, WINDOWS = 300, 2
# The load is what it is said to be if the throughput after is that before, within as much, and the
# CPUs were not away for longer than this share of the time: at this load, a queue takes four times
# as long to go as the stall that it came of. If not, the machine is to blame for what the slowest
# requests took, and it is measured again, so many times.
CHANGE, STOLEN, ATTEMPTS = 0.1, 0.005, 4


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
        FIXED: _fixed_work,
    }
    found: dict[str, list[list[float]]] = {name: [] for name in starts}
    loads: dict[str, list[_AtLoad]] = {name: [] for name in starts}
    with Fleet(starts) as fleet:
        pace = fleet.workers[OURS].call("throughput", seconds=options.window)
        fleet.workers[FIXED].call("last_as_long_as", throughput=pace, seconds=options.window)
        for number in range(options.rounds):
            for name in rotated(list(starts), number):
                measured = _measure(fleet, name, options.window, seed=number)
                loads[name].append(measured)
                found[name].append(measured.latencies)
            found.setdefault(STEADY, []).append(loads[OURS][-1].at_constant_speed(seed=number))
        fleet.check_idle()
        notes = fleet.notes()
    fewest = min(len(own) for rounds in found.values() for own in rounds)
    everything = [one for own in loads.values() for one in own]
    unsteady = sum(one.disturbance > 1 for one in everything)
    rates = ", ".join(
        f"{name} {median(one.rate for one in own):.1f} ({median(one.load for one in own):.0%})"
        for name, own in loads.items()
    )
    notes += [
        "Before and after each measurement the subject is asked what it can do just then: requests "
        f"arrive at {LOAD:.0%} of what it could before, {fewest} or more each time. Where that "
        f"changed by more than {CHANGE:.0%}, or the hypervisor took more than {STOLEN:.1%} of the "
        f"CPUs' time away, it was measured again, up to {ATTEMPTS} times; the least disturbed "
        f"counts. {unsteady} of {len(everything)} stayed disturbed. "
        f"Requests per second, and load by what it could before and after: {rates}.",
        f"{STEADY}: the arrivals of {OURS}, with requests that all take what they took on average "
        "before. What a subject is above it comes of inferences that take longer than others.",
        f"{FIXED}: no model, no memory, the same instructions for each request, as long as one of "
        f"{OURS} took in the beginning. What it is above constant speed is the machine's.",
        "The best peer is the one with the lowest p99/p50.",
    ]
    ratios = _percentiles(found, lambda own: percentile(own, 0.99) / percentile(own, 0.5))
    best = min(set(ratios) - {OURS, MANY, STEADY, FIXED}, key=lambda name: median(ratios[name]))
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
    """Seconds per request at ``rate`` requests per second for ``seconds``, throughput before and
    after, and what share of the CPUs' time other machines had meanwhile."""

    latencies: list[float]
    rate: float
    seconds: float
    before: float
    after: float
    stolen: float

    @property
    def disturbance(self) -> float:
        """More than 1 if what was measured is the machine rather than the subject."""
        return max(abs(self.after / self.before - 1) / CHANGE, self.stolen / STOLEN)

    @property
    def load(self) -> float:
        return 2 * self.rate / (self.before + self.after)

    def at_constant_speed(self, seed: int) -> list[float]:
        """What the latencies were if each of two cores always took as long as in ``before``."""
        return at_constant_speed(arrivals(self.rate, self.seconds, seed), 2, 2 / self.before)


def _fixed_work() -> Worker:
    return Worker("benchmarks.subjects.fixed_work:FixedWork", threads=2)


def _measure(fleet: Fleet, name: str, window: float, seed: int) -> _AtLoad:
    """One subject under load, while the machine is steady and its own."""
    worker = fleet.workers[name]
    attempts: list[_AtLoad] = []
    before = float(worker.call("throughput", seconds=window))
    for _ in range(ATTEMPTS):
        rate = LOAD * before
        seconds = max(WINDOWS * window, REQUESTS / rate)
        with stolen_share() as stolen:
            latencies: list[float] = worker.call("latencies", rate=rate, seconds=seconds, seed=seed)
        after = float(worker.call("throughput", seconds=window))
        attempts.append(_AtLoad(latencies, rate, seconds, before, after, stolen()))
        if attempts[-1].disturbance <= 1:
            break
        before = after
    return min(attempts, key=lambda one: one.disturbance)


def _percentiles(
    found: dict[str, list[list[float]]], value: Callable[[list[float]], float]
) -> dict[str, list[float]]:
    return {name: [value(own) for own in rounds] for name, rounds in found.items()}


QUESTIONS: dict[str, Question] = {
    f"latency.{model}": partial(latency, model=model) for model in ("mlp", "minilm", "resnet50")
}
