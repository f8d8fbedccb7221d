"""Processes end at a random moment while requests, moves and loads are under way.

Each must end, with its own exit status, and without a crash.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from stress.harness import cpp
from stress.harness.options import Options
from stress.harness.processes import crash_in, python
from stress.harness.processes import run as run_process
from stress.harness.tally import Tally, chooser
from stress.harness.watchdog import Watchdog
from stress.subjects.exits import EXIT_CODES

_AT_ONCE = 2
_CPP_CODES = {"return": 0, "exit": 3, "exception": 4, "sigterm": -15}


def run(options: Options, tally: Tally, watchdog: Watchdog) -> None:
    cases = [(way, kind) for way in EXIT_CODES for kind in ("daemon", "waited")]
    chooser(options, "exits").shuffle(cases)

    def end_one(i: int) -> None:
        way, kind = cases[i % len(cases)]
        seed = f"{options.seed}.{i}"
        command = python("-m", "stress.subjects.exits", options.models, way, kind, seed)
        _judge(f"{way}, {kind} threads, seed {seed}", command, EXIT_CODES[way], options, tally)

    def end_one_cpp(i: int) -> None:
        way = list(_CPP_CODES)[i % len(_CPP_CODES)]
        command = [program, options.models / "native.pt", way, options.seed + i]
        _judge(f"C++, {way}, seed {command[-1]}", command, _CPP_CODES[way], options, tally)

    # No operation for the watchdog: each process has a limit of its own.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(end_one, range(options.exits)))
        if options.cpp_exits:
            with watchdog.operation("building the C++ program"):
                program = cpp.build(options.folder, "exits") / "exits"
            list(pool.map(end_one_cpp, range(options.cpp_exits)))


def _judge(what: str, command: list[object], code: int, options: Options, tally: Tally) -> None:
    status, _, stderr = run_process(command, timeout=options.wait_limit)
    tally.count("C++ processes" if what.startswith("C++") else "Python processes")
    last = stderr[-2000:]
    if status is None:
        tally.fail(f"{what}: hung: {last}")
    elif status != code:
        tally.fail(f"{what}: ended with {status}, expected {code}: {last}")
    elif crash_in(stderr):
        tally.fail(f"{what}: {crash_in(stderr)}")
    elif ("KeyError: 'on purpose'" in stderr) != (what.startswith("exception")):
        tally.fail(f"{what}: said {last!r}")
