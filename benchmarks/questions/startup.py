"""What importing the package costs, and tracing a model that was traced before."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version as version_of
from pathlib import Path

from benchmarks import models
from benchmarks.harness.measure import in_new_process, rows_of
from benchmarks.harness.options import REPOSITORY, Options
from benchmarks.harness.table import Table

PACKAGE = "import neuron_ext, torch imported before"
TORCH = "import torch"

_TIME_IMPORTS = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import neuron_ext
end = time.perf_counter()
print(middle - start, end - middle)
"""

FIRST = "first"
AGAIN = "again, in a new process"
TORCH_CACHE = "again, in a new process, with TorchInductor's cache alone"


def import_time(options: Options) -> Table:
    """Each value from a process of its own, whose modules have bytecode."""
    values: dict[str, list[float]] = {PACKAGE: [], TORCH: []}
    with _folder("bytecode") as bytecode:
        environment = {**os.environ, **_with_bytecode(bytecode)}
        for number in range(1 + max(options.rounds, 5)):
            output = subprocess.run(
                [sys.executable, "-c", _TIME_IMPORTS],
                cwd=REPOSITORY,
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            if number > 0:  # the first writes the bytecode
                for label, seconds in zip((TORCH, PACKAGE), output.split()[-2:], strict=True):
                    values[label].append(1e3 * float(seconds))
    return Table(
        "startup.import",
        "import neuron_ext, on top of import torch",
        "ms",
        "lower",
        PACKAGE,
        PACKAGE,
        rows_of(values, reference=None),
        must=50.0,
        aim=10.0,
        notes=["measured inside the process; files are in the page cache"],
        compare="value",
    )


def trace_again(options: Options) -> Table:
    """``trace`` in new processes: with an empty cache, and with what the first left there."""
    name = "mlp" if options.quick else "bert"
    labels = (FIRST, AGAIN) if options.quick else (FIRST, AGAIN, TORCH_CACHE)
    switches = {TORCH_CACHE: {"NEURON_EXT_CACHE": "0"}}
    values: dict[str, list[float]] = {label: [] for label in labels}
    walls: dict[str, list[float]] = {label: [] for label in labels}
    bytecode, prepared = _prepared(options)
    with _folder("trace") as folder:
        for number in range(1 if options.quick else min(options.rounds, 3)):
            torch_cache, cache = folder / f"torch-{number}", folder / f"cache-{number}"
            shutil.copytree(prepared, torch_cache)
            for label in labels:
                environment = {**bytecode, **switches.get(label, {})}
                seconds, wall = _trace(name, torch_cache, cache, environment)
                values[label].append(seconds)
                walls[label].append(wall)
    return Table(
        "startup.trace_again",
        f"trace of a model seen before ({name}), in a new process",
        "s",
        "lower",
        FIRST,
        AGAIN,
        rows_of(values, reference=FIRST),
        must=0.3,
        aim=0.1,
        notes=[
            "the seconds of trace() alone; the whole process took "
            + ", ".join(f"{min(took):.1f} s ({label})" for label, took in walls.items()),
            "TorchInductor has compiled another model before: what it does once on a machine is "
            "not part of the first trace",
        ],
    )


def _prepared(options: Options) -> tuple[dict[str, str], Path]:
    """Where bytecode is, for the environment; and TorchInductor's cache after another model.

    Both are there once for all models, and would make the first trace of one look slower than it
    is. They are kept between runs.
    """
    version = "".join(c if c.isalnum() else "_" for c in version_of("torch"))
    folder = options.workdir / "inductor" / version
    bytecode = _with_bytecode(folder / "bytecode")
    done = folder / "done"
    if not done.exists():
        _trace("affine", folder / "cache", folder / "unused", {**bytecode, "NEURON_EXT_CACHE": "0"})
        done.touch()
    return bytecode, folder / "cache"


def _trace(
    name: str, torch_cache: Path, cache: Path, environment: Mapping[str, str]
) -> tuple[float, float]:
    """Seconds for trace() alone, and for the whole process."""
    start = time.perf_counter()
    seconds = in_new_process(
        f"{__name__}:time_trace",
        environment={
            "TORCHINDUCTOR_CACHE_DIR": str(torch_cache),
            "NEURON_EXT_CACHE_DIR": str(cache),
            **environment,
        },
        name=name,
    )
    return float(seconds), time.perf_counter() - start


def _with_bytecode(folder: Path) -> dict[str, str]:
    """Python keeps bytecode in ``folder``, whatever the environment says of it."""
    return {"PYTHONPYCACHEPREFIX": str(folder), "PYTHONDONTWRITEBYTECODE": ""}


@contextlib.contextmanager
def _folder(what: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"benchmark-{what}-") as folder:
        yield Path(folder)


# ------------------------------------------------------------------------- in a process of its own


def time_trace(name: str) -> float:
    """Seconds that ``trace`` takes."""
    import neuron_ext

    model, inputs = models.build(name)
    start = time.perf_counter()
    neuron_ext.trace(model, inputs, compiler="inductor")
    return time.perf_counter() - start


QUESTIONS = {"startup.import": import_time, "startup.trace_again": trace_again}
