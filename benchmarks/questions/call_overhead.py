"""What a call costs beside its computation: ``2*x+y`` on 3 floats, from Python and from C++."""

from __future__ import annotations

import json
import os
import subprocess
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import in_new_process, rounds_of, rows_of
from benchmarks.harness.options import Options, Question
from benchmarks.harness.table import Table
from benchmarks.models import source_digest, traced
from benchmarks.native import build_native

LOADED, NOOP = "neuron_ext, loaded", "no-op custom op"
EAGER, FROZEN = "eager", "torch.jit, frozen"
CALLS = 5000
# Microseconds need more rounds than seconds do, and cost less.
ROUNDS = 5


def from_python(options: Options) -> Table:
    """Through a loaded ScriptModule, against the same module around an op that does nothing."""
    values = in_new_process(
        "benchmarks.questions.call_overhead:measure_python",
        file=str(traced("affine", options)),
        library=str(build_native(options) / "libnoop_op.so"),
        rounds=ROUNDS * options.rounds,
    )
    return Table(
        question="call_overhead.python",
        title="2*x+y on 3 floats: a call from Python, against the same module with a no-op",
        unit="us",
        better="lower",
        reference=NOOP,
        subject=LOADED,
        rows=rows_of(values, reference=NOOP),
        must=1.5,
        aim=1.25,
        notes=[
            "The no-op has the same signature and stands in the same TorchScript; it returns its "
            "first input. The others compute.",
            f"Each value is the mean of {CALLS} calls of one thread.",
        ],
    )


def measure_python(file: str, library: str, rounds: int) -> dict[str, list[float]]:
    """Microseconds per call, round by round, in this process."""
    import torch

    import neuron_ext
    from benchmarks.models import build

    eager, (x, y) = build("affine")
    loaded = torch.jit.load(file)
    neuron_ext.wait(loaded)
    calls: dict[str, Callable[..., torch.Tensor]] = {
        LOADED: loaded,
        NOOP: noop_module(loaded, library),
        EAGER: eager,
        FROZEN: torch.jit.freeze(torch.jit.trace(eager, (x, y)).eval()),
    }
    subjects = {}
    for name, call in calls.items():
        expected = x if name == NOOP else eager(x, y)
        for _ in range(3):
            if not torch.allclose(call(x, y), expected):
                raise RuntimeError(f"{name} gives a wrong answer")
        timer = timeit.Timer("call(x, y)", globals={"call": call, "x": x, "y": y})
        subjects[name] = partial(_microseconds, timer)
    return rounds_of(subjects, rounds)


def _microseconds(timer: timeit.Timer) -> float:
    return timer.timeit(CALLS) / CALLS * 1e6


def noop_module(loaded: Any, library: str) -> Any:
    """The ScriptModule ``loaded``, with the no-op in the place of this package's op and class."""
    import torch

    torch.ops.load_library(library)
    source = loaded.code.replace("ops.neuron_ext.forward", "torch.ops.neuron_bench.noop")
    if source == loaded.code:
        raise RuntimeError(f"a traced module no longer calls neuron_ext::forward:\n{loaded.code}")
    shell = torch.nn.Module()
    shell.subgraph = torch.classes.neuron_bench.Holder()
    module = torch.jit.script(shell)
    module.define(source)
    return module.eval()


def from_cpp(options: Options) -> Table:
    """The loaded module from C++, against AOTInductor's runner on the same native code."""
    import neuron_ext

    programs = build_native(options)
    folder = options.workdir / "call_overhead" / source_digest()
    files = [folder / name for name in ("affine.pt", "noop.pt", "model.so")]
    if not all(file.exists() for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        in_new_process(
            "benchmarks.questions.call_overhead:make_files",
            folder=str(folder),
            library=str(programs / "libnoop_op.so"),
        )
    done = subprocess.run(
        [
            programs / "call_overhead",
            Path(neuron_ext.__file__).parent / "lib" / "libneuron_ext.so",
            programs / "libnoop_op.so",
            *files,
            str(ROUNDS * options.rounds),
            str(CALLS),
        ],
        # The native code would wake a second thread for 3 floats, where OpenMP has one.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"call_overhead ended with status {done.returncode}:\n{done.stderr}")
    runner = "C++ runner"
    return Table(
        question="call_overhead.cpp",
        title="2*x+y on 3 floats: a call from C++, above AOTInductor's C++ runner",
        unit="us",
        better="lower",
        reference=runner,
        subject=LOADED,
        rows=rows_of(json.loads(done.stdout), reference=runner, compare="difference"),
        must=1.5,
        aim=0.5,
        notes=[
            "All four are called from one C++ program without Python; the runner has the same "
            "native code. 'op alone' is the custom op without the TorchScript around it; 'no-op "
            "module' is TorchScript around an op that does nothing.",
            f"Each value is the mean of {CALLS} calls of one thread. The program runs with "
            "OMP_NUM_THREADS=1: this package computes with one thread on a core of one CPU anyway, "
            "and the runner would use two.",
        ],
        compare="difference",
    )


def make_files(folder: str, library: str) -> None:
    """The traced module, the module with the no-op, and the native code by itself."""
    import torch

    from benchmarks.models import trace_to

    file = Path(folder, "affine.pt")
    trace_to("affine", str(file), "", compiler_workdir=folder)
    torch.jit.save(noop_module(torch.jit.load(file), library), Path(folder, "noop.pt"))


QUESTIONS: dict[str, Question] = {
    "call_overhead.python": from_python,
    "call_overhead.cpp": from_cpp,
}
