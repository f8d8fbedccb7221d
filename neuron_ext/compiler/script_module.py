"""The ScriptModule around a subgraph: its ``forward`` flattens the inputs and rebuilds the outputs.

The module holds one attribute, ``subgraph``, and one method, written as TorchScript source from the
trees of `neuron_ext._structure`. No Python is left in it: it loads wherever the library is loaded.
"""

from __future__ import annotations

import collections
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from neuron_ext._structure import (
    Const,
    Inputs,
    Leaf,
    Map,
    Node,
    Seq,
    identifier,
    named_type_key,
    script_type,
)
from neuron_ext.compiler.held import HeldTensor, hold

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
    own = ", ".join(_attribute(name) for name in held)
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
    writer = _Writer(inputs, call)
    source = writer.source(output)
    # A type of its own for each trace: TorchScript shares types by Python class.
    kind = type(identifier(name), (torch.nn.Module,), {"__module__": _TYPE_HOME})
    shell = kind()
    for key, value in attributes.items():
        setattr(shell, key, value)
    hold(shell, held)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript warns of its own age at each step
        module = torch.jit.script(shell)
        _define(module, source, writer.named_tuples)
    module.eval()
    return module  # type: ignore[no-any-return]


def _define(module: Any, source: str, named_tuples: dict[str, type]) -> None:
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


class _Writer:
    """Writes one ``forward``. Used once."""

    def __init__(
        self, inputs: Inputs, call: Callable[[Sequence[str]], Sequence[str]] = tuple
    ) -> None:
        self.named_tuples: dict[str, type] = {}
        self._inputs = inputs
        self._call = call
        self._lines: list[str] = []
        self._flat: list[str] = []
        # Argument names never begin with an underscore, so these cannot collide with them.
        self._fresh = (f"_v{i}" for i in range(1_000_000))

    def source(self, output: Node) -> str:
        arguments = [
            f"{name}: {script_type(node, self._tuple_type)}"
            for name, node in zip(self._inputs.names, self._inputs.nodes, strict=True)
        ]
        for name, node in zip(self._inputs.names, self._inputs.nodes, strict=True):
            self._flatten(node, name, name)
        self._lines += self._call(self._flat)
        result = self._build(output)
        self._lines.append(f"return {result}")
        body = "".join(f"    {line}\n" for line in self._lines)
        head = f"def forward({', '.join(['self', *arguments])})"
        return f"{head} -> {script_type(output, self._tuple_type)}:\n{body}"

    def _flatten(self, node: Node, value: str, path: str) -> None:
        if isinstance(node, Leaf):
            self._flat.append(value)
            return
        if isinstance(node, Const):
            raise AssertionError("an input is always a tensor")
        if isinstance(node, Map):
            self._check_keys(node, value, path)
            parts: Iterable[str | int] = node.keys
        else:
            if node.is_list:
                count = len(node.items)
                self._refuse_if(
                    f"len({value}) != {count}",
                    f"input {path}: expected a list of {count} element(s), got {{}}",
                    f"len({value})",
                )
            parts = range(len(node.items))
        for part, item in zip(parts, node.items, strict=True):
            name = next(self._fresh)
            self._lines.append(f"{name} = {value}[{_literal(part)}]")
            self._flatten(item, name, f"{path}[{part!r}]")

    def _check_keys(self, node: Map, value: str, path: str) -> None:
        wanted = f"expected the keys {list(node.keys)!r}"
        for key in node.keys:
            self._refuse_if(
                f"{_literal(key)} not in {value}",
                f"input {path}: the key {key!r} is missing; {wanted}, got {{}}",
                f"list({value}.keys())",
            )
        self._refuse_if(
            f"len({value}) != {len(node.keys)}",
            f"input {path}: there are keys too many; {wanted}, got {{}}",
            f"list({value}.keys())",
        )

    def _refuse_if(self, condition: str, message: str, shown: str) -> None:
        before, after = message.rsplit("{}", 1)
        self._lines.append(f"if {condition}:")
        # Not "raise": what TorchScript raises itself reaches Python as a torch.jit.Error, which is
        # no RuntimeError.
        text = f"{_literal(before)} + str({shown}) + {_literal(after)}"
        self._lines.append(f"    torch.ops.neuron_ext.refuse({text})")

    def _build(self, node: Node) -> str:
        if isinstance(node, Leaf):
            return f"_outputs[{node.index}]"
        if isinstance(node, Const):
            return _literal(node.value)
        items = [self._build(item) for item in node.items]
        if isinstance(node, Map):
            pairs = ", ".join(
                f"{_literal(key)}: {item}" for key, item in zip(node.keys, items, strict=True)
            )
            return f"{{{pairs}}}" if pairs else self._annotated(node, "{}")
        if node.is_list:
            return f"[{', '.join(items)}]" if items else self._annotated(node, "[]")
        if node.fields:
            return f"{self._tuple_type(node)}({', '.join(items)})"
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"

    def _annotated(self, node: Node, empty: str) -> str:
        return f"torch.jit.annotate({script_type(node, self._tuple_type)}, {empty})"

    def _tuple_type(self, node: Seq) -> str:
        """The name in this source of the NamedTuple class for a node."""
        kind = _named_tuple(node)
        for name, known in self.named_tuples.items():
            if known is kind:
                return name
        name = f"_Tuple{len(self.named_tuples)}"
        self.named_tuples[name] = kind
        return name


_named_tuples: dict[str, Any] = {}


def _named_tuple(node: Seq) -> Any:
    """One class for each kind of named tuple in the process: TorchScript lets no name stand for two
    types.
    """
    key = named_type_key(node)
    if key not in _named_tuples:
        fields = {
            field: _python_type(item) for field, item in zip(node.fields, node.items, strict=True)
        }
        make: Any = collections.namedtuple
        kind = make(node.name, node.fields)
        clashes = sum(other.__name__ == node.name for other in _named_tuples.values())
        kind.__module__ = _TYPE_HOME + (f".variant{clashes}" if clashes else "")
        kind.__annotations__ = fields
        _named_tuples[key] = kind
    return _named_tuples[key]


def _python_type(node: Node) -> Any:
    """The type of a node as a Python annotation."""
    if isinstance(node, Leaf):
        return torch.Tensor
    if isinstance(node, Const):
        return None if node.value is None else type(node.value)
    if isinstance(node, Map):
        key: Any = type(node.keys[0]) if node.keys else str
        return dict[key, _python_type(node.items[0]) if node.items else torch.Tensor]  # type: ignore[misc]
    if node.is_list:
        return list[_python_type(node.items[0]) if node.items else torch.Tensor]  # type: ignore[misc]
    if node.fields:
        return _named_tuple(node)
    return tuple[tuple(_python_type(item) for item in node.items)]  # type: ignore[misc]


def _attribute(path: str) -> str:
    """An expression for an attribute at a path, whose parts need not be identifiers."""
    value = "self"
    for part in path.split("."):
        value = f"getattr({value}, {_literal(part)})"
    return value


def _literal(value: bool | int | float | str | None) -> str:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f"float('{value}')"
    return repr(value)
