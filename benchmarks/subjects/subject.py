"""What all subjects have in common."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any

import numpy

from benchmarks.harness import load


class Subject(abc.ABC):
    """A loaded model, with the inputs it is called with. `call_on` is thread-safe."""

    def __init__(self, data: str, threads: int) -> None:
        """``data`` is the artifact of that format; ``threads`` is how many call at once."""
        with numpy.load(Path(data)) as arrays:
            count = len(arrays.files) - 1
            self.inputs: list[Any] = [arrays[f"input{number}"] for number in range(count)]
            self._expected = arrays["expected"]
        self.threads = threads

    @abc.abstractmethod
    def call_on(self, thread: int) -> load.Call:
        """What thread number ``thread`` calls; made on that thread."""

    @abc.abstractmethod
    def answer(self) -> Any:
        """The output for the inputs, as a numpy array."""

    def error(self, repeat: int = 3) -> float:
        """The largest error against the eager model, relative to its largest output.

        Of ``repeat`` answers the worst, since replicas take turns.
        """
        scale = numpy.abs(self._expected).max()
        worst = 0.0
        for _ in range(repeat):
            answer = self.answer()
            if answer.shape != self._expected.shape or not numpy.isfinite(answer).all():
                return float("inf")
            worst = max(worst, float(numpy.abs(answer - self._expected).max() / scale))
        return worst

    def throughput(self, seconds: float) -> float:
        """Calls per second, in the way that gives most."""
        return self.callers_throughput(seconds)

    def callers_throughput(self, seconds: float) -> float:
        """Calls per second of the threads that `latencies` has."""
        return load.throughput(self.call_on, self.threads, seconds)

    def latencies(self, rate: float, seconds: float, seed: int) -> list[float]:
        """Seconds per request, for requests that arrive at ``rate`` per second."""
        return load.latencies(self.call_on, self.threads, rate, seconds, seed)


def pin(thread: int) -> None:
    """Binds the calling thread to one of the CPUs of the process, in turn.

    Only for threads that end before another asks: what they may use is taken from the main thread.
    """
    import os

    cpus = sorted(os.sched_getaffinity(os.getpid()))
    os.sched_setaffinity(0, {cpus[thread % len(cpus)]})
