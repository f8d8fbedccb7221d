"""Compiles buckets in worker processes, a process for each bucket.

TorchInductor is one per process, so only in processes do buckets compile at the same time. They are
spawned, never forked: a forked child of a process with threads may hang. A worker leaves its result
in a file, since weights are large; its pipe says only how far it is.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from neuron_ext._trace import TraceParts
from neuron_ext.buckets.worker_main import (
    DONE,
    IMPORTING,
    STOP_SECONDS,
    Outcome,
    Switches,
    work,
)
from neuron_ext.compiler.progress import Progress
from neuron_ext.compiler.scratch import scratch_folder

_log = logging.getLogger("neuron_ext")

# A grandchild can keep the pipes of a dead worker open, so its end is looked for as well.
_POLL_SECONDS = 1.0
# For a worker that has told its result to end by itself.
_EXIT_SECONDS = 10.0


class CannotLoadError(Exception):
    """A worker could not unpickle its job; the text says why."""


class RemoteError(Exception):
    """The cause of an error that came from a worker: its traceback there, as text."""

    def __str__(self) -> str:
        return f"in a worker process\n{self.args[0]}"


def compile_in_processes(jobs: Sequence[bytes], processes: int, what: str) -> list[TraceParts]:
    """Compile pickled jobs, at most ``processes`` at a time, and return their parts in order.

    The first error ends all. However this is left, no process and no file of it is there any more.

    Args:
        jobs: a pickled `Job` for each bucket.
        processes: at least 1.
        what: for the progress line.

    Raises:
        CannotLoadError: a job cannot be unpickled in another process.
        RuntimeError: a worker cannot be started, or ended without a result.
        Whatever `compile_bucket` raises.
    """
    threads = max(1, torch.get_num_threads() // processes)
    switches = Switches.of_this_process(threads)
    with (
        scratch_folder("buckets") as folder,
        Progress(what) as progress,
        _stopping([]) as running,
    ):
        for i, job in enumerate(jobs):
            Path(folder, f"{i}.job").write_bytes(job)
        waiting = collections.deque(range(len(jobs)))
        found: dict[int, TraceParts] = {}
        told: set[tuple[int, str]] = set()
        while waiting or running:
            while waiting and len(running) < processes:
                _start(waiting.popleft(), folder, switches, running)
            ends = [end for worker in running for end in worker.ends()]
            connection.wait(ends, _POLL_SECONDS)
            for worker in list(running):
                if worker.is_over():
                    outcome = worker.finish(folder)
                    running.remove(worker)
                    _tell(outcome.records, told)
                    found[worker.index] = _parts(outcome)
                    progress.update(f"{what}, {len(found)} done")
        progress.update(what)
        return [found[i] for i in range(len(jobs))]


@dataclass
class _Worker:
    index: int
    process: SpawnProcess
    pipe: Any
    stage: str = IMPORTING
    pipe_open: bool = True
    done_since: float = 0.0

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def ends(self) -> list[Any]:
        """What there is to wait for."""
        return [self.process.sentinel, *([self.pipe] if self.pipe_open else [])]

    def has_exited(self) -> bool:
        """Without collecting its exit code: until then its process group cannot be another's."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # multiprocessing has collected it
            return True

    def is_over(self) -> bool:
        """Whether it is gone, or should have been after it told its result."""
        gone = self.has_exited()  # first, since what it said before it ended is read below
        while self.pipe_open and self.pipe.poll():
            try:
                self.stage = self.pipe.recv()
            except (EOFError, OSError):
                self.pipe_open = False
        if self.stage != DONE:
            return gone
        self.done_since = self.done_since or time.monotonic()
        return gone or time.monotonic() - self.done_since > _EXIT_SECONDS

    def signal(self, number: int) -> None:
        """To it and to all that it started."""
        for send in (os.killpg, os.kill):  # before it works, it has no group of its own
            with contextlib.suppress(ProcessLookupError):
                send(self.pid, number)

    def finish(self, folder: str) -> Outcome:
        """Its result. Nothing of it runs any more."""
        self.close()
        path = Path(folder, f"{self.index}.result")
        if not path.exists():
            raise RuntimeError(f"bucket {self.index}: {self._how_it_ended()}")
        # Mapped and not read: weights that buckets share are copied once, when they are merged.
        outcome = torch.load(path, mmap=True, weights_only=False)
        assert isinstance(outcome, Outcome)
        if outcome.parts is not None:
            outcome.parts = _without_mappings(outcome.parts)
        return outcome

    def close(self) -> None:
        if self.process.exitcode is None or self.has_exited():
            self.signal(signal.SIGKILL)
        self.process.join()
        self.pipe.close()

    def _how_it_ended(self) -> str:
        code = self.process.exitcode
        if code is not None and code < 0:
            return (
                f"its worker process {self.pid} was killed by {signal.Signals(-code).name}. If "
                "memory ran out, let it compile one bucket after another: start Python with "
                "`taskset -c 0`"
            )
        if self.stage == IMPORTING:
            main = getattr(sys.modules["__main__"], "__file__", None)
            return (
                f"its worker process {self.pid} ended with exit code {code} while it began; stderr "
                f"has its error. A worker imports the main script, {main}: what that does beside "
                'defining things belongs below `if __name__ == "__main__":`'
            )
        return (
            f"its worker process {self.pid} ended with exit code {code} and without a result; "
            "stderr has its error, unless func itself ends the process"
        )


def _without_mappings(parts: TraceParts) -> TraceParts:
    """With copies of what would keep the file on disk for as long as the module lives."""
    version, ints, strings, int_lists, string_lists, tensors = parts.state
    kept = {name: t if name == "weights" else t.clone() for name, t in tensors.items()}
    state = (version, ints, strings, int_lists, string_lists, kept)
    held = tuple(dataclasses.replace(one, value=one.value.clone()) for one in parts.held)
    return dataclasses.replace(parts, state=state, held=held)


def _start(index: int, folder: str, switches: Switches, running: list[_Worker]) -> None:
    """Start the worker of a bucket and add it to ``running``."""
    context = get_context("spawn")
    with _blocked_interrupts():
        mine, its = context.Pipe(duplex=False)
        process = context.Process(
            target=work, args=(folder, index, switches, its), name=f"neuron_ext-bucket-{index}"
        )
        try:
            process.start()
        except BaseException as error:
            mine.close()
            if isinstance(error, OSError):
                raise RuntimeError(
                    f"bucket {index}: its worker process cannot be started: {error}. Free memory, "
                    "or raise the limits on processes and open files (ulimit -u, ulimit -n)"
                ) from error
            raise
        finally:
            its.close()
        running.append(_Worker(index, process, mine))


@contextlib.contextmanager
def _blocked_interrupts() -> Iterator[None]:
    """A worker is never started and then forgotten; and it inherits that Ctrl-C is not for it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _stopping(running: list[_Worker]) -> Iterator[list[_Worker]]:
    """At the end, whoever still runs is asked to stop, and ended where that takes too long."""
    try:
        yield running
    finally:
        try:
            for worker in running:
                if not worker.has_exited():
                    worker.signal(signal.SIGTERM)
            until = time.monotonic() + STOP_SECONDS
            while time.monotonic() < until and not all(w.has_exited() for w in running):
                time.sleep(0.02)
        finally:  # also where Ctrl-C comes a second time
            for worker in running:
                worker.close()


def _tell(records: Sequence[logging.LogRecord], told: set[tuple[int, str]]) -> None:
    """Log what a worker logged, unless another one has said the same."""
    for record in records:
        key = (record.levelno, record.getMessage())
        if key not in told:
            told.add(key)
            _log.handle(record)


def _parts(outcome: Outcome) -> TraceParts:
    if outcome.parts is not None:
        return outcome.parts
    if not outcome.loaded:
        raise CannotLoadError(outcome.text)
    error: BaseException | None = None
    if outcome.error is not None:
        # Read in a worker before, but what it needs may not be the same here.
        with contextlib.suppress(Exception):
            error = pickle.loads(outcome.error)
    cause = RemoteError(outcome.trace)
    raise (RuntimeError(outcome.text) if error is None else error) from cause
