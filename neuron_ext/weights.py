"""Weights and state that stand in a traced module as tensors of their own.

`replace_weights` and `move_trace_to_device` behave as the pages "Weight Replacement API" and
"Tracing API" of the Neuron documentation say; ``docs/weights_and_state.md`` has the rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from neuron_ext._library import ops
from neuron_ext.data_parallel import DataParallel
from neuron_ext.placement import set_neuron_cores
from neuron_ext.status import visible_core_count


def replace_weights(
    neuron_model: torch.nn.Module, weights: torch.nn.Module | Mapping[str, torch.Tensor]
) -> None:
    """Copies new weights into a module traced with ``inline_weights_to_neff=False``, in place.

    Each call of a traced module sees the old weights or the new ones, never some of each; this
    waits for calls under way. It costs what copying the tensors costs. Copies of the module keep
    their own weights. Thread-safe; other threads run meanwhile.

    Args:
        neuron_model: a traced module, or any module with traced modules in it.
        weights: a model like the one that was traced, or its state dict. Names are those in the
            state dict of ``neuron_model``, and each separated weight must be there (once, where
            several names are tied), in its own shape and dtype and on the CPU. State tensors of
            ``input_output_aliases`` may be there, and stay as they are.

    Raises:
        ValueError: for missing and unexpected names, shapes and dtypes; the text lists them all.
            Nothing has been replaced then.

    Warns:
        UserWarning: ``neuron_model`` has no separated weights. Nothing is done then.
    """
    if isinstance(weights, torch.nn.Module):
        weights = weights.state_dict()
    elif not isinstance(weights, Mapping):
        raise ValueError(
            f"weights is of type {type(weights).__name__}; expected a torch.nn.Module, or a dict "
            "from names to tensors such as its state_dict()"
        )
    named: Mapping[Any, Any] = weights
    for name, tensor in named.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"weights has {name!r}: an object of type {type(tensor).__name__}; expected "
                "names and tensors, as in a state_dict()"
            )
    # A dict of its own: a state dict is one with attributes, which the op does not take.
    if not ops.replace_weights(_scripted_parts(neuron_model), dict(weights)):
        warnings.warn(
            "this module has no separated weights, so none were replaced; trace it with "
            "inline_weights_to_neff=False",
            stacklevel=2,
        )


def reset_state(trace: torch.nn.Module) -> None:
    """Puts the initial values back into the state of a module traced with ``input_output_aliases``.

    All of it at once, between two calls; waits for the calls before it. A module without state is
    left alone. Thread-safe; other threads run meanwhile.

    Args:
        trace: a traced module, or any module with traced modules in it.

    Raises:
        ValueError: ``trace`` is no module, or somebody put a tensor of another shape or dtype in
            the place of a state.
    """
    ops.reset_state(_scripted_parts(trace))


def move_trace_to_device(trace: torch.nn.Module, device_id: int) -> None:
    """Moves a traced module to one NeuronCore, live, as `set_neuron_cores` with one core does.

    On the host runtime weights are in the memory of every core already; nothing else is moved.

    Args:
        trace: a module with traced subgraphs; one without any is left alone.
        device_id: the core, counted from 0 among those visible to this process.

    Raises:
        ValueError: ``device_id`` is no int, or no such core is visible.
        RuntimeError: as `set_neuron_cores`.
    """
    if type(device_id) is not int or device_id < 0:
        cores = visible_core_count()
        raise ValueError(
            f"device_id={device_id!r} is not a core: this process sees {cores} cores "
            f"(0-{cores - 1}); use the int of one"
        )
    set_neuron_cores(trace, device_id, 1)


def _scripted_parts(module: torch.nn.Module) -> Any:
    """What the ops take for ``module``: a ScriptModule, or a tuple of the prefix of its names and a
    ScriptModule, and so on for each that a plain module holds.
    """
    if not isinstance(module, torch.nn.Module):
        raise ValueError(
            "expected a torch.jit.ScriptModule or another torch.nn.Module, got "
            f"{type(module).__name__}"
        )
    if isinstance(module, DataParallel):  # whose copies of the model hold the same tensors
        module = module.model
    # `_c`, since PyTorch never lets go of a ScriptModule that is itself passed to an operator.
    if isinstance(module, torch.jit.ScriptModule):
        return module._c
    parts: list[Any] = []
    for name, child in module.named_modules(remove_duplicate=False):
        inner = any(name.startswith(prefix) for prefix in parts[::2])
        if isinstance(child, torch.jit.ScriptModule) and not inner:
            parts += [f"{name}.", child._c]
    return tuple(parts) or None
