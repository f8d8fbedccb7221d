"""Whether answers stay right when everything happens at once, with the models of the suite."""

from __future__ import annotations

from benchmarks.harness.measure import in_new_process, rows_of
from benchmarks.harness.options import Options
from benchmarks.harness.table import Table
from benchmarks.models import traced

THREADS = 16
WRONG, REQUESTS = "wrong answers", "requests"


def concurrency(options: Options) -> list[Table]:
    """A table for each model: how many of the answers were not those of one thread alone."""
    tables = []
    for name in ("mlp", "resnet50", "bert"):
        if not options.takes(name):
            continue
        found = in_new_process(
            "benchmarks.questions.concurrency:measure",
            model=name,
            file=str(traced(name, options)),
            seconds=4 * options.window,
        )
        values = {WRONG: [float(found["wrong"])], REQUESTS: [float(found["requests"])]}
        tables.append(
            Table(
                f"concurrency.{name}",
                f"{name}: wrong answers of {THREADS} threads during moves",
                "",
                "lower",
                REQUESTS,
                WRONG,
                rows_of(values, reference=REQUESTS),
                must=0.0,
                aim=0.0,
                notes=[
                    "Each thread has inputs of its own and compares every answer, bit by bit, with "
                    "the one that it got alone.",
                    f"Meanwhile one thread moved the module {found['moves']} times: from core to "
                    "core, onto all cores, and off them.",
                ],
                compare="value",
            )
        )
    return tables


def measure(model: str, file: str, seconds: float) -> dict[str, int]:
    """Requests, wrong answers and moves within ``seconds``, in this process."""
    import threading
    import time

    import torch

    import neuron_ext
    from benchmarks.models import build

    _, example = build(model)
    module = torch.jit.load(file)

    def changed(tensor: torch.Tensor, index: int) -> torch.Tensor:
        """Of the same range: token ids in another order."""
        if tensor.is_floating_point():
            return tensor + index * 0.01
        return tensor.roll(index, -1)

    inputs = [[changed(one, index) for one in example] for index in range(THREADS)]
    expected = [module(*one) for one in inputs]
    end = time.monotonic() + seconds
    requests, wrong, moves, errors = [0] * THREADS, [0] * THREADS, [0], []

    def caller(index: int) -> None:
        try:
            while time.monotonic() < end:
                wrong[index] += not torch.equal(module(*inputs[index]), expected[index])
                requests[index] += 1
        except Exception as error:
            errors.append(error)

    def mover() -> None:
        try:
            while time.monotonic() < end:
                neuron_ext.set_neuron_cores(module, moves[0] % neuron_ext.visible_core_count())
                neuron_ext.set_multicore(module)
                neuron_ext.unload(module)
                moves[0] += 3
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=caller, args=(index,)) for index in range(THREADS)]
    threads.append(threading.Thread(target=mover))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {"requests": sum(requests), "wrong": sum(wrong), "moves": moves[0]}


QUESTIONS = {"concurrency": concurrency}
