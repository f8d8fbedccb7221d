"""A part that stays on the CPU, as frozen TorchScript.

It is written as source, since a trace would fix numbers that depend on data, as the sizes of what
``nonzero`` gives.
"""

from __future__ import annotations

import importlib
import keyword
import math
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch.fx.node import Node
from torch.jit._recursive import wrap_cpp_module

from neuron_ext.compiler.torchscript import constant_outputs
from neuron_ext.partition.exported import name_of, results_of

_INFIX: dict[Any, str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.truediv: "/",
    operator.mod: "%",
    operator.pow: "**",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.and_: "and",
    operator.or_: "or",
}
_PREFIX: dict[Any, str] = {
    operator.neg: "-",
    operator.not_: "not ",
    torch.sym_not: "not ",
    torch.sym_float: "float",
    torch.sym_int: "int",
    torch.sym_max: "max",
    torch.sym_min: "min",
    math.trunc: "int",
    math.ceil: "math.ceil",
    math.floor: "math.floor",
    round: "round",
}
_METHODS = {
    "aten::sym_size": "size",
    "aten::sym_stride": "stride",
    "aten::sym_numel": "numel",
    "aten::sym_storage_offset": "storage_offset",
}
_SYMBOLS = {torch.SymInt: "int", torch.SymFloat: "float", torch.SymBool: "bool"}


class UnwritableError(Exception):
    """A node that TorchScript has no words for; the text says which."""


def script_part(module: torch.fx.GraphModule) -> Any:
    """The frozen ScriptModule of a part; it takes and returns what ``module`` does.

    Its results share no memory with its constants. Weights are not copied.

    Raises:
        UnwritableError: if TorchScript cannot do it.
    """
    graph = _without_wrapped_operators(module)
    frozen = _freeze(module, graph, frozenset())
    shared = constant_outputs(frozen)
    return _freeze(module, graph, shared) if shared else frozen


def _without_wrapped_operators(module: torch.fx.GraphModule) -> torch.fx.Graph:
    """Custom operators that change their arguments, which export has wrapped, become calls on
    copies of these.
    """
    if any(isinstance(n.target, torch._ops.HigherOrderOperator) for n in module.graph.nodes):
        passes: Any = importlib.import_module("torch._inductor.fx_passes.post_grad")
        passes.decompose_auto_functionalized(module.graph)
    return module.graph


def _freeze(module: torch.fx.GraphModule, graph: torch.fx.Graph, copied: Collection[int]) -> Any:
    writer = _Writer(graph, copied)
    source = writer.source()
    shell = type(type(module).__name__, (torch.nn.Module,), {"__module__": "neuron_ext.traced"})()
    for name, target in writer.weights.items():
        value = operator.attrgetter(target)(module)
        shell.register_buffer(name, value.detach())
    script: Any = torch.jit.script(shell.eval())
    try:
        script._c._define(script._concrete_type, source, {"torch": torch, "math": math}.get)
        # As PyTorch computes it: folding a batch norm, say, would change the last bits.
        frozen: Any = torch.jit.freeze(script.eval(), optimize_numerics=False)
    except RuntimeError as error:
        raise UnwritableError(f"TorchScript does not accept it: {error}") from error
    # With its type, so that a module that holds it can be scripted.
    return wrap_cpp_module(frozen._c)  # type: ignore[no-untyped-call]


class _Writer:
    """Writes the ``forward`` of one part. Used once."""

    def __init__(self, graph: torch.fx.Graph, copied: Collection[int]) -> None:
        self.weights: dict[str, str] = {}
        self._graph = graph
        self._copied = copied
        self._names: dict[Node, str] = {}
        self._lines: list[str] = []

    def source(self) -> str:
        arguments = []
        for node in self._graph.nodes:
            if node.op == "placeholder":
                name, kind = self._name(node), _script_type(node)
                arguments.append(f", {name}: {kind}")
                if kind == "Tensor":
                    # Not `with torch.no_grad()`: that is a class of the file's own in TorchScript,
                    # and a frozen module that outlives the loaded one crashes where it enters it.
                    self._lines.append(f"{name} = {name}.detach()")
            elif node.op == "get_attr":
                name = f"weight_{len(self.weights)}"
                self.weights[name] = str(node.target)
                self._names[node] = f"self.{name}"
            elif node.op == "call_function":
                self._write(node)
        results = results_of(self._graph)
        kinds = ", ".join(map(_script_type, results))
        values = ""
        for i, node in enumerate(results):
            name = self._names[node]
            values += f"torch.empty_like({name}).copy_({name})" if i in self._copied else name
            values += ", "
        body = "".join(f"    {line}\n" for line in self._lines)
        head = f"def forward(self{''.join(arguments)}) -> Tuple[{kinds or '()'}]:"
        return f"{head}\n{body}    return ({values})\n"

    def _name(self, node: Node) -> str:
        return self._names.setdefault(node, f"v{len(self._names)}")

    def _write(self, node: Node) -> None:
        if name_of(node) == "aten::_assert_scalar":
            condition, text = map(self._literal, node.args)
            self._lines.append(f"if not {condition}:")
            self._lines.append(f"    torch.ops.neuron_ext.refuse({text})")
            return
        call = self._call(node)
        returns = getattr(getattr(node.target, "_schema", None), "returns", (None,))
        self._lines.append(f"{self._name(node)} = {call}" if len(returns) else call)

    def _call(self, node: Node) -> str:
        target, args = node.target, node.args
        if target is operator.getitem:
            return f"{self._literal(args[0])}[{self._literal(args[1])}]"
        if target in _INFIX:
            return f"({self._literal(args[0])} {_INFIX[target]} {self._literal(args[1])})"
        if target in _PREFIX:
            return f"({_PREFIX[target]}({', '.join(map(self._literal, args))}))"
        name = name_of(node)
        if name in _METHODS:
            method = ", ".join(self._literal(one) for one in args[1:])
            return f"{self._literal(args[0])}.{_METHODS[name]}({method})"
        if name in ("aten::item", "aten::_local_scalar_dense"):
            # The operator's own result is a number of no certain type.
            return f"{_script_type(node)}({self._literal(args[0])})"
        if not isinstance(target, torch._ops.OpOverload):
            raise UnwritableError(f"{name or target} has no counterpart in TorchScript")
        return self._operator(node, target, name)

    def _operator(self, node: Node, target: Any, name: str) -> str:
        kinds = {one.name: one.type for one in target._schema.arguments}
        order = list(kinds.values())
        words = [self._literal(v, order[i]) for i, v in enumerate(node.args)]
        for key, value in node.kwargs.items():
            if keyword.iskeyword(key):
                raise UnwritableError(f"{name} takes the argument {key!r}, a word of TorchScript")
            words.append(f"{key}={self._literal(value, kinds[key])}")
        # A view was possible with the strides of the example; others may come.
        if str(target) in ("aten.view.default", "aten._unsafe_view.default"):
            name = "aten::reshape"
        space, _, base = name.partition("::")
        return f"torch.ops.{space}.{base}({', '.join(words)})"

    def _literal(self, value: Any, kind: Any = None) -> str:
        while isinstance(kind, torch._C.OptionalType) and value is not None:
            kind = kind.getElementType()
        if isinstance(value, Node):
            name = self._names[value]
            wants_float = isinstance(kind, torch._C.FloatType)
            return f"float({name})" if wants_float and _script_type(value) == "int" else name
        if isinstance(value, (list, tuple)):
            inner = kind.getElementType() if isinstance(kind, torch._C.ListType) else None
            items = f"[{', '.join(self._literal(one, inner) for one in value)}]"
            if value and not any(isinstance(one, Node) for one in value):
                return items
            # Where TorchScript could guess the type of the elements wrongly.
            return f"torch.jit.annotate({_annotation(kind)}, {items})" if kind else items
        if isinstance(value, complex):
            return f"complex({self._literal(value.real)}, {self._literal(value.imag)})"
        if isinstance(value, (bool, str)) or value is None:
            return repr(value)
        if isinstance(value, (int, float)):
            number = float(value) if isinstance(kind, torch._C.FloatType) else value
            return repr(number) if math.isfinite(number) else f"float('{number}')"
        if isinstance(value, torch.device):
            return f"torch.device({str(value)!r})"
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        raise UnwritableError(f"{value!r} has no counterpart in TorchScript")


def _annotation(kind: Any) -> str:
    """A type of a schema, as TorchScript's source spells it."""
    return str(kind.annotation_str)


def _script_type(node: Node) -> str:
    return _SYMBOLS.get(type(node.meta.get("val")), "Tensor")
