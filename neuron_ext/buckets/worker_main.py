"""What runs in a worker process: one bucket, from a file to a file."""

from __future__ import annotations

import logging
import logging.handlers
import os
import pickle
import queue
import shutil
import signal
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch

from neuron_ext._trace import TraceParts
from neuron_ext.buckets.job import compile_bucket

# How far a worker is. It begins with importing; the others are sent through its pipe.
IMPORTING, WORKING, DONE = "importing", "working", "done"

STOP_SECONDS = 3.0
"""What a worker that is asked to stop gets to tidy up."""


@dataclass(frozen=True)
class Switches:
    """Settings of the parent that a worker takes over."""

    log_level: int
    threads: int
    dtype: torch.dtype
    matmul_precision: str
    deterministic: bool

    @classmethod
    def of_this_process(cls, threads: int) -> Switches:
        return cls(
            logging.getLogger("neuron_ext").getEffectiveLevel(),
            threads,
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )

    def apply(self) -> None:
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.use_deterministic_algorithms(self.deterministic)


@dataclass
class Outcome:
    """What a worker leaves in its file: ``parts``, or an error.

    ``loaded`` is False where the job could not be unpickled. ``error`` is pickled, and None if it
    cannot be; ``text`` and ``trace`` say what it was.
    """

    records: list[logging.LogRecord]
    parts: TraceParts | None = None
    loaded: bool = True
    error: bytes | None = None
    text: str = ""
    trace: str = ""


def work(folder: str, index: int, switches: Switches, pipe: Any) -> None:
    """Compile ``<index>.job`` of the folder and leave an `Outcome` in ``<index>.result``.

    Runs in the main thread of a new process, in a session of its own, so that whatever it starts
    can be ended with it. Ends with its parent.
    """
    os.setsid()
    signal.signal(signal.SIGTERM, _exit)
    # The parent blocked it, so that Ctrl-C in a terminal is the parent's alone to handle.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    pipe.send(WORKING)
    os.environ["NEURON_EXT_PROGRESS"] = "0"  # the parent shows it for all
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    log = logging.getLogger("neuron_ext")
    log.addHandler(logging.handlers.QueueHandler(records))
    log.setLevel(switches.log_level)
    log.propagate = False
    switches.apply()
    outcome = _compile(Path(folder, f"{index}.job"))
    while not records.empty():
        outcome.records.append(records.get())
    unfinished = Path(folder, f"{index}.unfinished")
    torch.save(outcome, unfinished)
    unfinished.rename(Path(folder, f"{index}.result"))
    pipe.send(DONE)


def _compile(path: Path) -> Outcome:
    loaded = False
    try:
        job = pickle.loads(path.read_bytes())
        loaded = True
        return Outcome([], compile_bucket(job))
    except Exception as error:
        return Outcome(
            [],
            loaded=loaded,
            error=_pickled(error),
            text=f"{type(error).__name__}: {error}",
            trace=traceback.format_exc(),
        )


def _pickled(error: Exception) -> bytes | None:
    try:
        data = pickle.dumps(error)
        # Some errors can be written and not be read again.
        return data if isinstance(pickle.loads(data), type(error)) else None
    except Exception:  # user-defined errors may do anything
        return None


def _exit(_number: int, _frame: Any) -> None:
    raise SystemExit(1)


def _end_with_parent(folder: str) -> None:
    parent = parent_process()
    if parent is None:
        return
    connection.wait([parent.sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    group = os.getpgid(0)
    os.killpg(group, signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os.killpg(group, signal.SIGKILL)
