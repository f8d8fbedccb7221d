"""Finds the subgraphs of a module."""

from __future__ import annotations

from typing import Any

import torch

from neuron_ext._library import ops


def holder(module: torch.nn.Module) -> Any:
    """What the ops take for ``module``: they find its subgraphs themselves, each once, in the order
    of attributes.

    They look into ScriptModules (submodules, attributes, containers, and the constants of frozen
    graphs); through plain modules, the ScriptModules in them are found here.

    Raises:
        ValueError: ``module`` is no ``torch.nn.Module``.
    """
    if not isinstance(module, torch.nn.Module):
        raise ValueError(
            "expected a torch.jit.ScriptModule or another torch.nn.Module, got "
            f"{type(module).__name__}"
        )
    # `_c`, since PyTorch never lets go of a ScriptModule that is itself passed to an operator.
    if isinstance(module, torch.jit.ScriptModule):
        return module._c
    found = [
        subgraph
        for child in module.modules()
        if isinstance(child, torch.jit.ScriptModule)
        for subgraph in ops.subgraphs(child._c)
    ]
    # An operator knows no type for an empty list.
    return found or None


def find_subgraphs(module: torch.nn.Module) -> list[Any]:
    """Every ``NeuronSubgraph`` in ``module``, as `holder` says. Raises what that raises."""
    return list(ops.subgraphs(holder(module)))
