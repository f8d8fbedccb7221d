"""Interleaved measurements, and measurements in processes of their own."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.options import REPOSITORY
from benchmarks.harness.table import Row, Sample


def interleaved(
    subjects: Mapping[str, Callable[[], float]],
    rounds: int,
    warmup: int = 1,
    subject: str | None = None,
    reference: str | None = None,
    compare: str = "ratio",
) -> list[Row]:
    """Measures all subjects ``rounds`` times, one after another, in an order that rotates.

    A slow minute of the machine hits all subjects alike: each round gives one ratio, or one
    difference, for each subject against ``reference``, and a row tells their median and quartiles.

    Args:
        subjects: each does one measurement and returns its value, in the table's unit.
        rounds: at least 1.
        warmup: rounds before, whose values are dropped.
        subject: ours; only checked to be among the subjects.
        reference: what ratios are against; without one, rows have none.
        compare: ``"ratio"`` or ``"difference"``.

    Raises:
        ValueError: ``rounds`` is below 1, or a name is not among the subjects.
    """
    for name in (subject, reference):
        if name is not None and name not in subjects:
            raise ValueError(f"no subject {name!r}; there are: {', '.join(subjects)}")
    return rows_of(rounds_of(subjects, rounds, warmup), reference, compare)


def rounds_of(
    subjects: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """The values that `interleaved` makes rows of: for each subject one per round.

    Raises:
        ValueError: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}; at least one is needed")
    names = list(subjects)
    values: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        for name in rotated(names, number):
            value = float(subjects[name]())
            if number >= warmup:
                values[name].append(value)
    return values


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of round ``number``: each subject comes first in its turn."""
    start = number % len(names) if names else 0
    return [*names[start:], *names[:start]]


def rows_of(
    values: Mapping[str, Sequence[float]], reference: str | None, compare: str = "ratio"
) -> list[Row]:
    """Rows of values that were measured round by round, as `interleaved` makes them."""
    if compare not in ("ratio", "difference"):
        raise ValueError(f"compare={compare!r}; use 'ratio' or 'difference'")
    rows = []
    for name, own in values.items():
        row = Row(name, Sample.of(own))
        if reference is not None:
            pairs = zip(own, values[reference], strict=True)
            against = Sample.of([a / b if compare == "ratio" else a - b for a, b in pairs])
            row.ratio, row.ratio_low, row.ratio_high = against.median, against.low, against.high
        rows.append(row)
    return rows


def in_new_process(
    function: str,
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 1800,
    **kwargs: Any,
) -> Any:
    """Calls ``function``, named as ``"package.module:name"``, in a fresh interpreter.

    Args:
        function: takes ``kwargs`` and returns something, both as JSON.
        environment: variables to set on top of those of this process.
        timeout: in seconds.

    Raises:
        RuntimeError: the process failed; the text holds what it wrote.
    """
    # The answer has a file of its own: libraries write to stdout as they please.
    with tempfile.NamedTemporaryFile(prefix="benchmark-") as answer:
        try:
            child = subprocess.run(
                [sys.executable, "-m", "benchmarks.harness.child", function, answer.name],
                cwd=REPOSITORY,
                env={**os.environ, **(environment or {})},
                input=json.dumps(kwargs),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                text=True,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(
                f"{function} still ran after {timeout} s; it wrote:\n{_text(error.stdout)}"
            ) from error
        text = Path(answer.name).read_text()
    if child.returncode != 0 or not text:
        raise RuntimeError(
            f"{function} ended with status {child.returncode}; it wrote:\n{child.stdout}"
        )
    return json.loads(text)


def _text(output: Any) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else str(output or "")


def resolve(function: str) -> Callable[..., Any]:
    """The function that ``"package.module:name"`` names."""
    module, _, name = function.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found
