"""Finding a core for an inference where there are many: the scheduler over cores that compute
nothing, which stands for a machine with more CPUs than this one.
"""

from __future__ import annotations

import json
import subprocess
from functools import partial
from typing import Any

from benchmarks.harness.measure import rounds_of, rows_of
from benchmarks.harness.options import Options
from benchmarks.harness.table import Table
from benchmarks.native import build_native

CALLERS = 1000
WORK_US = 20_000
FEW, SOME, MANY = 8, 32, 128
SIMULATED = (
    "A simulation: an inference keeps its core for 20 ms and uses no CPU, "
    f"and {CALLERS} threads call at once."
)


def dispatch(options: Options) -> list[Table]:
    """Cost, fairness and throughput with more and more cores."""
    program = str(build_native(options) / "dispatch")
    seconds = 2.0 if options.quick else 5.0
    runs: dict[int, list[dict[str, Any]]] = {cores: [] for cores in (FEW, SOME, MANY)}

    def run(cores: int) -> float:
        arguments = [str(cores), str(CALLERS), str(WORK_US), str(seconds)]
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
        runs[cores].append(json.loads(done.stdout))
        return float(runs[cores][-1]["cpu_us_per_call"])

    cost = rounds_of({_name(cores): partial(run, cores) for cores in runs}, options.rounds)

    def collected(value: Any) -> dict[str, list[float]]:
        return {
            _name(cores): [value(cores, one) for one in runs[cores][-options.rounds :]]
            for cores in runs
        }

    throughput = collected(lambda cores, one: one["calls"] / one["seconds"])
    throughput[f"{MANY} cores that never wait"] = [MANY / (WORK_US * 1e-6)] * options.rounds
    fairness = collected(lambda cores, one: one["most_calls"] / max(one["fewest_calls"], 1))
    return [
        Table(
            "dispatch.cost",
            f"CPU time of a call on {MANY} cores, against {FEW} cores",
            "us",
            "lower",
            _name(FEW),
            _name(MANY),
            rows_of(cost, reference=_name(FEW)),
            must=1.1,
            aim=1.0,
            notes=[SIMULATED, "Two switches of threads and a timer are part of each call."],
        ),
        Table(
            "dispatch.throughput",
            f"calls on {MANY} cores, against what cores that never wait would do",
            "calls/s",
            "higher",
            f"{MANY} cores that never wait",
            _name(MANY),
            rows_of(throughput, reference=f"{MANY} cores that never wait"),
            must=0.9,
            aim=0.98,
            notes=[SIMULATED, "The callers share this machine's CPUs, which is what bounds it."],
        ),
        Table(
            "dispatch.fairness",
            f"calls of the caller with the most, against the one with the fewest, on {MANY} cores",
            "",
            "lower",
            _name(FEW),
            _name(MANY),
            rows_of(fairness, reference=_name(FEW)),
            must=1.5,
            aim=1.1,
            compare="value",
            notes=[SIMULATED],
        ),
    ]


def _name(cores: int) -> str:
    return f"{cores} cores"


QUESTIONS = {"dispatch": dispatch}
