"""What a question answers: a table with one row for each subject that was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sample:
    """The values of one subject: median, quartiles and how many there were."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        """Quartiles by linear interpolation between the sorted values.

        Raises:
            ValueError: there is no value.
        """
        if not values:
            raise ValueError("a sample needs at least one value, got none; measure first")
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))


@dataclass
class Row:
    """One subject. ``ratio`` is against the table's reference, with its quartiles.

    In a table that compares by difference, ``ratio`` holds the difference, in the table's unit.
    """

    subject: str
    sample: Sample
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass
class Table:
    """The answer to one question."""

    question: str
    """Its id, such as ``"load_time.bert"``."""
    title: str
    """The question in words."""
    unit: str
    """Of the samples: ``"us"``, ``"ms"``, ``"images/s"``, ``"MB"``."""
    better: str
    """``"lower"`` or ``"higher"``: which values of the samples, and of the ratios, are good."""
    reference: str
    """The subject that ratios are against."""
    subject: str
    """Our subject, whose ratio is the answer."""
    rows: list[Row]
    must: float | None = None
    """The ratio to reach."""
    aim: float | None = None
    notes: list[str] = field(default_factory=list)
    """Accuracy, what bounds it, and what else a reader has to know."""
    compare: str = "ratio"
    """What ``must`` and ``aim`` are compared with: the subject's ``"ratio"``, its ``"difference"``
    from the reference, or its ``"value"`` as it is; the last two in the table's unit."""

    def __post_init__(self) -> None:
        if self.better not in ("lower", "higher"):
            raise ValueError(f"{self.question}: better={self.better!r}; use 'lower' or 'higher'")
        if self.compare not in ("ratio", "difference", "value"):
            raise ValueError(
                f"{self.question}: compare={self.compare!r}; use 'ratio', 'difference' or 'value'"
            )
        for name in (self.subject, self.reference):
            self.row(name)

    def row(self, subject: str) -> Row:
        """The row of ``subject``.

        Raises:
            ValueError: there is none.
        """
        for row in self.rows:
            if row.subject == subject:
                return row
        known = ", ".join(row.subject for row in self.rows)
        raise ValueError(f"{self.question} has no row {subject!r}; it has: {known}")

    @property
    def answer(self) -> float | None:
        """The number that ``must`` and ``aim`` are about; None where there is none."""
        row = self.row(self.subject)
        return row.sample.median if self.compare == "value" else row.ratio

    def reaches(self, goal: float | None) -> bool | None:
        """Whether the answer is at least as good as ``goal``, to two decimals; None if either is
        missing.
        """
        if goal is None or self.answer is None:
            return None
        answer = round(self.answer, 2)
        return answer <= goal if self.better == "lower" else answer >= goal
