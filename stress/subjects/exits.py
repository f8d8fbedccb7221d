"""``python -m stress.subjects.exits MODELS WAY THREADS SEED`` ends at a random moment, in some way,
while threads make requests, DataParallel calls, moves and loads.

THREADS is ``daemon``, or ``waited`` for threads that Python waits for, which end by themselves.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch

import neuron_ext
from stress.harness import nets

EXIT_CODES = {
    "return": 0,
    "exit": 3,
    "exception": 1,
    "sigterm": -signal.SIGTERM,
    "handler": 5,
    "_exit": 7,
}
"""The ways to end, and the exit status that each must give."""


def main() -> None:
    models, way, kind, seed = sys.argv[1:]
    choose = random.Random(seed)
    if way == "handler":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    started = [threading.Event() for _ in range(6)]
    bodies = _bodies(models)
    for i, event in enumerate(started):
        body = bodies[i % len(bodies)]
        turns = None if kind == "daemon" else choose.randint(1, 40)
        threading.Thread(target=_repeat, args=(body, event, turns), daemon=kind == "daemon").start()
    for event in started:
        event.wait()
    time.sleep(choose.random() * 0.2)
    if way == "exit":
        sys.exit(3)
    if way == "exception":
        raise KeyError("on purpose")
    if way in ("sigterm", "handler"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # the signal ends it long before
    if way == "_exit":
        os._exit(7)


def _bodies(models: str) -> list[Callable[[], object]]:
    module = torch.jit.load(f"{models}/native.pt")
    neuron_ext.set_multicore(module)
    batches = torch.jit.load(f"{models}/portable.pt")
    neuron_ext.dynamic_batch(batches)
    parallel = neuron_ext.DataParallel(batches)
    moved = torch.jit.load(f"{models}/weights.pt")
    neuron_ext.async_load(module)
    buffer = io.BytesIO()
    nets.save(module, buffer)
    few, many = nets.numbered(3), nets.numbered(5, 11)
    few_right, many_right = nets.expected(few), nets.expected(many)
    weights = nets.Net(0).state_dict()

    def check(answer: torch.Tensor, right: torch.Tensor) -> None:
        if not torch.equal(answer, right):
            print("WRONG", answer, file=sys.stderr, flush=True)
            os._exit(99)

    def load() -> None:
        for _ in range(5):
            torch.jit.load(io.BytesIO(buffer.getvalue()))  # goes while it loads in the background

    def change() -> None:
        neuron_ext.set_neuron_cores(moved, -1, 2)
        neuron_ext.replace_weights(moved, weights)
        neuron_ext.unload(moved)

    return [
        lambda: check(module(few), few_right),
        lambda: check(parallel(many), many_right),
        load,
        lambda: check(moved(few), few_right),
        change,
    ]


def _repeat(body: Callable[[], object], started: threading.Event, turns: int | None) -> None:
    done = 0
    while turns is None or done < turns:
        body()
        done += 1
        started.set()


if __name__ == "__main__":
    main()
