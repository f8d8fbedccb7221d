"""How long ``torch.jit.load`` takes: now, lazily, in the background, again, and four at once."""

from __future__ import annotations

import gc
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.harness.measure import in_new_process, rotated, rows_of
from benchmarks.harness.options import Options
from benchmarks.harness.table import Table
from benchmarks.questions import _saved_files as saved
from benchmarks.questions._resident import FRESH_PAGES

PLAIN = "plain ScriptModule, the same weights and no graph"
TRACED = "plain ScriptModule, by torch.jit.trace"
NOW = "neuron_ext"
AGAIN = "neuron_ext, the same file again"
LAZY = "neuron_ext, lazy"
ASYNC = "neuron_ext, async"
READY = "neuron_ext, async and waited for"

_NOTES = [
    "each round is a process of its own, since native code is mapped once per process; the files "
    "are in the page cache, every block of memory is fresh from the kernel, and what TorchScript "
    "does once in a process is done before",
]


def loading(options: Options) -> list[Table]:
    """One file, against a plain ScriptModule with the same weights."""
    name = "mlp" if options.quick else "bert"
    files = {
        "affine": models.traced("affine", options),
        "plain": saved.weights_alone(name, options),
        "traced": saved.plain(name, options),
        "now": models.traced(name, options),
        "lazy": saved.lazy(name, options),
        "background": saved.background(name, options),
    }
    for file in files.values():
        _into_page_cache(file)
    rounds = [
        in_new_process(
            f"{__name__}:load_each",
            environment=FRESH_PAGES,
            number=number,
            **{key: str(file) for key, file in files.items()},
        )
        for number in range(options.rounds)
    ]
    size = files["now"].stat().st_size / 1e6
    what = f"torch.jit.load of a {size:.0f} MB subgraph ({name})"
    tables = []
    for question, subject, title, must, aim in (
        ("loading.now", NOW, f"{what}, loaded when it returns", 1.5, 1.1),
        ("loading.lazy", LAZY, f"{what}, returning when lazy", 1.1, 1.0),
        ("loading.async", ASYNC, f"{what}, returning when async", 1.1, 1.0),
        ("loading.again", AGAIN, f"{what}, the second time in the process", 1.3, 1.05),
    ):
        shown = [PLAIN, TRACED, subject, *([READY] if subject == ASYNC else [])]
        values = {label: [one[label] for one in rounds] for label in shown}
        rows = rows_of(values, reference=PLAIN)
        tables.append(
            Table(question, title, "ms", "lower", PLAIN, subject, rows, must, aim, list(_NOTES))
        )
    return tables


def four_models(options: Options) -> Table:
    """The models of the diffusion pipeline: together, or one after another."""
    now = [models.traced(name, options) for name in models.DIFFUSION]
    lazy = [saved.lazy(name, options) for name in models.DIFFUSION]
    background = [saved.background(name, options) for name in models.DIFFUSION]
    affine = models.traced("affine", options)
    for file in (*now, *lazy, *background):
        _into_page_cache(file)
    one_by_one, together = "one after another", "async, until all are ready"
    subjects: dict[str, tuple[str, Sequence[Path]]] = {
        one_by_one: ("one_by_one", now),
        together: ("together", background),
        "in four threads": ("in_threads", now),
        "async, in four threads": ("in_threads", background),
        "lazy, until torch.jit.load has returned": ("one_by_one", lazy),
    }
    values: dict[str, list[float]] = {label: [] for label in subjects}
    for number in range(options.rounds):
        for label in rotated(list(subjects), number):
            how, files = subjects[label]
            took = in_new_process(
                f"{__name__}:load_four",
                environment=FRESH_PAGES,
                how=how,
                affine=str(affine),
                files=[str(file) for file in files],
            )
            values[label].append(took)
    sizes = [file.stat().st_size for file in now]
    size = sum(sizes) / 1e6
    return Table(
        "loading_four",
        f"the four models of the diffusion pipeline ({size:.0f} MB), until all are loaded",
        "ms",
        "lower",
        one_by_one,
        together,
        rows_of(values, reference=one_by_one),
        must=0.6,
        aim=0.52,
        notes=[
            *_NOTES,
            "torch.jit.load reads a file with the GIL held: no thread and no flag makes two such "
            "reads overlap, and the lazy row is what they take; only what neuron_ext does after "
            "them can run in parallel",
            f"the largest file has {max(sizes) / sum(sizes):.0%} of the bytes, and torch.jit.load "
            "reads a file in one thread: reads of all files at once would take as long as that one",
        ],
    )


def _into_page_cache(file: Path) -> None:
    with file.open("rb", buffering=0) as stream:
        while stream.read(1 << 24):
            pass


# ------------------------------------------------------------------------ in processes of their own


def load_each(
    affine: str, plain: str, traced: str, now: str, lazy: str, background: str, number: int
) -> dict[str, float]:
    """Milliseconds for each way to load; ``number`` decides where the peers come in the order."""
    _warm_up(affine, plain, traced)
    import neuron_ext

    values: dict[str, float] = {}

    def peer(label: str, file: str) -> Callable[[], None]:
        def measure() -> None:
            values[label] = _milliseconds(lambda: torch.jit.load(file))[0]

        return measure

    def ours() -> None:
        # In this order: the first load has to map the native code, which then stays.
        values[NOW], kept = _milliseconds(lambda: torch.jit.load(now))
        values[AGAIN] = _milliseconds(lambda: torch.jit.load(now))[0]
        del kept
        values[LAZY] = _milliseconds(lambda: torch.jit.load(lazy))[0]
        values[ASYNC], module = _milliseconds(lambda: torch.jit.load(background))
        start = time.perf_counter()
        neuron_ext.wait(module)
        values[READY] = values[ASYNC] + 1e3 * (time.perf_counter() - start)

    steps = {PLAIN: peer(PLAIN, plain), TRACED: peer(TRACED, traced), NOW: ours}
    for step in rotated(list(steps), number):
        steps[step]()
        gc.collect()
    return values


def load_four(how: str, affine: str, files: list[str]) -> float:
    """Milliseconds until all are loaded."""
    _warm_up(affine)
    loads = {"one_by_one": _one_by_one, "together": _together, "in_threads": _in_threads}
    return _milliseconds(lambda: loads[how](files))[0]


def _one_by_one(files: list[str]) -> list[Any]:
    return [torch.jit.load(file) for file in files]


def _together(files: list[str]) -> list[Any]:
    import neuron_ext

    loaded = _one_by_one(files)
    for module in loaded:
        neuron_ext.wait(module)
    return loaded


def _in_threads(files: list[str]) -> list[Any]:
    import neuron_ext

    loaded: list[Any] = []
    threads = [
        threading.Thread(target=lambda file=file: loaded.append(torch.jit.load(file)))
        for file in files
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for module in loaded:
        neuron_ext.wait(module)
    return loaded


def _warm_up(*files: str) -> None:
    """What happens once in a process: TorchScript's own preparations, and taking the cores."""
    warnings.simplefilter("ignore")
    import neuron_ext  # registers the class that the files hold

    neuron_ext.visible_core_count()
    for file in files:
        torch.jit.load(file)
    gc.collect()


def _milliseconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long it took, and its result, for the caller to drop when it likes."""
    gc.collect()
    start = time.perf_counter()
    result = call()
    return 1e3 * (time.perf_counter() - start), result


QUESTIONS = {"loading": loading, "loading_four": four_models}
