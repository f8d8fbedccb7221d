"""Load, run, move, unload and delete, again and again: nothing may grow.

Mapped native code stays for the life of the process, once for each content (``docs/design.md``), so
loads of the same files must not add mappings.
"""

from __future__ import annotations

import copy
import io
import os
import time

import torch

import neuron_ext
from stress.harness import nets
from stress.harness.options import Options
from stress.harness.processes import CORES
from stress.harness.resources import Held, held
from stress.harness.tally import Tally
from stress.harness.watchdog import Watchdog

RESIDENT_SHARE = 0.02
_WARM_UP = 20
_SETTLED_WITHIN = 10
"""Seconds."""
_THREADS = {
    # The main thread, the watchdog's, and its timer, which begins anew while the one before ends.
    "python": 3,
    "nc": CORES,
    "neuron-load": max(4, min(16, os.cpu_count() or 1)),
    "neuron-chunk": 2 * CORES,
}
"""The most of each; those that the library keeps as ``docs/design.md`` has them."""


def run(options: Options, tally: Tally, watchdog: Watchdog) -> None:
    """Measures after a warm-up, and in the end."""
    names = ["portable", "native", "weights"]
    files = [options.models / f"{name}.pt" for name in names]
    data = [file.read_bytes() for file in files]

    def cycle(i: int) -> None:
        which = i % len(files)
        source = str(files[which]) if i % 2 else io.BytesIO(data[which])
        with watchdog.operation(f"cycle {i} of {names[which]!r}"):
            _cycle(i, torch.jit.load(source), tally)

    for i in range(_WARM_UP):
        cycle(i)
    first = held()
    for i in range(options.cycles):
        cycle(i)
        tally.count("cycles")
    last = _settled(first)
    _compare(first, last, tally)
    tally.note(f"before: {first.text()}; after: {last.text()}")
    models = sum(core.models for core in neuron_ext.core_stats())
    tally.expect(models == 0, f"{models} replicas are still loaded in the end")


def _cycle(i: int, module: torch.nn.Module, tally: Tally) -> None:
    def check(called: torch.nn.Module, number: int = 0) -> None:
        x = nets.numbered(i)
        answer, right = called(x), nets.expected(x, number)
        tally.expect(torch.equal(answer, right), f"cycle {i}: {answer}, expected {right}")

    check(module)
    neuron_ext.set_neuron_cores(module, i % CORES, 1)
    check(module)
    neuron_ext.set_multicore(module)
    for _ in range(CORES):
        check(module)
    neuron_ext.unload(module)
    if i % 3 == 2:
        neuron_ext.replace_weights(module, nets.Net(1).state_dict())
        check(module, 1)
        return
    if i % 5 == 0:
        neuron_ext.async_load(module)
        check(copy.deepcopy(module))
    if i % 7 == 0:
        neuron_ext.dynamic_batch(module)
        check(neuron_ext.DataParallel(module, [0, 2]))
    if i % 4 == 0:
        buffer = io.BytesIO()
        nets.save(module, buffer)
    if i % 2:
        # Deleted while it is loaded, or while it loads.
        neuron_ext.async_load(module, i % 4 == 1)
        neuron_ext.set_neuron_cores(module, -1, 2)


def _settled(first: Held) -> Held:
    """When threads that just begin have their names, and those that just end are gone."""
    deadline = time.monotonic() + _SETTLED_WITHIN
    while True:
        last = held()
        steady = all(number <= _most(first, name) for name, number in last.threads.items())
        if steady or time.monotonic() > deadline:
            return last
        time.sleep(0.05)


def _most(first: Held, name: str) -> int:
    """Pools grow with the most that was ever under way at once, and no further."""
    return max(first.threads.get(name, 0), _THREADS.get(name, 0))


def _compare(first: Held, last: Held, tally: Tally) -> None:
    for what, before, after in (
        ("descriptors", first.descriptors, last.descriptors),
        ("mappings of files", first.file_maps, last.file_maps),
    ):
        tally.expect(after <= before, f"{what}: {before} before, {after} after")
    for name, number in last.threads.items():
        most = _most(first, name)
        tally.expect(number <= most, f"threads {name!r}: {number}, expected at most {most}")
    # The allocator may cut what it has into a few more pieces, but not into more with each cycle.
    tally.expect(
        last.maps <= first.maps * 1.05, f"mappings: {first.maps} before, {last.maps} after"
    )
    tally.expect(
        last.resident_kb <= first.resident_kb * (1 + RESIDENT_SHARE),
        f"resident memory: {first.resident_kb} kB before, {last.resident_kb} kB after",
    )
