"""Processes ask for cores at the same moment; each core goes to one of them.

The others get an error that names a holder, and get the cores of holders that are killed.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import neuron_ext
from stress.harness.options import Options
from stress.harness.processes import CORES, Child, ChildEndedError, forked
from stress.harness.tally import Tally, chooser
from stress.harness.watchdog import Watchdog

_RACES: list[tuple[dict[str, str], int, int, int]] = [
    # What each asks for, how many ask, how many get it, cores for each.
    ({"NEURON_RT_NUM_CORES": "1"}, 10, CORES, 1),
    ({"NEURON_RT_NUM_CORES": "2"}, 5, 2, 2),
    ({"NEURON_RT_VISIBLE_CORES": "2"}, 6, 1, 1),
    ({"NEURON_EXT_EXCLUSIVE": "1"}, 5, 1, CORES),
]


def _racer(connection: Connection, barrier: Any) -> None:
    """Asks for its cores whenever it is told to, together with those that are told at once."""
    barrier.wait()
    while True:
        try:
            answer: object = [core.global_index for core in neuron_ext.core_stats()]
        except RuntimeError as error:
            answer = str(error)
        connection.send(answer)
        connection.recv()


def run(options: Options, tally: Tally, watchdog: Watchdog) -> None:
    for i in range(options.races):
        for settings, racers, winners, each in _RACES:
            with watchdog.operation(f"race {i} for {settings}"):
                try:
                    _race(i, settings, racers, winners, each, options, tally)
                except ChildEndedError as error:
                    tally.fail(f"race {i} for {settings}: {error}")
            tally.count("races")


def _race(
    i: int,
    settings: Mapping[str, str],
    racers: int,
    winners: int,
    each: int,
    options: Options,
    tally: Tally,
) -> None:
    what = f"race {i} for {settings}"
    choose = chooser(options, what)
    with tempfile.TemporaryDirectory(dir=options.folder) as locks, contextlib.ExitStack() as stack:
        barrier = forked.Barrier(racers)
        env = {**settings, "NEURON_EXT_LOCK_DIR": locks}
        waiting = [stack.enter_context(Child(_racer, barrier, settings=env)) for _ in range(racers)]
        tally.count("processes", racers)
        answers = {child: child.receive() for child in waiting}
        holders = [child for child in waiting if not isinstance(answers[child], str)]
        while True:
            _each_core_goes_to_one(what, answers, holders, winners, each, tally)
            waiting = [child for child in waiting if child not in holders]
            if len(waiting) < winners:
                return
            # Some holders are killed, and everybody else asks again, at once.
            gone = choose.sample(holders, choose.randint(1, len(holders)))
            for child in gone:
                child.kill()
            tally.count("holders killed", len(gone))
            holders = [child for child in holders if child not in gone]
            for child in waiting:
                child.send("again")
            answers = {child: child.receive() for child in [*waiting]} | {
                child: answers[child] for child in holders
            }
            holders += [child for child in waiting if not isinstance(answers[child], str)]


def _each_core_goes_to_one(
    what: str,
    answers: Mapping[Child, Any],
    holders: list[Child],
    winners: int,
    each: int,
    tally: Tally,
) -> None:
    taken = [core for child in holders for core in answers[child]]
    tally.expect(
        len(holders) == winners and len(taken) == len(set(taken)) == winners * each,
        f"{what}: {[answers[child] for child in holders]} were given to {len(holders)}, "
        f"expected {winners} processes with {each} each",
    )
    pids = {child.pid for child in holders}
    for child, text in answers.items():
        if child in holders:
            continue
        named = {int(pid) for pid in re.findall(r"process (\d+) \(", text)}
        tally.expect(
            named and named <= pids,
            f"{what}: the error names {named}, and the holders are {pids}: {text}",
        )
