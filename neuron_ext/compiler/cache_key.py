"""The key of the compile cache: one digest over all that native code depends on.

`compile_key` covers the exported program here (operators, arguments, literals, sub-graphs, shapes,
strides, and every byte of the weights), and the machine and the settings through
`cache_environment`. Both are first written out as JSON, in which nothing stands that Python hands
out by chance (addresses, file names, lines of code), so that two processes get the same text.

What is not known for certain to be complete in that form is not keyed: `NotKeyableError`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from neuron_ext.compiler.cache_environment import NotKeyableError, environment, plain

__all__ = ["NotKeyableError", "compile_key"]

# Operators whose meaning belongs to the version of PyTorch. Others are made by their users, who may
# change them without a new name.
_OPERATOR_NAMESPACES = frozenset({"aten", "prim", "prims"})
# Those that are described by their operands, sub-graphs among them. Others keep part of what they
# do in tables of the process.
_HIGHER_ORDER = frozenset(
    {
        "associative_scan",
        "cond",
        "flex_attention",
        "map_impl",
        "scan",
        "while_loop",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    }
)
# The same for functions in Python.
_PYTHON_PACKAGES = frozenset({"_operator", "math", "torch"})
# What else a node carries: where it came from, or what follows from the rest.
_META_LEFT_OUT = frozenset(
    {
        "from_node",
        "nn_module_stack",
        "original_aten",
        "seq_nr",
        "source_fn_stack",
        "stack_trace",
        "tensor_meta",
        "torch_fn",
        "val",
    }
)
_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_PARALLEL_BYTES = 16 << 20


def compile_key(program: torch.export.ExportedProgram, settings: Mapping[str, Any]) -> str:
    """The key, 64 hex digits, of compiling ``program`` with these settings of TorchInductor, on
    this machine and in the current state of the process.

    Raises:
        NotKeyableError: if something in it cannot be told from something else with certainty.
    """
    tensors = _Tensors()
    try:
        described = _describe(program, tensors)
    except RecursionError as error:
        raise NotKeyableError("its sub-graphs are nested too deeply") from error
    content = {
        "program": described,
        "storages": tensors.digests(),
        "environment": environment(settings),
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _describe(program: torch.export.ExportedProgram, tensors: _Tensors) -> Any:
    if program.range_constraints:
        raise NotKeyableError("it has dimensions without a fixed size")
    signature = program.graph_signature
    # What is not read may have any value: weights that reach the program as inputs beside these.
    read = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    inputs = []
    for spec in signature.input_specs:
        held: Any = None
        if spec.target is not None:
            held = program.constants.get(spec.target)
            if held is None:
                held = program.state_dict[spec.target]
            name = getattr(spec.arg, "name", None)
            held = tensors.describe(held) if name in read else None
        inputs.append(
            [spec.kind.name, _argument(spec.arg), spec.target, spec.persistent, held],
        )
    outputs = [
        [spec.kind.name, _argument(spec.arg), spec.target] for spec in signature.output_specs
    ]
    return {
        "graph": _Graph(program.graph_module, tensors).describe(),
        "inputs": inputs,
        "outputs": outputs,
        "calls": [str(program.call_spec.in_spec), str(program.call_spec.out_spec)],
    }


def _argument(argument: Any) -> Any:
    """An input or output of the whole program; a tensor goes by the name of its node."""
    from torch.export.graph_signature import ConstantArgument, TensorArgument

    if isinstance(argument, TensorArgument):
        return {"tensor": argument.name}
    if isinstance(argument, ConstantArgument):
        return {"constant": plain(argument.value)}
    raise NotKeyableError(f"it has a {type(argument).__name__} for an input or output")


class _Graph:
    """One graph, with the graphs inside it."""

    def __init__(self, module: torch.fx.GraphModule, tensors: _Tensors) -> None:
        self._module = module
        self._tensors = tensors
        self._numbers: dict[torch.fx.Node, int] = {}

    def describe(self) -> Any:
        nodes = []
        for node in self._module.graph.nodes:
            nodes.append(
                [
                    node.op,
                    node.name,
                    self._target(node),
                    [self._value(one) for one in node.args],
                    {name: self._value(one) for name, one in node.kwargs.items()},
                    self._value(node.meta.get("val")),
                    self._meta(node),
                ]
            )
            self._numbers[node] = len(self._numbers)
        return nodes

    def _target(self, node: torch.fx.Node) -> Any:
        if node.op == "call_function":
            return _function(node.target)
        if node.op == "get_attr":
            held: Any = self._module
            for name in str(node.target).split("."):
                held = getattr(held, name)
            if isinstance(held, torch.fx.GraphModule):
                return _Graph(held, self._tensors).describe()
            return self._tensors.describe(held)
        if node.op in ("placeholder", "output"):
            return None
        raise NotKeyableError(f"it has a node of the kind {node.op}")

    def _value(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return {"node": self._numbers[value]}
        if isinstance(value, (list, tuple)) and type(value).__name__ in (
            "list",
            "tuple",
            "immutable_list",
        ):
            return {"items": [self._value(one) for one in value]}
        if isinstance(value, torch.Tensor):
            return {"tensor": _geometry(value)}
        if isinstance(value, torch._ops.OpOverload):
            return _function(value)
        return plain(value)

    def _meta(self, node: torch.fx.Node) -> Any:
        return {
            name: plain(value)
            for name, value in node.meta.items()
            if name not in _META_LEFT_OUT and not _is_empty(value)
        }


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (dict, list, tuple)) and not value)


def _function(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace in _OPERATOR_NAMESPACES:
            return {"operator": str(target._schema)}
    elif isinstance(target, torch._ops.HigherOrderOperator):
        if target.__name__ in _HIGHER_ORDER:
            return {"higher_order": target.__name__}
    else:
        module = str(getattr(target, "__module__", None))
        name = str(getattr(target, "__qualname__", None))
        # Under its name it has to be what it is: a user's own may claim any.
        if module.partition(".")[0] in _PYTHON_PACKAGES and target is _found(module, name):
            return {"python": f"{module}.{name}"}
    raise NotKeyableError(f"it calls {target}, which may change without a new name")


def _found(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _geometry(tensor: torch.Tensor) -> Any:
    """All but the bytes. Works for fake tensors, too."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise NotKeyableError(f"it has a tensor of layout {tensor.layout}, dtype {tensor.dtype}")
    return [
        str(tensor.dtype),
        str(tensor.device),
        plain(list(tensor.shape)),
        plain(list(tensor.stride())),
        plain(tensor.storage_offset()),
        [tensor.requires_grad, tensor.is_conj(), tensor.is_neg()],
    ]


class _Tensors:
    """The tensors of a program. Each storage counts once, whoever shares it."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self._storages: list[torch.UntypedStorage] = []

    def describe(self, tensor: Any) -> Any:
        if type(tensor) not in _TENSORS or tensor.device.type != "cpu":
            raise NotKeyableError(f"it holds a constant of type {type(tensor).__name__}")
        geometry = _geometry(tensor)
        storage = tensor.untyped_storage()
        place = (storage.data_ptr(), storage.nbytes())
        if place not in self._numbers:
            self._numbers[place] = len(self._storages)
            self._storages.append(storage)
        return [geometry, self._numbers[place]]

    def digests(self) -> list[Any]:
        """Size and SHA-256 of each storage, in the order of their first use."""
        total = sum(storage.nbytes() for storage in self._storages)
        # hashlib lets other threads run meanwhile.
        workers = min(4, len(os.sched_getaffinity(0))) if total > _PARALLEL_BYTES else 1
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(_digest, self._storages))


def _digest(storage: torch.UntypedStorage) -> Any:
    # set_ of a tensor of its own: the storage's bytes, whatever views of it look like.
    data = torch.empty(0, dtype=torch.uint8).set_(storage)
    return [storage.nbytes(), hashlib.sha256(data.numpy().data).hexdigest()]
