"""``DataParallel``: one module on many NeuronCores, one batch cut among them.

Behaves as the "PyTorch NeuronX DataParallel API" page of the Neuron documentation says;
``docs/data_parallel.md`` has the details.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch

from neuron_ext._library import ops

_NAMED_CORE = re.compile(r"nc:(\d+)")


class DataParallel(torch.nn.Module):
    """A module with the ``forward`` of ``model``, which computes on several NeuronCores at once.

    Tensors, at any depth of tuples, lists and dicts, are cut along ``dim``; the chunks are computed
    on all the cores, without Python, and their outputs joined in order. Arguments that are no
    tensors, and tensors of rank 0, go to every chunk. Outputs of rank 0 come as one vector with an
    element for each chunk, where there is more than one; values that are no tensors have to be the
    same in each.

    ``model`` itself moves to the first run of consecutive cores; for further runs there are copies,
    which share its code and its tensors. A lazy model is loaded here, an async one in the
    background.

    With dynamic batching a batch may have any size, also 0. It is enabled where every input and
    output of every subgraph has the batch as dimension 0, or, for another ``dim``, where ``model``
    is a traced module all of whose inputs and outputs have one size in ``dim``. Without it, the
    size of each chunk must be what was traced.

    Thread-safe: any number of threads may call it. ``torch.jit.save`` saves it as a ScriptModule,
    which runs wherever the library is loaded.

    Args:
        model: a traced module, a ScriptModule with traced modules in it, or a plain module of such,
            which ``torch.jit.script`` has to accept.
        device_ids: cores as ints or as ``"nc:3"``, counted among those visible to this process;
            None takes all of them.
        dim: the dimension to cut and to join; negative counts from the last.
        set_dynamic_batching: whether to enable dynamic batching.

    Raises:
        ValueError: ``device_ids`` is empty, repeats a core or names one that is not there, or
            ``model`` is no module. When called: inputs that do not fit the model, or that differ in
            the size of ``dim``.
        RuntimeError: a load failed; ``model`` then is where it was. When called: an inference
            failed; the text names the chunk and the core. No chunk runs any more then.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        device_ids: Sequence[int | str] | None = None,
        dim: int = 0,
        set_dynamic_batching: bool = True,
    ) -> None:
        super().__init__()
        for name, value, kind in (
            ("dim", dim, int),
            ("set_dynamic_batching", set_dynamic_batching, bool),
        ):
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
        cores = None if device_ids is None else _core_numbers(device_ids)
        made = ops.make_parallel(_scripted(model)._c, cores, dim, set_dynamic_batching)
        self._parallel: Any = torch.jit._recursive.wrap_cpp_module(made)  # type: ignore[no-untyped-call]
        self._rows: int | None = None
        self.training = False

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Compute one batch; takes and returns what ``forward`` of the model does."""
        try:
            result = self._parallel(*inputs, **named)
        except RuntimeError as error:
            cause = ops.take_cause(str(error))
            # What the op did not raise, PyTorch did, when it matched the arguments.
            text, callers_fault = cause if cause is not None else (str(error), True)
            raise (ValueError if callers_fault else RuntimeError)(text) from None
        first = inputs[0] if inputs else next(iter(named.values()), None)
        if isinstance(first, torch.Tensor) and first.dim() > 0:
            self._rows = first.shape[self.dim]
        return result

    @property
    def device_ids(self) -> list[int]:
        """The cores, as given."""
        return list(self._parallel.device_ids)

    @property
    def dim(self) -> int:
        """The dimension that is cut and joined."""
        return int(self._parallel.dim)

    @property
    def num_workers(self) -> int:
        """How many threads work on one call, the calling one included; twice the number of cores
        unless it is set. More than twice the visible cores, of all calls together, make no
        difference.
        """
        return int(self._parallel.num_workers)

    @num_workers.setter
    def num_workers(self, count: int) -> None:
        self._parallel.num_workers = _positive("num_workers", count)

    @property
    def split_size(self) -> int | None:
        """Rows of one chunk. Unless it is set: the size of the batch divided by the number of
        cores, at least 1, and with dynamic batching rounded up to whole inferences; what it was for
        the last batch whose first input is a tensor, None before.
        """
        own = self._parallel
        if own.split_size > 0 or self._rows is None:
            return int(own.split_size) or None
        size = max(1, self._rows // len(own.device_ids))
        traced = int(own.traced_rows)
        if traced == 0:
            return size
        return -(-size // traced) * traced if own.dim == 0 else traced

    @split_size.setter
    def split_size(self, rows: int) -> None:
        self._parallel.split_size = _positive("split_size", rows)

    def disable_dynamic_batching(self) -> None:
        """Take only batches whose chunks have the size that was traced. Thread-safe."""
        ops.disable_dynamic_batching(self._parallel._c)

    @property
    def model(self) -> torch.jit.ScriptModule:
        """The model, as a ScriptModule."""
        return self._parallel.module  # type: ignore[no-any-return]

    @property
    def script_module(self) -> torch.jit.ScriptModule:
        """The ScriptModule that computes, for use in modules that are scripted. Its own errors are
        TorchScript's, always RuntimeError.
        """
        return self._parallel  # type: ignore[no-any-return]

    def save(self, f: str | os.PathLike[str], **options: Any) -> None:
        """Save as a ScriptModule; ``torch.jit.save`` calls this."""
        self._parallel.save(f, **options)

    def save_to_buffer(self, **options: Any) -> bytes:
        """The bytes of the saved ScriptModule; ``torch.jit.save`` calls this."""
        data: bytes = self._parallel.save_to_buffer(**options)
        return data


def _scripted(model: Any) -> Any:
    """``model`` as a ScriptModule, with the same subgraphs and tensors."""
    if isinstance(model, torch.jit.ScriptModule):
        return model
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            "DataParallel takes a torch.jit.ScriptModule or another torch.nn.Module, got "
            f"{type(model).__name__}"
        )
    try:
        return torch.jit.script(model)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be scripted, and DataParallel runs without Python: "
            f"{error}. Give a module that torch.jit.script accepts"
        ) from error


def _core_numbers(device_ids: Any) -> list[int]:
    if isinstance(device_ids, (str, bytes)) or not isinstance(device_ids, Sequence):
        raise ValueError(f"device_ids must be a list of ints or 'nc:#', got {device_ids!r}")
    return [_core_number(one) for one in device_ids]


def _core_number(device_id: Any) -> int:
    match = _NAMED_CORE.fullmatch(device_id) if isinstance(device_id, str) else None
    number = int(match[1]) if match is not None else device_id
    # An operator takes no more than 64 bits; which of these are there, it says itself.
    if not isinstance(number, int) or isinstance(number, bool) or abs(number) >= 2**63:
        raise ValueError(
            f"device_ids holds {device_id!r}; expected the number of a core, as an int such as 3 "
            "or a text such as 'nc:3'"
        )
    return number


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return value
