"""Parents fork while their modules run and load: children get one clear error, and never hang.

Children of a parent that has used no core work, and so do data loaders that do not use the modules.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

import neuron_ext
from stress.harness import nets
from stress.harness.options import Options
from stress.harness.patience import wait_until
from stress.harness.processes import Child, ChildEndedError
from stress.harness.tally import Tally, chooser
from stress.harness.watchdog import Watchdog

CLEAR = "this process was forked from one that used NeuronCores"
_CODE = 23
_WRONG = 24
_LIMIT = 60.0


def run(options: Options, tally: Tally, watchdog: Watchdog) -> None:
    parents: list[tuple[str, Callable[..., None]]] = [
        ("a parent with requests and loads under way", _busy_parent),
        ("a parent that has used no core", _idle_parent),
        ("a parent with a data loader", _loader_parent),
    ]
    for what, parent in parents:
        seed = chooser(options, what).randrange(1 << 30)
        with (
            watchdog.operation(what),
            Child(
                parent, str(options.models), options.forks, seed, timeout=options.wait_limit
            ) as child,
        ):
            try:
                while (said := child.receive()) is not None:
                    failure, count = said
                    tally.count("forks", count)
                    if failure:
                        tally.fail(f"{what}: {failure}")
                code = child.wait()
                tally.expect(code == 0, f"{what} ended with {code}")
            except ChildEndedError as error:
                tally.fail(f"{what}: {error}")


def _fork(use: Callable[[], object], leave: Callable[[int], object]) -> str:
    """Forks a child that uses something, and leaves with `_CODE`; what is wrong, or nothing."""
    sys.stdout.flush()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        code = _CODE
        try:
            use()
        except RuntimeError as error:
            os.write(write, str(error).encode()[:4096])
        except BaseException as error:
            os.write(write, repr(error).encode()[:4096])
            code = _WRONG
        leave(code)
    os.close(write)
    statuses: list[int] = []

    def ended() -> bool:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            statuses.append(os.waitstatus_to_exitcode(status))
        return bool(found)

    hung = not wait_until(ended, _LIMIT)
    if hung:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    if hung:
        return f"the child hung; it had said {said!r}"
    return "" if statuses == [_CODE] else f"the child ended with {statuses}; it said {said!r}"


def _refused(use: Callable[[], object]) -> Callable[[], None]:
    """A use that has to be refused, with the text that says why; a second one just so."""

    def body() -> None:
        for _ in range(2):
            try:
                use()
            except RuntimeError as error:
                if CLEAR not in str(error):
                    raise AssertionError(f"another error: {error}") from None
            else:
                raise AssertionError("the use of the module worked")

    return body


def _busy_parent(connection: Connection, models: str, forks: int, seed: int) -> None:
    choose = chooser(None, seed)
    module = torch.jit.load(f"{models}/native.pt")
    neuron_ext.set_multicore(module)
    buffer = io.BytesIO()
    neuron_ext.async_load(module)
    nets.save(module, buffer)
    batches = torch.jit.load(f"{models}/portable.pt")
    neuron_ext.dynamic_batch(batches)
    parallel = neuron_ext.DataParallel(batches)
    failures: list[str] = []
    stop = threading.Event()

    def ask(called: torch.nn.Module, rows: int) -> Callable[[], None]:
        x = nets.numbered(rows, rows)
        right = nets.expected(x)

        def body() -> None:
            while not stop.is_set():
                if not torch.equal(called(x), right):
                    failures.append("a wrong answer in the parent")

        return body

    def keep_loading() -> None:
        while not stop.is_set():
            loaded = torch.jit.load(io.BytesIO(buffer.getvalue()))
            neuron_ext.set_neuron_cores(loaded, 1, 2)

    bodies = [ask(module, 2), ask(module, 2), ask(parallel, 9), keep_loading, keep_loading]
    threads = [threading.Thread(target=body) for body in bodies]
    for thread in threads:
        thread.start()

    def drop() -> None:
        nonlocal module, parallel, batches
        del module, parallel, batches
        gc.collect()

    uses: dict[str, Callable[[], object]] = {
        "forward": _refused(lambda: module(nets.EXAMPLE)),
        "DataParallel": _refused(lambda: parallel(nets.EXAMPLE)),
        "set_multicore": _refused(lambda: neuron_ext.set_multicore(module)),
        "unload": _refused(lambda: neuron_ext.unload(module)),
        "wait": _refused(lambda: neuron_ext.wait(module)),
        "status": _refused(lambda: neuron_ext.status(module)),
        "core_stats": _refused(neuron_ext.core_stats),
        "load": _refused(lambda: torch.jit.load(io.BytesIO(buffer.getvalue()))),
        "deepcopy and forward": _refused(lambda: copy.deepcopy(module)(nets.EXAMPLE)),
        "drop": drop,
        "nothing": lambda: None,
    }
    for i in range(forks):
        for name, use in uses.items():
            time.sleep(choose.random() * 0.05)
            # Through all of Python's own end, too.
            for leave in (os._exit, sys.exit):
                wrong = _fork(use, leave)
                connection.send((f"fork {i}, {name}: {wrong}" if wrong else "", 1))
    stop.set()
    for thread in threads:
        thread.join()
    if not torch.equal(module(nets.EXAMPLE), nets.expected(nets.EXAMPLE)):
        failures.append("the module of the parent answers wrong in the end")
    for text in failures:
        connection.send((text, 0))
    connection.send(None)


def _idle_parent(connection: Connection, models: str, forks: int, _seed: int) -> None:
    def use() -> None:
        module = torch.jit.load(f"{models}/native.pt")
        neuron_ext.set_multicore(module)
        if not torch.equal(module(nets.EXAMPLE), nets.expected(nets.EXAMPLE)):
            raise AssertionError("a wrong answer")

    def works() -> None:
        try:
            use()
        except RuntimeError as error:
            raise AssertionError(f"refused: {error}") from None

    for i in range(forks):
        for leave in (os._exit, sys.exit):
            wrong = _fork(works, leave)
            connection.send((f"fork {i}: {wrong}" if wrong else "", 1))
    use()
    connection.send(None)


def _squares(i: int) -> torch.Tensor:
    return torch.full((3,), float(i * i))


class _Numbers(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> torch.Tensor:
        return _squares(i)


def _loader_parent(connection: Connection, models: str, forks: int, _seed: int) -> None:
    module = torch.jit.load(f"{models}/native.pt")
    for i in range(forks):
        loader = torch.utils.data.DataLoader(
            _Numbers(), batch_size=2, num_workers=2, multiprocessing_context="fork"
        )
        for j, batch in enumerate(loader):
            right = torch.stack([_squares(2 * j), _squares(2 * j + 1)])
            if not torch.equal(batch, right):
                connection.send((f"batch {j} is {batch}", 0))
            if not torch.equal(module(batch), nets.expected(batch)):
                connection.send((f"round {i}: a wrong answer", 0))
        connection.send(("", 2))
    connection.send(None)
