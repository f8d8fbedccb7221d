"""The ScriptModule around a subgraph: its ``forward`` flattens the inputs and rebuilds the outputs.

The module holds one attribute, ``subgraph``, and one method, written as TorchScript source from the
trees of `neuron_ext._structure`. No Python is left in it: it loads wherever the library is loaded.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from neuron_ext._structure import Inputs, Node, identifier
from neuron_ext.compiler.held import HeldTensor, hold
from neuron_ext.compiler.script_source import ScriptWriter, attribute

# Shows in error messages and in saved files as the home of the types made here.
_TYPE_HOME = "neuron_ext.traced"


def build_script_module(
    name: str, subgraph: Any, inputs: Inputs, output: Node, held: Sequence[HeldTensor] = ()
) -> torch.jit.ScriptModule:
    """Make the ScriptModule of a trace, in eval state.

    Args:
        name: name of the type of the module; made into an identifier. Each call makes a type of its
            own, so that modules of one name can stand in one model.
        subgraph: the ``NeuronSubgraph``, or None to learn whether such a module can be made at all.
        inputs: structure of the call. Tensors go to ``neuron_ext::forward`` in its order.
        output: structure to make of the tensors that ``neuron_ext::forward`` returns.
        held: tensors that the module keeps and hands to ``neuron_ext::forward_held`` in this order.

    Raises:
        RuntimeError: if TorchScript does not accept the structure.

    Not safe from several threads at once: it changes the warning filters of the process meanwhile.
    """
    call = functools.partial(_call_subgraph, [one.name for one in held])
    return build_module(name, {"subgraph": subgraph}, inputs, output, call, held)


def _call_subgraph(held: Sequence[str], flat: Sequence[str]) -> list[str]:
    tensors = ", ".join(flat)
    if not held:
        return [f"_outputs = torch.ops.neuron_ext.forward([{tensors}], self.subgraph)"]
    own = ", ".join(attribute(name) for name in held)
    return [f"_outputs = torch.ops.neuron_ext.forward_held([{tensors}], [{own}], self.subgraph)"]


def build_module(
    name: str,
    attributes: Mapping[str, Any],
    inputs: Inputs,
    output: Node,
    call: Callable[[Sequence[str]], Sequence[str]],
    held: Sequence[HeldTensor] = (),
) -> torch.jit.ScriptModule:
    """`build_script_module` with other attributes, in their order, and another computation.

    ``call`` takes the names of the flat inputs in TorchScript, and returns the lines that make a
    list ``_outputs`` of the flat outputs.
    """
    writer = ScriptWriter(inputs, call)
    return define_module(name, attributes, writer.source(output), writer.named_tuples, held)


def define_module(
    name: str,
    attributes: Mapping[str, Any],
    source: str,
    named_tuples: Mapping[str, type],
    held: Sequence[HeldTensor] = (),
) -> torch.jit.ScriptModule:
    """Make a ScriptModule, in eval state, of its attributes and the source of its ``forward``.

    ``named_tuples`` are the classes that names in ``source`` stand for. See `build_script_module`.
    """
    # A type of its own for each trace: TorchScript shares types by Python class.
    kind = type(identifier(name), (torch.nn.Module,), {"__module__": _TYPE_HOME})
    shell = kind()
    for key, value in attributes.items():
        setattr(shell, key, value)
    hold(shell, held)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript warns of its own age at each step
        module = torch.jit.script(shell)
        _define(module, source, named_tuples)
    module.eval()
    return module  # type: ignore[no-any-return]


def _define(module: Any, source: str, named_tuples: Mapping[str, type]) -> None:
    """Add ``source`` to the module; names in it mean the named tuples and what TorchScript itself
    knows.
    """
    known: dict[str, Any] = {"torch": torch, "ValueError": ValueError, **named_tuples}
    try:
        module._c._define(module._concrete_type, source, known.get)
    except RuntimeError as error:
        raise RuntimeError(
            f"TorchScript does not accept the inputs and outputs of func: {error}. Wrap func in "
            "one that takes and returns tensors, or tuples of them"
        ) from error
