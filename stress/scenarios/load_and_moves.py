"""Sixteen threads of requests on several modules, while other threads change those modules.

Every answer is compared with ``==``. A request on the module whose weights are replaced must see
exactly one of the sets.
"""

from __future__ import annotations

import contextlib
import copy
import io
import random
import threading
import time
from collections.abc import Callable

import torch

import neuron_ext
from stress.harness import nets
from stress.harness.options import Options
from stress.harness.patience import PERIOD, Patience, wait_until
from stress.harness.processes import CORES
from stress.harness.tally import Tally, chooser
from stress.harness.watchdog import Watchdog

THREADS = 16
_INPUTS = 64
_MAX_ROWS = 17


class _Stage:
    """The modules, and what all threads share."""

    def __init__(self, options: Options, tally: Tally, watchdog: Watchdog) -> None:
        self.tally = tally
        self.watchdog = watchdog
        self.options = options
        self.stop = threading.Event()
        files = {name: options.models / f"{name}.pt" for name in ("portable", "native", "weights")}
        self.modules: dict[str, torch.nn.Module] = {
            name: torch.jit.load(str(path)) for name, path in files.items()
        }
        # Its own module, which others move away and unload under it.
        self.modules["parallel"] = torch.jit.load(str(files["native"]))
        neuron_ext.dynamic_batch(self.modules["parallel"])
        self.parallel = neuron_ext.DataParallel(self.modules["parallel"])
        self.sets = [nets.Net(number).state_dict() for number in range(nets.SETS)]

    def repeat(self, name: str, work: Callable[[random.Random], str]) -> Callable[[], None]:
        """A thread's work: ``work`` again and again, under the watchdog; it says what it did."""
        choose = chooser(self.options, name)

        def body() -> None:
            while not self.stop.is_set():
                try:
                    with self.watchdog.operation(name):
                        done = work(choose)
                    self.tally.count(done)
                except Exception as error:
                    self.tally.fail(f"{name}: {type(error).__name__}: {error}")
                # Other moments than those at which the thread before was done.
                self.stop.wait(choose.random() * 0.01)

        return body


def _requests(stage: _Stage, number: int, name: str) -> Callable[[], None]:
    """The work of a thread that makes requests: its own inputs, each answer known beforehand."""
    choose = chooser(stage.options, "requests", number)
    parallel = name == "parallel"
    module = stage.parallel if parallel else stage.modules[name]
    inputs = [
        nets.numbered(number * _INPUTS + i, choose.randint(1, _MAX_ROWS) if parallel else 2)
        for i in range(_INPUTS)
    ]
    sets = range(nets.SETS) if name == "weights" else range(1)
    answers = [[nets.expected(x, which) for which in sets] for x in inputs]
    label = f"a request of thread {number} on {name!r}"

    def body() -> None:
        made = 0
        while not stage.stop.is_set():
            i = choose.randrange(_INPUTS)
            try:
                with stage.watchdog.operation(label):
                    answer = module(inputs[i])
            except Exception as error:
                stage.tally.fail(f"{label}: {type(error).__name__}: {error}")
                continue
            if not any(torch.equal(answer, right) for right in answers[i]):
                stage.tally.fail(f"{label}: {answer.tolist()}, expected one of {answers[i]}")
            made += 1
            if made == 20:
                stage.tally.count("requests", made)
                made = 0
        stage.tally.count("requests", made)

    return body


def _changes(stage: _Stage) -> dict[str, Callable[[random.Random], str]]:
    """What other threads do to the modules meanwhile, by name."""

    def any_module(choose: random.Random) -> torch.nn.Module:
        return choose.choice(list(stage.modules.values()))

    def move(choose: random.Random) -> str:
        start = choose.randrange(-1, CORES)
        count = choose.randint(1, CORES - max(start, 0))
        neuron_ext.set_neuron_cores(any_module(choose), start, count)
        return "moves"

    def replicate(choose: random.Random) -> str:
        neuron_ext.set_multicore(any_module(choose))
        return "moves"

    def unload(choose: random.Random) -> str:
        module = any_module(choose)
        neuron_ext.unload(module)
        neuron_ext.async_load(module, choose.random() < 0.5)
        if choose.random() < 0.5:
            neuron_ext.wait(module)
        neuron_ext.status(module)
        return "unloads"

    def replace(choose: random.Random) -> str:
        which = choose.randrange(nets.SETS)
        neuron_ext.replace_weights(stage.modules["weights"], stage.sets[which])
        return "replacements of weights"

    def save_and_load(choose: random.Random) -> str:
        name = choose.choice(list(stage.modules))
        buffer = io.BytesIO()
        nets.save(stage.modules[name], buffer)
        buffer.seek(0)
        contexts: list[contextlib.AbstractContextManager[object]] = [
            contextlib.nullcontext(),
            neuron_ext.multicore_context(),
            neuron_ext.neuron_cores_context(choose.randrange(CORES), 1),
        ]
        with choose.choice(contexts):
            loaded = torch.jit.load(buffer)
        _check(stage, name, loaded, choose)
        return "saves and loads"

    def deepcopy(choose: random.Random) -> str:
        name = choose.choice(list(stage.modules))
        _check(stage, name, copy.deepcopy(stage.modules[name]), choose)
        return "deep copies"

    def load_file(choose: random.Random) -> str:
        name = choose.choice(["portable", "native", "weights"])
        module = torch.jit.load(str(stage.options.models / f"{name}.pt"))
        _check(stage, name, module, choose)
        if choose.random() < 0.3:
            neuron_ext.dynamic_batch(module)
            cores = choose.sample(range(CORES), choose.randint(1, CORES))
            _check(stage, name, neuron_ext.DataParallel(module, cores), choose)
        return "loads of files"

    return {
        "a move": move,
        "a move by another thread": move,
        "a replication": replicate,
        "an unload": unload,
        "a replacement of weights": replace,
        "a save and a load": save_and_load,
        "a deep copy": deepcopy,
        "a load of a file": load_file,
    }


def _check(stage: _Stage, name: str, module: torch.nn.Module, choose: random.Random) -> None:
    """One request on a module that only this thread has."""
    x = nets.numbered(choose.randrange(10_000))
    answer = module(x)
    rights = [nets.expected(x, which) for which in range(nets.SETS if name == "weights" else 1)]
    if not any(torch.equal(answer, right) for right in rights):
        stage.tally.fail(f"a copy of {name!r}: {answer.tolist()}, expected one of {rights}")


def run(options: Options, tally: Tally, watchdog: Watchdog) -> None:
    """Ends when the time is over and the requests are made; three times the time is too long."""
    stage = _Stage(options, tally, watchdog)
    names = list(stage.modules)
    bodies = [_requests(stage, i, names[i % len(names)]) for i in range(THREADS)]
    bodies += [stage.repeat(name, work) for name, work in _changes(stage).items()]
    threads = [threading.Thread(target=body, daemon=True) for body in bodies]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    seconds = 60 * options.minutes
    patience = Patience(3 * seconds + 60)
    while time.monotonic() - start < seconds or tally.counted("requests") < options.requests:
        time.sleep(min(PERIOD, seconds))
        if patience.over():
            tally.fail(f"only {tally.counted('requests')} requests in three times the time")
            break
    stage.stop.set()
    for thread in threads:
        with watchdog.operation("the end of a thread"):
            thread.join()
    tally.note(f"{THREADS} threads and {len(threads) - THREADS} that change modules")
    _nothing_stays(stage)


def _nothing_stays(stage: _Stage) -> None:
    """In the end the cores have the replicas of the modules, and of no copy."""
    wanted = 0
    for name, module in stage.modules.items():
        with stage.watchdog.operation(f"the last load of {name!r}"):
            neuron_ext.wait(module)
        (status,) = neuron_ext.status(module)
        stage.tally.expect(status.state == "loaded", f"{name!r} is {status.state} in the end")
        wanted += len(status.cores)

    def models() -> int:
        return sum(core.models for core in neuron_ext.core_stats())

    if not wait_until(lambda: models() == wanted, 60):
        stage.tally.fail(f"{models()} replicas are loaded in the end, expected {wanted}")
