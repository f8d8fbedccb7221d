"""Requests from many threads: as fast as they go, and at a given rate."""

from __future__ import annotations

import gc
import heapq
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Completions that a rate is made of, at least.
FEWEST = 8

Call = Callable[[], Any]
MakeCall = Callable[[int], Call]
"""From the number of a thread to what it calls; made on that thread."""


def throughput(make_call: MakeCall, threads: int, seconds: float) -> float:
    """Calls per second of ``threads`` threads that each call again as soon as they have an answer.

    All are busy during the whole window: what completes after it is not counted, see `rate_of`.
    The window is ``seconds`` long, or longer until `FEWEST` calls have completed.
    """
    completions: list[float] = []

    def work(_: int, call: Call, start: threading.Barrier) -> None:
        start.wait()
        deadline = time.perf_counter() + seconds
        while True:
            call()
            now = time.perf_counter()
            if now >= deadline and len(completions) >= FEWEST:
                return
            completions.append(now)

    with _no_collection():
        _in_threads(make_call, threads, work)
    return rate_of(completions)


def rate_of(completions: Sequence[float]) -> float:
    """Completions per second: the slope of the line through (time, how many until then).

    Least squares, since the ends of a window fall anywhere between two completions: with a few
    long calls per window, dividing a count by a duration would be off by as much as one call.

    Raises:
        RuntimeError: too few completions to tell a rate.
    """
    if len(completions) < FEWEST:
        raise RuntimeError(
            f"{len(completions)} calls completed in the window, at least {FEWEST} are needed; make "
            "it longer"
        )
    times = sorted(completions)
    mean_time = sum(times) / len(times)
    mean_count = (len(times) - 1) / 2
    spread = sum((t - mean_time) ** 2 for t in times)
    return sum((t - mean_time) * (k - mean_count) for k, t in enumerate(times)) / spread


def latencies(
    make_call: MakeCall, threads: int, rate: float, seconds: float, seed: int
) -> list[float]:
    """Seconds from the arrival of a request to its answer, for requests that arrive at ``rate``.

    Arrivals are a Poisson process that does not wait for answers; the same seed gives the same
    arrivals. A free thread takes the oldest request that nobody has taken. A request that arrives
    while all are busy waits, which counts.
    """
    schedule = arrivals(rate, seconds, seed)
    found = [0.0] * len(schedule)
    numbers = iter(range(len(schedule)))
    lock = threading.Lock()
    started: list[float] = []

    def work(_: int, call: Call, start: threading.Barrier) -> None:
        if start.wait() == 0:
            started.append(time.perf_counter() + 0.05)
        while not started:
            time.sleep(0.001)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            arrival = started[0] + schedule[number]
            wait = arrival - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            call()
            found[number] = time.perf_counter() - arrival

    with _no_collection():
        _in_threads(make_call, threads, work)
    return found


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """The arrival times of a Poisson process, in seconds from 0."""
    chance = random.Random(seed)
    times: list[float] = []
    now = chance.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += chance.expovariate(rate)
    return times


def at_constant_speed(schedule: Sequence[float], servers: int, service: float) -> list[float]:
    """`latencies` of ``servers`` that take ``service`` seconds for each request, by calculation."""
    free = [0.0] * servers
    found: list[float] = []
    for arrival in schedule:
        done = max(arrival, heapq.heappop(free)) + service
        heapq.heappush(free, done)
        found.append(done - arrival)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _in_threads(
    make_call: MakeCall, threads: int, work: Callable[[int, Call, threading.Barrier], None]
) -> None:
    """Runs ``work`` in threads that start together, each warm; raises what one of them raised."""
    start = threading.Barrier(threads)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            call = make_call(number)
            call()
            work(number, call, start)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append(error)
            start.abort()

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
