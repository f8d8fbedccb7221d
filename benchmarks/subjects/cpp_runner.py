"""AOTInductor's runner in C++: a program without Python, started and asked by a small process."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy

from benchmarks.harness import load
from benchmarks.subjects.subject import Subject


class CppRunner(Subject):
    """``threads`` threads on one package with as many runners; see ``cpp/package_runner.cpp``."""

    def __init__(self, program: str, file: str, data: str, threads: int) -> None:
        super().__init__(data, threads)
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            arguments = []
            for number, array in enumerate(self.inputs):
                raw = Path(folder, str(number))
                array.tofile(raw)
                shape = ",".join(map(str, array.shape))
                arguments.append(f"{array.dtype}:{shape}:{raw}")
            self._process = subprocess.Popen(
                [program, file, str(threads), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self.answer()  # has read its inputs then

    def _ask(self, *words: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the C++ runner ended with status {self._process.wait()}")
        return json.loads(line)

    def answer(self) -> Any:
        return numpy.array(self._ask("answer"), numpy.float32).reshape(self._expected.shape)

    def call_on(self, thread: int) -> load.Call:
        raise NotImplementedError("the threads are in the program")

    def callers_throughput(self, seconds: float) -> float:
        return load.rate_of(self._ask("throughput", seconds, load.FEWEST))

    def latencies(self, rate: float, seconds: float, seed: int) -> list[float]:
        found: list[float] = self._ask("latencies", *load.arrivals(rate, seconds, seed))
        return found
