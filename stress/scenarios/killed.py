"""Processes are killed with ``kill -9`` while they compile, save, load and run.

Nothing stays on disk but a compile cache that is valid, and the cores are free at once.
"""

from __future__ import annotations

import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import neuron_ext
from stress.harness import nets
from stress.harness.options import Options
from stress.harness.processes import Child, ChildEndedError
from stress.harness.tally import Tally, chooser
from stress.harness.watchdog import Watchdog

_LONGEST_PAUSE = 0.3
# The first compile on a machine takes a minute, which is for looking at the C++ compiler.
_COMPILE = 5.0


def _save(connection: Connection, models: str, folder: str) -> None:
    module = torch.jit.load(f"{models}/native.pt")
    connection.send("begun")
    while True:
        nets.save(module, f"{folder}/saved.pt")


def _load(connection: Connection, models: str, _folder: str) -> None:
    connection.send("begun")
    while True:
        for name in ("native", "weights", "portable"):
            neuron_ext.set_multicore(torch.jit.load(f"{models}/{name}.pt"))


def _run(connection: Connection, models: str, _folder: str) -> None:
    module = torch.jit.load(f"{models}/native.pt")
    neuron_ext.set_multicore(module)

    def body() -> None:
        while True:
            module(nets.EXAMPLE)

    threads = [threading.Thread(target=body) for _ in range(8)]
    for thread in threads:
        thread.start()
    connection.send("begun")


def _trace(connection: Connection, _models: str, _folder: str) -> None:
    neuron_ext.core_stats()
    connection.send("begun")
    traced = neuron_ext.trace(nets.Net().eval(), nets.EXAMPLE, compiler="inductor")
    connection.send(bool(torch.equal(traced(nets.EXAMPLE), nets.expected(nets.EXAMPLE))))


def _takes_all_cores(connection: Connection, models: str, saved: str) -> None:
    """What comes next on the machine; a file whose save was killed gives an answer or an error."""
    module = torch.jit.load(f"{models}/native.pt")
    right = torch.equal(module(nets.EXAMPLE), nets.expected(nets.EXAMPLE))
    text = "answers right" if right else "answers wrong"
    if saved:
        try:
            again = torch.jit.load(saved)
            if not torch.equal(again(nets.EXAMPLE), nets.expected(nets.EXAMPLE)):
                text = "answers wrong from a file whose save was killed"
        except RuntimeError as error:
            if not str(error):
                text = "an error without text from a file whose save was killed"
    connection.send(text)


class _Place:
    """Folders of one phase, that nobody else writes to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("tmp", "locks", "out", "inductor"):
            (folder / name).mkdir(parents=True)
        self.settings = {
            "NEURON_EXT_EXCLUSIVE": 1,
            "NEURON_EXT_LOCK_DIR": folder / "locks",
            "NEURON_EXT_CACHE_DIR": folder / "cache",
            "TMPDIR": folder / "tmp",
            # PyTorch's own cache, which is not this package's to clean up.
            "TORCHINDUCTOR_CACHE_DIR": folder / "inductor",
            "TORCHINDUCTOR_COMPILE_THREADS": 1,
        }

    def left(self) -> list[str]:
        """Files that should not be there."""
        tmp = (self.folder / "tmp").iterdir()
        # PyTorch keeps its precompiled headers there, wherever it is told to keep the rest.
        found = sorted(str(path) for path in tmp if not path.name.startswith("torchinductor_"))
        cache = sorted((self.folder / "cache").glob("*"))
        found += [str(path) for path in cache if path.suffix not in (".entry", ".lock")]
        locks = [path.name for path in (self.folder / "locks").iterdir()]
        return found + [name for name in locks if name != "neuron_ext-host.lock"]


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if "neuron" in path.name}


def run(options: Options, tally: Tally, watchdog: Watchdog) -> None:
    """Each process is killed at another moment."""
    shared = _shared_memory()
    for name, phase in (("save", _save), ("load", _load), ("run", _run)):
        place = _Place(Path(tempfile.mkdtemp(dir=options.folder)))
        for i in range(options.kills):
            pause = chooser(options, name, i).random() * _LONGEST_PAUSE
            with watchdog.operation(f"{name}, kill {i}"):
                _kill_one(name, phase, place, pause, options, tally)
        left = place.left()
        tally.expect(not left, f"left behind by kills during {name}: {left}")
    if options.traces:
        _killed_traces(options, tally, watchdog)
    new = _shared_memory() - shared
    tally.expect(not new, f"left behind in /dev/shm: {sorted(new)}")


def _kill_one(
    name: str, phase: object, place: _Place, pause: float, options: Options, tally: Tally
) -> None:
    out = place.folder / "out"
    with Child(phase, str(options.models), str(out), settings=place.settings) as child:  # type: ignore[arg-type]
        try:
            child.receive()
            time.sleep(pause)
        except ChildEndedError as error:
            tally.fail(f"{name}: {error}")
            return
        child.kill()
    tally.count("processes killed")
    saved = out / "saved.pt"
    argument = str(saved) if saved.exists() else ""
    with Child(
        _takes_all_cores, str(options.models), argument, settings=place.settings
    ) as following:
        try:
            text = following.receive()
        except ChildEndedError as error:
            text = str(error)
    tally.expect(text == "answers right", f"after a kill during {name}, the next process: {text}")
    saved.unlink(missing_ok=True)


def _killed_traces(options: Options, tally: Tally, watchdog: Watchdog) -> None:
    """Kills at moments spread over the time that a whole compile takes, first in a process that
    finds PyTorch's own cache empty; then the cache must still work.
    """
    place = _Place(Path(tempfile.mkdtemp(dir=options.folder)))
    choose = chooser(options, "trace")
    with watchdog.operation("a compile", _COMPILE):
        longest = _whole_trace(place, tally)
    entries = set(place.folder.glob("cache/*.entry"))
    tally.expect(len(entries) == 1, f"{len(entries)} entries in the cache after one compile")
    for i in range(options.kills):
        for entry in entries:
            entry.unlink(missing_ok=True)
        with watchdog.operation(f"a compile, kill {i}", _COMPILE):
            _kill_trace(i, (i + choose.random()) / options.kills * longest, place, tally)
    with watchdog.operation("a compile after the kills", _COMPILE):
        _whole_trace(place, tally)
    now = set(place.folder.glob("cache/*.entry"))
    tally.expect(now == entries, f"the cache has {now} after the kills, and had {entries} before")
    with watchdog.operation("a compile that the cache has"):
        hit = _whole_trace(place, tally)
    tally.expect(hit < longest / 2, f"a trace after the kills took {hit:.1f} s of {longest:.1f} s")
    left = place.left()
    tally.expect(not left, f"left behind by kills during compiles: {left}")


def _whole_trace(place: _Place, tally: Tally) -> float:
    start = time.monotonic()
    with Child(_trace, "", "", settings=place.settings) as child:
        try:
            child.receive()
            tally.expect(child.receive(), "a trace gives a wrong answer")
        except ChildEndedError as error:
            tally.fail(f"a trace: {error}")
    return time.monotonic() - start


def _kill_trace(i: int, pause: float, place: _Place, tally: Tally) -> None:
    with Child(_trace, "", "", settings=place.settings) as child:
        try:
            child.receive()
        except ChildEndedError as error:
            tally.fail(f"compile {i}: {error}")
            return
        time.sleep(pause)
        child.kill()
        tally.count("processes killed")
        with Child(_cores, settings=place.settings) as following:
            try:
                text = following.receive()
            except ChildEndedError as error:
                text = str(error)
        tally.expect(text == "4", f"after a kill during a compile, the next process: {text}")
        # The compiler that it had started; its output goes nowhere.
        tally.expect(child.wait_for_group(), f"compile {i}: what it started did not end")


def _cores(connection: Connection) -> None:
    try:
        connection.send(str(neuron_ext.visible_core_count()))
    except RuntimeError as error:
        connection.send(str(error))
