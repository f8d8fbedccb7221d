"""``python -m benchmarks run`` measures; ``python -m benchmarks report FILE`` shows it again."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
import traceback
from pathlib import Path

from benchmarks.harness import machine, report
from benchmarks.harness.options import REPOSITORY, Options, belongs, place_of, questions
from benchmarks.harness.table import Table

_CORES = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("--full", action="store_true", help="all models, longer windows, more rounds")
    run.add_argument("--only", default="", help="questions by id or beginning of it, with commas")
    run.add_argument("--rounds", type=int, help="measurements of each subject: 3, with --full 7")
    run.add_argument("--window", type=float, help="seconds per throughput: 1.5, with --full 4")
    run.add_argument(
        "--resume", action="store_true", help="only what the JSON has no answer to; keeps the rest"
    )
    run.add_argument("--out", type=Path, help="JSON to write; summary.md and plots go beside it")
    run.add_argument("--workdir", type=Path, help="what is compiled: build/benchmarks")
    run.add_argument("--no-plots", action="store_true", help="without matplotlib")
    show = commands.add_parser("report", help="summary and plots again, from a JSON")
    show.add_argument("file", type=Path)
    show.add_argument("--no-plots", action="store_true", help="without matplotlib")
    commands.add_parser("list", help="the ids of the questions")
    arguments = parser.parse_args()
    if arguments.command == "run":
        return measure(arguments)
    if arguments.command == "list":
        print(*questions(), sep="\n")
        return 0
    results = report.Results.load(arguments.file)
    print(report.summary_text(results, None))
    report.write(results, arguments.file.parent, not arguments.no_plots)
    return 0


def measure(arguments: argparse.Namespace) -> int:
    """Runs the questions; the exit status is 1 if one of them failed."""
    full = arguments.full
    options = Options(
        quick=not full,
        rounds=arguments.rounds or (7 if full else 3),
        window=arguments.window or (4.0 if full else 1.5),
        only=[name for name in arguments.only.split(",") if name],
    )
    if arguments.workdir is not None:
        options.workdir = arguments.workdir.resolve()
    name = "full" if full else "quick"
    # A quick run is a look; what stands in the repository comes from a full one.
    folder = REPOSITORY / "benchmarks" / "results" if full else options.workdir / "results"
    file = arguments.out or folder / f"{name}.json"
    asked = {id: question for id, question in questions().items() if options.wants(id)}
    # What is asked for by name comes in the order of the names.
    asked = {
        id: asked[id]
        for name in options.only or [""]
        for id in asked
        if not name or Options(only=[name]).wants(id)
    }
    for wish in options.only:
        if not any(Options(only=[wish]).wants(id) for id in asked):
            sys.exit(f"no question {wish!r}; there are: {', '.join(questions())}")

    # Inherited by all that is started: the questions are about as many cores.
    os.sched_setaffinity(0, machine.cpus_for(_CORES))
    results = report.Results(
        name=name,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine.machine(),
        versions=machine.versions(),
        settings={"rounds": options.rounds, "window": f"{options.window} s"},
        load_before=machine.load_average(),
    )
    later = []
    if arguments.resume and file.exists():
        # The header of the summary is of the run that began the file.
        now = results
        results = report.Results.load(file)
        later = report.notes_of_later(now, results)
        results.failures.clear()
    answered = {table.question for table in results.tables}
    print(report.environment_text(results), flush=True)
    for id, question in asked.items():
        if any(belongs(table, id) for table in answered):
            continue
        start = time.perf_counter()
        print(f"\n{id} ...", file=sys.stderr, flush=True)
        try:
            found = question(options)
        except Exception:
            results.failures[id] = traceback.format_exc()
            print(results.failures[id], file=sys.stderr, flush=True)
            continue
        tables = [found] if isinstance(found, Table) else found
        results.tables += tables
        results.tables.sort(key=lambda table: place_of(table.question))
        for table in tables:
            table.notes = table.notes + later  # not in place: tables of a question may share them
            print("\n" + report.table_text(table), flush=True)
        print(f"{id}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        results.load_after = machine.load_average()
        results.save(file)  # after each question: a run that is stopped keeps what it has
    results.save(file)
    report.write(results, file.parent, not arguments.no_plots)
    print(f"\nwritten: {file}, and summary.md and plots beside it")
    if results.failures:
        print(f"failed: {', '.join(results.failures)}", file=sys.stderr)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
