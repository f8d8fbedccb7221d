"""A progress line on stderr for work that takes seconds."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

_PATIENCE_SECONDS = 3.0
_REFRESH_SECONDS = 1.0


class Progress:
    """Context manager: says on stderr that work is under way once it has lasted about 3 seconds.

    On a terminal one line is rewritten every second; elsewhere there is one line when the wait
    begins and one when it is over. ``NEURON_EXT_PROGRESS=0`` in the environment turns it off. A
    stderr that is missing, closed or broken is ignored. One instance serves one ``with`` block of
    one thread; the line is written by a daemon thread that has ended when the block is left.
    """

    def __init__(self, what: str) -> None:
        """``what`` is shown after "compiling", for example ``BertModel (inductor)``."""
        self._what = what
        self._stream: TextIO | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._shown = False
        self._tty = False
        self._width = 0
        self._started = 0.0

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        self._stream = sys.stderr
        if self._stream is not None and os.environ.get("NEURON_EXT_PROGRESS", "1") != "0":
            self._tty = self._is_tty(self._stream)
            self._thread = threading.Thread(
                target=self._watch, name="neuron_ext-progress", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        if not self._shown:
            return
        outcome = "compiled in" if kind is None else "gave up after"
        self._write(f"neuron_ext: {self._what} {outcome} {self._elapsed():.1f} s", end="\n")

    def update(self, what: str) -> None:
        """Show ``what`` instead from now on: in the next rewrite of the line, and at the end."""
        self._what = what

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _watch(self) -> None:
        if self._done.wait(_PATIENCE_SECONDS):
            return
        self._shown = True
        if not self._tty:
            self._write(f"neuron_ext: compiling {self._what} ...", end="\n")
            return
        while True:
            self._write(f"neuron_ext: compiling {self._what} ... {self._elapsed():.0f} s", end="")
            if self._done.wait(_REFRESH_SECONDS):
                return

    def _write(self, text: str, end: str) -> None:
        if self._stream is None:
            return
        try:
            if self._tty:
                # Spaces wipe out what an earlier, longer line left behind.
                self._stream.write("\r" + text.ljust(self._width) + end)
                self._width = len(text)
            else:
                self._stream.write(text + end)
            self._stream.flush()
        except (OSError, ValueError):
            self._stream = None

    @staticmethod
    def _is_tty(stream: TextIO) -> bool:
        try:
            return stream.isatty()
        except (OSError, ValueError, AttributeError):
            return False
