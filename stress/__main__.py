"""``python -m stress`` runs all scenarios and prints a table; exit status 1 if one failed."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import os
import platform
import signal
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stress.harness.options import REPOSITORY, SCALES, Options
from stress.harness.patience import wait_until
from stress.harness.tally import Outcome, as_json, summary
from stress.harness.watchdog import STUCK
from stress.scenarios import SCENARIOS

_TAIL = 60


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stress", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about two minutes of it")
    parser.add_argument("--scale", choices=SCALES, help="full, unless --quick")
    parser.add_argument("--minutes", type=float, help="of the load scenario")
    numbers = [field.name for field in dataclasses.fields(Options) if field.type == "int"]
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help=f"another number for one of {', '.join(numbers)}",
    )
    parser.add_argument("--only", default="", help=f"with commas, of {', '.join(SCENARIOS)}")
    parser.add_argument("--seed", type=int, help="of the random moments; by default another one")
    parser.add_argument("--out", type=Path, help="the table in markdown; and as .json beside")
    parser.add_argument("--cache", type=Path, help="compile cache: build/stress/cache")
    given = parser.parse_args(arguments)

    names = [name for name in given.only.split(",") if name] or list(SCENARIOS)
    for name in names:
        if name not in SCENARIOS:
            parser.error(f"no scenario {name!r}; there are {', '.join(SCENARIOS)}")
    options = SCALES[given.scale or ("quick" if given.quick else "full")]
    if given.minutes is not None:
        options = dataclasses.replace(options, minutes=given.minutes)
    for setting in given.set:
        name, _, number = setting.partition("=")
        if name not in numbers or not number.isdecimal():
            parser.error(f"--set {setting}: expected NAME=NUMBER, with one of {', '.join(numbers)}")
        options = dataclasses.replace(options, **{name: int(number)})
    seed = given.seed if given.seed is not None else time.time_ns() % 1_000_000
    cache = (given.cache or REPOSITORY / "build" / "stress" / "cache").resolve()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="neuron_ext-stress-") as folder:
        options = dataclasses.replace(options, seed=seed, folder=Path(folder), cache=cache)
        outcomes = run_all(names, options)
    text = summary(outcomes, described(options))
    print("\n" + text, end="")
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text)
        given.out.with_suffix(".json").write_text(as_json(outcomes, described(options)))
    return 1 if any(outcome.failures for outcome in outcomes) else 0


def run_all(names: list[str], options: Options) -> list[Outcome]:
    """Makes the models, then runs the scenarios, one after another."""
    prepared = run_one("prepare", options)
    if prepared.failures:
        return [prepared]
    outcomes = []
    for name in names:
        outcomes.append(run_one(name, options))
        last = outcomes[-1]
        print(f"{name}: {last.done}; {len(last.failures)} failed; {last.seconds:.0f} s", flush=True)
    return outcomes


def run_one(name: str, options: Options) -> Outcome:
    """Runs a scenario in a process of its own, and in a session, which ends with it."""
    # Takes seconds, once: what is forked from here has torch and neuron_ext, and no core.
    importlib.import_module("neuron_ext")
    from stress.harness.child import run_scenario
    from stress.harness.processes import environment, forked

    folder = options.folder / name
    folder.mkdir()
    result = folder / "result.json"
    start = time.monotonic()
    print(f"{name} ...", file=sys.stderr, flush=True)
    sys.stdout.flush()
    env = environment({"NEURON_EXT_CACHE_DIR": options.cache})
    with open(folder / "log", "w+") as log:
        process = forked.Process(
            target=run_scenario, args=(name, options, result, log.fileno(), env)
        )
        process.start()
        try:
            wait_until(lambda: not process.is_alive(), longest(name, options), 0.05)
            status = process.exitcode
        finally:
            kill_session(process.pid)
            process.join()
        log.seek(0)
        said = log.read().splitlines()
    if result.exists() and status in (0, 1):
        outcome = Outcome.read(result)
    else:
        stuck = [line for line in said if line.startswith("watchdog:")]
        why = "did not end" if status is None else f"ended with {status}"
        if status == STUCK and stuck:
            why = stuck[-1]
        failure = f"the process of the scenario: {why}"
        outcome = Outcome(name, "", [failure], time.monotonic() - start)
    if outcome.failures:
        print(*said[-_TAIL:], sep="\n", file=sys.stderr, flush=True)
    return outcome


def longest(name: str, options: Options) -> float:
    """Seconds after which a scenario as a whole counts as stuck."""
    return 60 * options.minutes * 3 + 1200 if name == "load" else 3600


def kill_session(leader: int) -> None:
    """What a scenario started does not outlive it; only its own session is looked at."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.getsid(int(pid)) == leader:
                os.kill(int(pid), signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def described(options: Options) -> list[str]:
    """Date, machine and versions."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next(
        (line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if "model name" in line),
        platform.machine(),
    )
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = []
    for name in ("neuron_ext", "torch"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"{name} from its sources")
    return [
        f"{now}, seed {options.seed}",
        f"{model}, {len(os.sched_getaffinity(0))} CPUs, {memory:.0f} GB, "
        f"Linux {platform.release()}",
        f"{', '.join(packages)}, Python {platform.python_version()}",
    ]


if __name__ == "__main__":
    sys.exit(main())
