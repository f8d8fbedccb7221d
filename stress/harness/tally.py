"""What a scenario did and what failed, and the table of all of them."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import sys
import threading
from pathlib import Path

_SHOWN = 20


class Tally:
    """Counts and failures of one scenario. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()
        self._failures: list[str] = []
        self._notes: list[str] = []

    def count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self._counts[what] += number

    def counted(self, what: str) -> int:
        with self._lock:
            return self._counts[what]

    def fail(self, text: str) -> None:
        """One failure; ``text`` says what was expected and what came."""
        with self._lock:
            self._failures.append(text)
            if len(self._failures) <= _SHOWN:
                print(f"FAILED: {text}", file=sys.stderr, flush=True)

    def expect(self, condition: object, text: str) -> bool:
        """`fail` unless ``condition`` holds; returns whether it does."""
        if not condition:
            self.fail(text)
        return bool(condition)

    def note(self, text: str) -> None:
        """A measurement that belongs into the table."""
        with self._lock:
            self._notes.append(text)

    @property
    def failed(self) -> bool:
        with self._lock:
            return bool(self._failures)

    def outcome(self, name: str, seconds: float) -> Outcome:
        with self._lock:
            done = [f"{number:,} {what}" for what, number in self._counts.items()]
            return Outcome(name, ", ".join(done + self._notes), list(self._failures), seconds)


@dataclasses.dataclass
class Outcome:
    """One line of the table."""

    scenario: str
    done: str
    failures: list[str]
    seconds: float

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def read(path: Path) -> Outcome:
        return Outcome(**json.loads(path.read_text()))


def summary(outcomes: list[Outcome], environment: list[str]) -> str:
    """The table in markdown, then what failed."""
    lines = ["# Stress", "", *[f"- {line}" for line in environment], ""]
    lines += ["| scenario | what was done | failures | duration |", "|---|---|---:|---:|"]
    lines += [
        f"| {one.scenario} | {one.done.replace('|', '/')} | {len(one.failures)} | "
        f"{_duration(one.seconds)} |"
        for one in outcomes
    ]
    for one in outcomes:
        if one.failures:
            lines += ["", f"## {one.scenario}: {len(one.failures)} failed", ""]
            lines += [f"- {_one_line(text)}" for text in one.failures[:_SHOWN]]
            if len(one.failures) > _SHOWN:
                lines.append(f"- and {len(one.failures) - _SHOWN} more")
    return "\n".join(lines) + "\n"


def as_json(outcomes: list[Outcome], environment: list[str]) -> str:
    """The same for programs: every failure, and seconds as numbers."""
    fields = {"run": environment, "scenarios": [dataclasses.asdict(one) for one in outcomes]}
    return json.dumps(fields, indent=2) + "\n"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:1500]


def chooser(options: object, *names: object) -> random.Random:
    """Random numbers that a run with the same seed gets again, apart for each of ``names``."""
    return random.Random(repr((getattr(options, "seed", 0), *names)))
