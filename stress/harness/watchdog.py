"""Ends the process, showing every stack, when an operation takes longer than it may."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Iterator

from stress.harness.patience import PERIOD, Patience

STUCK = 86
"""The exit status of a process that the watchdog ended."""
_GIL_FACTOR = 5


class Watchdog:
    """Watches the operations of all threads of this process.

    A thread of Python looks at the operations; should it be stuck itself, because somebody keeps
    the GIL, the timer of faulthandler ends the process, which needs no GIL. That timer has no
    `Patience`, and therefore more time.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._under_way: dict[int, tuple[str, float, Patience]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def operation(self, name: str, times: float = 1.0) -> Iterator[None]:
        """Names what the calling thread does in the block, for at most ``times`` the limit."""
        me = threading.get_ident()
        limit = self._limit * times
        self._under_way[me] = (name, limit, Patience(limit))
        try:
            yield
        finally:
            del self._under_way[me]

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD):
            limit = self._limit * _GIL_FACTOR
            faulthandler.dump_traceback_later(limit, exit=True, file=sys.stderr)
            # A copy, made without letting another thread in.
            for name, most, patience in list(self._under_way.values()):
                if patience.over():
                    text = f"watchdog: {name} still waits after {most:.0f} s"
                    print(text, file=sys.stderr, flush=True)
                    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                    os._exit(STUCK)
