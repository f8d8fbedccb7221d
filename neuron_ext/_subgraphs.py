"""Finds the subgraphs of a module."""

from __future__ import annotations

from typing import Any

import torch

from neuron_ext._library import ops


def find_subgraphs(module: torch.nn.Module) -> list[Any]:
    """Every ``NeuronSubgraph`` in ``module``, each once, in the order of attributes.

    Looks into ScriptModules (submodules, attributes, containers, and the constants of frozen
    graphs), and through plain modules for the ScriptModules in them.

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
        return list(ops.subgraphs(module._c))
    found = [
        subgraph
        for child in module.modules()
        if isinstance(child, torch.jit.ScriptModule)
        for subgraph in ops.subgraphs(child._c)
    ]
    # Several ScriptModules may hold the same one, each under a wrapper of its own in Python.
    return list(ops.subgraphs(found)) if found else []
