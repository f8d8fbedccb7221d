"""Modules in a forked child of a process that had used NeuronCores.

The library refuses to run there. But a call would not always come that far: TorchScript's executor
takes a lock for each call, and the first look for an operator takes another. Where another thread
of the parent held it at the moment of the fork, the child would wait for ever, as with any
ScriptModule. So in such a child, calls from Python are refused before they enter TorchScript.
Everywhere else nothing is installed, and a call costs what it did.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from neuron_ext._library import ops
from neuron_ext._subgraphs import find_subgraphs
from neuron_ext.data_parallel import DataParallel


def watch_forks() -> None:
    """Has forked children of this process refuse modules with subgraphs, if it has used cores."""
    os.register_at_fork(before=_look_up_operators, after_in_child=_in_child)


@functools.cache
def _look_up_operators() -> None:
    """So that a child finds the operators of this package without the lock of their registry."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, operator = name.partition("::")
        if namespace == "neuron_ext":
            getattr(ops, operator.partition(".")[0])


def _in_child() -> None:
    try:
        ops.status(None)  # raises in the children of a process that had used cores, and only there
    except RuntimeError:
        _refuse_calls()


@functools.cache  # a child of the child has the hook already
def _refuse_calls() -> None:
    torch.nn.modules.module.register_module_forward_pre_hook(_refuse)
    # ``module.forward(...)`` and other methods, which pass no hook.
    call = torch._C.ScriptMethod.__call__

    def refuse_or_call(method: Any, *args: Any, **kwargs: Any) -> Any:
        if ops.subgraphs(method.owner):
            ops.status(None)
        return call(method, *args, **kwargs)

    torch._C.ScriptMethod.__call__ = refuse_or_call  # type: ignore[method-assign, assignment]


def _refuse(module: torch.nn.Module, _inputs: Any) -> None:
    if isinstance(module, (torch.jit.ScriptModule, DataParallel)) and find_subgraphs(module):
        ops.status(None)
