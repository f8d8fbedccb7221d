"""Writes the TorchScript of a module that `neuron_ext.compiler.script_module` makes."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from neuron_ext._structure import Const, Inputs, Leaf, Map, Node, Seq, named_type_key, script_type

# Not the home of the modules: a model and a named tuple may have one name.
_TUPLE_HOME = "neuron_ext.named_tuples"


class ScriptWriter:
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
            self._lines.append(f"{name} = {value}[{literal(part)}]")
            self._flatten(item, name, f"{path}[{part!r}]")

    def _check_keys(self, node: Map, value: str, path: str) -> None:
        wanted = f"expected the keys {list(node.keys)!r}"
        for key in node.keys:
            self._refuse_if(
                f"{literal(key)} not in {value}",
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
        text = f"{literal(before)} + str({shown}) + {literal(after)}"
        self._lines.append(f"    torch.ops.neuron_ext.refuse({text})")

    def _build(self, node: Node) -> str:
        if isinstance(node, Leaf):
            return f"_outputs[{node.index}]"
        if isinstance(node, Const):
            return literal(node.value)
        items = [self._build(item) for item in node.items]
        if isinstance(node, Map):
            pairs = ", ".join(
                f"{literal(key)}: {item}" for key, item in zip(node.keys, items, strict=True)
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
        kind.__module__ = _TUPLE_HOME + (f".variant{clashes}" if clashes else "")
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


def attribute(path: str) -> str:
    """An expression for an attribute of ``self`` at a path, whose parts need not be identifiers."""
    value = "self"
    for part in path.split("."):
        value = f"getattr({value}, {literal(part)})"
    return value


def literal(value: bool | int | float | str | None) -> str:
    """A constant as TorchScript writes it."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f"float('{value}')"
    return repr(value)
