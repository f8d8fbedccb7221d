"""``python -m stress.subjects.constrained MODELS WHAT [LIMIT]`` works under a limit that it sets.

It prints ``ok``, or ``error``, the type and the text of the first error. Anything else is a crash.
"""

from __future__ import annotations

import copy
import io
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

import neuron_ext
from stress.harness import nets


def main(models: str, what: str, *numbers: str) -> None:
    """Does the work; ``numbers`` is the limit, if ``what`` has one."""
    limit = int(numbers[0]) if numbers else 0
    work: Callable[[str], None] = _use_everything
    if what == "files":
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    elif what == "few files":
        # As many as are open, and some.
        limit += len(list(Path("/proc/self/fd").iterdir()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    elif what == "file size":
        # Without the hard limit, so that what is said in the end can be written.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    elif what == "memory":
        work = _load_large
        _limit_memory(limit)
    elif what == "little memory":
        # What compiles itself at its first run, in oneDNN, crashes for want of memory, and so does
        # glibc where a new thread has none: what is looked at is another load and move.
        _use_everything(models)
        work = _take_memory
        _limit_memory(limit + 1)
        _hoard(limit)
    elif what == "trace":
        work = _trace
    elif what == "large file":
        _make_large(models)
        return
    elif what != "nothing":
        raise SystemExit(f"{what!r} is no limit")
    try:
        work(models)
        said = "ok"
    except (RuntimeError, MemoryError, OSError) as error:
        said = f"error {type(error).__name__} {error}".replace("\n", " ")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print(said, flush=True)


def _limit_memory(megabytes: int) -> None:
    """Address space: what is mapped now, and so much more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _check(module: torch.nn.Module, x: torch.Tensor = nets.EXAMPLE) -> None:
    answer = module(x)
    if not torch.equal(answer, nets.expected(x)):
        print("wrong", answer.tolist(), flush=True)
        raise SystemExit(9)


def _use_everything(models: str) -> None:
    module = torch.jit.load(f"{models}/native.pt")
    _check(module)
    neuron_ext.set_multicore(module)
    failures: list[BaseException] = []

    def body() -> None:
        try:
            for _ in range(20):
                _check(module)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=body) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    neuron_ext.async_load(module)
    buffer = io.BytesIO()
    nets.save(module, buffer)
    for _ in range(5):
        loaded = torch.jit.load(io.BytesIO(buffer.getvalue()))
        neuron_ext.wait(loaded)
        _check(copy.deepcopy(loaded))
    batches = torch.jit.load(f"{models}/portable.pt")
    neuron_ext.dynamic_batch(batches)
    _check(neuron_ext.DataParallel(batches), nets.numbered(3, 21))
    weights = torch.jit.load(f"{models}/weights.pt")
    neuron_ext.replace_weights(weights, nets.Net(0).state_dict())
    _check(weights)


_hoarded: list[bytes] = []


def _hoard(megabytes: int) -> None:
    """Takes what the allocator can still give, but for so much."""
    for size in (1 << 20, 250_000, 60_000):
        while True:
            try:
                _hoarded.append(bytes(size))
            except MemoryError:
                break
    del _hoarded[:megabytes]


def _take_memory(models: str) -> None:
    """Loads and moves what it keeps, until there is no memory or a lot is loaded."""
    kept = []
    for i in range(40):
        for name in ("native", "portable", "weights"):
            kept.append(torch.jit.load(f"{models}/{name}.pt"))
            neuron_ext.set_neuron_cores(kept[-1], i % 4, 1)
            neuron_ext.set_multicore(kept[-1])
            kept.append(copy.deepcopy(kept[-1]))
            _check(kept[-1])
            _check(kept[-2])


def _trace(_models: str) -> None:
    _check(neuron_ext.trace(nets.Net().eval(), nets.EXAMPLE, compiler="inductor"))


class _Large(torch.nn.Module):
    """Some 100 MB of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(5200, 5000), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


def _make_large(models: str) -> None:
    traced = neuron_ext.trace(_Large().eval(), torch.ones(1, 5000), compiler="torchscript")
    nets.save(traced, f"{models}/large.pt")


def _load_large(models: str) -> None:
    module = torch.jit.load(f"{models}/large.pt")
    neuron_ext.set_multicore(module)
    answer = module(torch.ones(1, 5000))
    if not torch.equal(answer, torch.full((1, 5200), 5000.0)):
        print("wrong", flush=True)
        raise SystemExit(9)


if __name__ == "__main__":
    main(*sys.argv[1:])
