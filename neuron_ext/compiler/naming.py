"""Names: of callables for messages and types, of their arguments for TorchScript."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

from neuron_ext._structure import usable


def callable_name(func: Callable[..., Any]) -> str:
    """A short name for a callable: of its class if a module, of the function under partials and
    methods.
    """
    while isinstance(func, functools.partial):
        func = func.func
    if isinstance(func, torch.jit.ScriptModule):
        return str(func.original_name)
    if isinstance(func, torch.nn.Module):
        return type(func).__name__
    if isinstance(func, types.MethodType):
        return f"{type(func.__self__).__name__}_{func.__name__}"
    name = getattr(func, "__name__", None) or type(func).__name__
    return "function" if name == "<lambda>" else str(name)


def argument_names(func: Callable[..., Any], count: int) -> tuple[str, ...]:
    """One usable, distinct TorchScript name per argument; ValueError if func does not take that
    many.
    """
    if count == 0:
        raise ValueError("example_inputs is empty; expected at least one tensor to trace with")
    found: list[str] = []
    forward = func.forward if isinstance(func, torch.nn.Module) else func
    schema = getattr(forward, "schema", None)
    if isinstance(schema, torch._C.FunctionSchema):
        found = [argument.name for argument in schema.arguments if argument.name != "self"]
    else:
        try:
            signature = inspect.signature(forward)
        except (TypeError, ValueError):  # some builtins have none
            signature = None
        if signature is not None:
            try:
                signature.bind(*range(count))
            except TypeError as error:
                raise ValueError(
                    f"example_inputs holds {count} argument(s), which func does not take: "
                    f"{error}; func is called as func{signature}. Pass a tuple with one item per "
                    "argument"
                ) from error
            positional = (
                inspect.Parameter.POSITIONAL_ONLY,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
            )
            found = [name for name, one in signature.parameters.items() if one.kind in positional]
    names: list[str] = []
    for i in range(count):
        name = found[i] if i < len(found) else ""
        names.append(
            name
            if usable(name) and name not in names
            else _free_name(f"input_{i}", {*found, *names})
        )
    return tuple(names)


def _free_name(wanted: str, taken: set[str]) -> str:
    while wanted in taken:
        wanted += "_"
    return wanted
