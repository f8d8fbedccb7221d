"""The files that the questions about loading, memory and size compare.

Beside a traced file stand files of what people would save instead, and copies with other flags.
Each is made in a process of its own at the first need, and kept.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks import models
from benchmarks.harness.measure import in_new_process
from benchmarks.harness.options import Options


def plain(name: str, options: Options) -> Path:
    """The model as ``torch.jit.trace`` makes it: a ScriptModule with the weights as parameters."""
    return _kept(models.traced(name, options), "plain", "save_plain", name=name)


def weights_alone(name: str, options: Options) -> Path:
    """A ScriptModule with the same parameters and buffers and nothing to compute: what
    ``torch.jit.load`` takes for the weights alone.
    """
    source = plain(name, options)
    return _kept(models.traced(name, options), "weights", "save_weights", source=str(source))


def separated(name: str, options: Options) -> Path:
    """The model traced with its weights as tensors in the module."""
    return _kept(models.traced(name, options), "separated", "save_separated", name=name)


def lazy(name: str, options: Options) -> Path:
    """The traced file with its lazy flag set."""
    source = models.traced(name, options)
    return _kept(source, "lazy", "save_flagged", source=str(source), flag="lazy_load")


def background(name: str, options: Options) -> Path:
    """The traced file with its async flag set."""
    source = models.traced(name, options)
    return _kept(source, "async", "save_flagged", source=str(source), flag="async_load")


def example_inputs(name: str, options: Options) -> Path:
    """The model's example inputs, as ``torch.save`` writes them."""
    return _kept(models.traced(name, options), "inputs", "save_inputs", name=name)


def weight_bytes(name: str, options: Options) -> int:
    """The bytes of the model's parameters and buffers, each storage once."""
    return int(in_new_process(f"{__name__}:count_weights", file=str(plain(name, options))))


def _kept(beside: Path, kind: str, function: str, **arguments: str) -> Path:
    """The file of that kind beside a traced file, made by ``function`` if it is not there."""
    file = beside.with_name(f"{beside.stem}-{kind}.pt")
    if not file.exists():
        part = file.with_name(f"{file.name}.{os.getpid()}")
        in_new_process(f"{__name__}:{function}", target=str(part), **arguments)
        os.replace(part, file)
    return file


# ------------------------------------------------------------------------ in processes of their own


def save_plain(target: str, name: str) -> None:
    model, inputs = models.build(name)
    with _quiet(), torch.no_grad():
        torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), target)


def save_separated(target: str, name: str) -> None:
    models.trace_to(name, target, "", inline_weights_to_neff=False)


def save_inputs(target: str, name: str) -> None:
    torch.save(models.build(name)[1], target)


class _Weights(torch.nn.Module):
    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        for number, tensor in enumerate(tensors):
            self.register_buffer(f"tensor{number}", tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def save_weights(target: str, source: str) -> None:
    with _quiet():
        module = torch.jit.load(source)
        alone = _Weights([*module.parameters(), *module.buffers()])
        torch.jit.save(torch.jit.script(alone), target)


def save_flagged(target: str, source: str, flag: str) -> None:
    import neuron_ext

    with _quiet():
        module = torch.jit.load(source)
        getattr(neuron_ext, flag)(module)
        torch.jit.save(module, target)


def count_weights(file: str) -> int:
    with _quiet():
        module = torch.jit.load(file)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(storages.values())


def _quiet() -> warnings.catch_warnings[None]:
    """Without torch's warnings of the age of ``torch.jit``."""
    return warnings.catch_warnings(action="ignore")
