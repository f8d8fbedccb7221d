"""Waiting for as long as one may, not counting time in which this process was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable

PERIOD = 0.5
_MOST_OF_A_GAP = 2.0


class Patience:
    """Whoever asks `over` about every `PERIOD` gets True after ``limit`` seconds.

    A machine may sleep, or somebody may stop all processes for a while: that says nothing of what
    is waited for, so of a long gap between two questions only a little counts.
    """

    def __init__(self, limit: float) -> None:
        self._left = limit
        self._last = time.monotonic()

    def over(self) -> bool:
        now = time.monotonic()
        self._left -= min(now - self._last, _MOST_OF_A_GAP)
        self._last = now
        return self._left <= 0


def wait_until(condition: Callable[[], bool], limit: float, period: float = 0.01) -> bool:
    """Whether ``condition()`` comes true within ``limit`` seconds."""
    patience = Patience(limit)
    while not condition():
        if patience.over():
            return False
        time.sleep(period)
    return True
