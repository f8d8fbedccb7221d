"""One picture for each question."""

from __future__ import annotations

import textwrap
from pathlib import Path

from benchmarks.harness.report import answer, goal, number
from benchmarks.harness.table import Table

_OURS, _OTHERS, _TEXT, _LINE = "#1f6feb", "#b8c0cc", "#24292f", "#8c959f"


def plot(table: Table, file: Path) -> None:
    """Writes a PNG: a bar for each subject with its quartiles, and a line at the reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(reversed(table.rows))
    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.42 * len(rows)), layout="constrained")
    medians = [row.sample.median for row in rows]
    whiskers = [
        [row.sample.median - row.sample.low for row in rows],
        [row.sample.high - row.sample.median for row in rows],
    ]
    bars = axes.barh(
        [row.subject for row in rows],
        medians,
        xerr=whiskers,
        color=[_OURS if row.subject == table.subject else _OTHERS for row in rows],
        error_kw={"ecolor": _TEXT, "capsize": 3, "elinewidth": 1},
    )
    highest = max(row.sample.high for row in rows)
    for bar, row in zip(bars, rows, strict=True):
        axes.text(
            max(row.sample.high, 0) + 0.015 * highest,
            bar.get_y() + bar.get_height() / 2,
            number(row.sample.median),
            va="center",
            color=_TEXT,
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    reference = table.row(table.reference).sample.median
    wanted = _wanted(table, reference)
    if table.compare != "value":
        axes.axvline(reference, color=_LINE, linestyle="--", linewidth=1, label=table.reference)
    if wanted is not None:
        label = f"must: {goal(table, table.must)}"
        axes.axvline(wanted, color="#cf222e", linestyle=":", linewidth=1.2, label=label)
    axes.set_xlim(0, 1.1 * max(highest, wanted or 0))
    axes.set_xlabel(f"{table.unit} ({table.better} is better)", color=_TEXT)
    axes.set_title(
        textwrap.fill(f"{table.title}: {answer(table)}", 80), loc="left", fontsize=10, color=_TEXT
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    figure.savefig(file, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def _wanted(table: Table, reference: float) -> float | None:
    """The value that the subject has to reach."""
    if table.must is None:
        return None
    if table.compare == "ratio":
        return reference * table.must
    return table.must + (reference if table.compare == "difference" else 0.0)
