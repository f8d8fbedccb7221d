"""Work that is the same each time: what the machine itself makes of a load."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy

from benchmarks.harness import load
from benchmarks.subjects.subject import Subject


class FixedWork(Subject):
    """A chain of hashes: so many instructions one after the other, on a few bytes.

    No model, no memory to speak of, no library's threads, no lock of Python's: where its calls
    differ in what they take, the machine does.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.inputs = []
        self._expected = self.answer()
        self._iterations = 10_000

    def last_as_long_as(self, throughput: float, seconds: float) -> None:
        """Makes calls so long that there are ``throughput`` per second, told in ``seconds``."""
        self._iterations = round(self._iterations * self.throughput(seconds) / throughput)

    def call_on(self, thread: int) -> load.Call:
        iterations = self._iterations
        return lambda: _hashes(iterations)

    def answer(self) -> Any:
        return numpy.frombuffer(_hashes(1), numpy.uint8).astype(numpy.float32)


def _hashes(iterations: int) -> bytes:
    """Gives the GIL up meanwhile."""
    return hashlib.pbkdf2_hmac("sha256", b"fixed", b"work", iterations)
