"""From tables to text, JSON and plots. Everything but the JSON can be made again out of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.table import Row, Sample, Table

_FORMAT = 1


@dataclass
class Results:
    """One run: what it was measured on, its tables, and the questions that failed."""

    name: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    load_before: list[float]
    load_after: list[float] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> Results:
        """Raises ValueError: the file is of another format."""
        fields = json.loads(file.read_text())
        if fields.pop("format", None) != _FORMAT:
            raise ValueError(f"{file} is not a result file of format {_FORMAT}")
        fields["tables"] = [_table(one) for one in fields["tables"]]
        return cls(**fields)


def _table(fields: dict[str, Any]) -> Table:
    rows = [Row(**{**row, "sample": Sample(**row["sample"])}) for row in fields["rows"]]
    return Table(**{**fields, "rows": rows})


def table_text(table: Table) -> str:
    """One question in markdown: every subject, the verdict, the notes."""
    sign = "+" if table.compare == "difference" else ""
    column = {"ratio": "ratio", "difference": f"difference ({table.unit})", "value": "ratio"}
    lines = [
        f"### {table.title}",
        "",
        f"| {table.question} | median ({table.unit}) | quartiles | rounds "
        f"| {column[table.compare]} | quartiles |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in table.rows:
        name = f"**{row.subject}**" if row.subject == table.subject else row.subject
        sample = row.sample
        spread = f"{number(sample.low)} - {number(sample.high)}"
        ratio, ratios = "", ""
        if row.subject == table.reference and table.compare != "value":
            ratio = "reference"
        elif row.ratio is not None and row.ratio_low is not None and row.ratio_high is not None:
            ratio = _ratio(row.ratio, sign)
            ratios = f"{_ratio(row.ratio_low, sign)} - {_ratio(row.ratio_high, sign)}"
        lines.append(
            f"| {name} | {number(sample.median)} | {spread} | {sample.count} | {ratio} | {ratios} |"
        )
    lines += ["", verdict(table), ""]
    lines += [f"- {note}" for note in table.notes]
    return "\n".join(lines).rstrip() + "\n"


def verdict(table: Table) -> str:
    """The answer against what it must reach and aims for, in a sentence."""
    if table.answer is None:
        return "No answer: nothing to compare with."
    text = f"Answer: {answer(table)}"
    if table.must is not None:
        reached = "reached" if table.reaches(table.must) else "**not reached**"
        text += f"; must be {goal(table, table.must)}: {reached}"
    if table.aim is not None:
        reached = "reached" if table.reaches(table.aim) else "not reached"
        text += f"; aim {goal(table, table.aim)}: {reached}"
    return text + "."


def answer(table: Table) -> str:
    """The subject's ratio, difference or value, with its unit."""
    if table.answer is None:
        return "-"
    return f"{_ratio(table.answer)}x" if table.compare == "ratio" else goal(table, table.answer)


def goal(table: Table, value: float | None) -> str:
    """What a table must reach or aims for, in its own terms."""
    if value is None:
        return "-"
    if table.compare == "ratio":
        return f"{value:g}x"
    sign = "+" if table.compare == "difference" and value >= 0 else ""
    return f"{sign}{number(value)} {table.unit}"


def number(value: float) -> str:
    """Three significant digits; whole numbers from 1000 on."""
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _ratio(value: float, sign: str = "") -> str:
    return f"{value:+.2f}" if sign else (f"{value:.3f}" if value < 10 else f"{value:.1f}")


def machine_text(machine: Mapping[str, Any]) -> str:
    """What `machine.machine` found, in a line."""
    features = ", ".join(machine.get("cpu_features", []))
    return (
        f"{machine.get('cpu')} ({features}), {machine.get('cores')} cores, of which CPUs "
        f"{machine.get('cpus_used', [])} were used; {machine.get('memory_gb')} GB; Linux "
        f"{machine.get('kernel')}"
    )


def notes_of_later(now: Results, first: Results) -> list[str]:
    """What a table of the run ``now`` has to say beside those of the run ``first``, whose machine
    and versions head the summary.
    """
    notes = [
        f"Measured later than the file was begun: {now.date}, commit "
        f"{now.versions['commit']}, window {now.settings['window']}."
    ]
    others = [
        f"{name} {version}"
        for name, version in now.versions.items()
        if name != "commit" and first.versions.get(name) != version
    ]
    if others:
        notes.append(f"With other versions: {', '.join(others)}.")
    if now.machine != first.machine:
        notes.append(f"Measured on another machine: {machine_text(now.machine)}.")
    return notes


def environment_text(results: Results) -> str:
    """Machine, versions and conditions, in markdown."""
    packages = ", ".join(f"{name} {value}" for name, value in results.versions.items())
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items())
    return "\n".join(
        [
            f"- Machine: {machine_text(results.machine)}",
            f"- Versions: {packages}",
            f"- Run: {results.name}, {results.date}; {settings}; load average "
            f"{results.load_before} before, {results.load_after} after",
        ]
    )


def summary_text(results: Results, plots: Path | None) -> str:
    """All answers in one table, then each question; ``plots`` is where the plots lie, relative."""
    lines = [
        "# Benchmark results",
        "",
        environment_text(results),
        "",
        "| question | ours | against | answer | quartiles | must | aim | reached |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for table in results.tables:
        ours, other = table.row(table.subject), table.row(table.reference)
        own = f"{number(ours.sample.median)} {table.unit}"
        against = "-"
        spread = f"{number(ours.sample.low)} - {number(ours.sample.high)}"
        if table.compare != "value":
            against = f"{number(other.sample.median)} ({table.reference})"
            if ours.ratio_low is not None and ours.ratio_high is not None:
                sign = "+" if table.compare == "difference" else ""
                spread = f"{_ratio(ours.ratio_low, sign)} - {_ratio(ours.ratio_high, sign)}"
        lines.append(
            f"| {table.title} | {own} | {against} | {answer(table)} | {spread} "
            f"| {goal(table, table.must)} | {goal(table, table.aim)} | {_reached(table)} |"
        )
    for name, error in results.failures.items():
        lines += ["", f"**{name} failed**: {(error.strip().splitlines() or [''])[-1]}"]
    for table in results.tables:
        lines += ["", table_text(table).rstrip()]
        if plots is not None:
            lines += ["", f"![{table.title}]({plots}/{table.question}.png)"]
    return "\n".join(lines) + "\n"


def _reached(table: Table) -> str:
    if table.reaches(table.aim):
        return "aim"
    must = table.reaches(table.must)
    return "" if must is None else ("must" if must else "**no**")


def write(results: Results, folder: Path, plots: bool = True) -> None:
    """``summary.md`` and ``plots/`` in ``folder``, from results alone. Plots need matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    if plots:
        from benchmarks.harness.plots import plot

        (folder / "plots").mkdir(exist_ok=True)
        for table in results.tables:
            plot(table, folder / "plots" / f"{table.question}.png")
    text = summary_text(results, Path("plots") if plots else None)
    (folder / "summary.md").write_text(text)
