"""Func as a graph of operators, by ``torch.export``."""

from __future__ import annotations

import contextlib
import operator
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.node import Node

from neuron_ext import _structure
from neuron_ext._structure import Inputs
from neuron_ext.compiler import flat_module
from neuron_ext.compiler.args import CompilerOptions
from neuron_ext.compiler.flat_module import (
    FlatModule,
    mutated_state_error,
    public_name,
    run_once,
)
from neuron_ext.compiler.toolchain import head

# What export adds to a graph, which is no operator of func.
_BOOKKEEPING = frozenset(
    [
        *("sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "lift_fresh_copy"),
        *("_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range"),
        "sym_constrain_range_for_size",
    ]
)

# The same, under names that torch.jit.trace knows and that say something outside of an export.
_SAME = {
    torch.ops.aten.lift_fresh_copy.default: torch.ops.aten.clone.default,
    torch.ops.aten.fill.Tensor: torch.ops.aten.copy.default,
    torch.ops.aten.fill.Scalar: torch.ops.aten.full_like.default,
    torch.ops.aten.zero.default: torch.ops.aten.zeros_like.default,
}


@dataclass
class Program:
    """What was made of func; nothing of it is shared with another trace, but the weights.

    Attributes:
        flat: func, from flat tensors to flat tensors, after `run_once`.
        module: the exported graph. Its placeholders are the flat inputs, in order; weights and
            constants are attributes, under the names that they have in func.
        outputs: the nodes of the flat outputs, in order.
        writes: for each flat input that func changes in place, the node of its last value. The
            graph itself changes nothing.
    """

    flat: FlatModule
    module: torch.fx.GraphModule
    outputs: list[Node]
    writes: dict[int, Node]

    @property
    def placeholders(self) -> list[Node]:
        """The flat inputs."""
        return [node for node in self.module.graph.nodes if node.op == "placeholder"]


class _Traced(FlatModule):
    """Refuses numbers among the outputs that are not fixed, which the structure would fix."""

    refusal: ValueError | None = None

    def call(self, flat: Sequence[torch.Tensor]) -> Any:
        value = super().call(flat)
        if self.outputs is not None and _has_symbol(value):
            self.refusal = ValueError(
                f"{self.name} returns a number that depends on the values of its inputs, and a "
                "traced module returns such values as tensors only; return a tensor instead"
            )
            raise self.refusal
        return value


def _has_symbol(value: Any) -> bool:
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return True
    if isinstance(value, torch.Tensor):
        return False
    inner = _structure.contents(value)
    if inner is None:
        return False
    return any(_has_symbol(item) for item in (inner.values() if isinstance(inner, dict) else inner))


def run_and_export(
    func: Callable[..., Any],
    inputs: Inputs,
    tensors: Sequence[torch.Tensor],
    *,
    with_lines: bool = False,
) -> tuple[FlatModule, torch.export.ExportedProgram]:
    """Run func once for its outputs, and export it as it is: nothing decomposed.

    ``tensors`` are contiguous and may be written to. ``with_lines`` to have func's lines of code in
    the ``stack_trace`` of each node; it changes how PyTorch finds them meanwhile.

    Raises:
        ValueError: if func changes its state, or returns what a trace cannot hold.
        RuntimeError: if func fails, or cannot be exported.
    """
    flat = _Traced(func, inputs, CompilerOptions())
    run_once(flat, tensors)
    try:
        with _lines_of_code(with_lines):
            program = torch.export.export(flat, tuple(tensors))
    except Exception as error:
        if flat.refusal is not None:
            raise flat.refusal from None
        raise RuntimeError(
            f"{flat.name} cannot be exported: {head(str(error))}. Control flow that depends on the "
            "values of tensors, and ScriptModules, cannot be analyzed or partitioned"
        ) from error
    return flat, program


@contextlib.contextmanager
def _lines_of_code(wanted: bool) -> Iterator[None]:
    """All of func's own lines, where torch.export keeps those of ``forward`` methods only; or none
    at all, since to find them takes time.
    """
    import torch.fx.config as config

    tracer: Any = torch.fx.proxy.TracerBase
    before, keep = config.do_not_emit_stack_traces, tracer._filter_traceback_frames
    config.do_not_emit_stack_traces = not wanted
    tracer._filter_traceback_frames = lambda _self, frames: _own_frames(frames)
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before
        tracer._filter_traceback_frames = keep


def _own_frames(frames: traceback.StackSummary) -> traceback.StackSummary:
    """Those below the call of func, without PyTorch's own, but with those of its layers."""
    start = max(
        (i for i, frame in enumerate(frames) if frame.filename == flat_module.__file__), default=-1
    )
    return traceback.StackSummary.from_list(
        frame for frame in frames[start + 1 :] if _is_of_func(frame.filename)
    )


def _is_of_func(file: str) -> bool:
    torch_folder = os.path.dirname(torch.__file__)
    if not file.startswith(torch_folder + os.sep):
        return True
    layers = os.path.join(torch_folder, "nn", "")
    return file.startswith(layers) and not file.endswith(os.path.join("modules", "module.py"))


def make_program(flat: FlatModule, program: torch.export.ExportedProgram) -> Program:
    """The graph of func without changes in place.

    Raises:
        ValueError: if func changes its buffers.
    """
    regions = any(map(_is_region, program.graph.nodes))
    if regions or any(map(is_mutating, nodes_of(program.graph_module))):
        # An empty table takes out changes in place and regions, and leaves operators as they are.
        program = program.run_decompositions({})
        changed = sorted(program.graph_signature.buffers_to_mutate.values())
        if changed:
            raise mutated_state_error(flat, changed)
    unlifted = program.module(check_guards=False)
    if not isinstance(unlifted, torch.fx.GraphModule):
        raise AssertionError("torch.export gives a graph")
    graph = unlifted.graph
    # Without the code that makes containers: this graph takes and returns flat tensors.
    graph.set_codegen(torch.fx.graph.CodeGen())
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    output = graph.output_node()
    writes: dict[int, Node] = {}
    for node in list(graph.nodes):
        target = name_of(node)
        if target == "aten::copy_":
            place, value = node.all_input_nodes
            writes[placeholders.index(place)] = value
            node.replace_all_uses_with(value)
            graph.erase_node(node)
        elif target == "aten::_assert_tensor_metadata":
            graph.erase_node(node)
        elif node.target in _SAME:
            node.target = _SAME[node.target]
    outputs = []
    for value in results_of(graph):
        if value.op == "get_attr":
            # A caller may write to what it gets.
            with graph.inserting_before(output):
                copy = graph.call_function(torch.ops.aten.clone.default, (value,))
            copy.meta = dict(value.meta)
            value = copy
        outputs.append(value)
    # What is written stays alive, and below its uses, as an output.
    output.args = ((*outputs, *writes.values()),)
    graph.eliminate_dead_code()
    module = _renamed(flat, unlifted, graph)
    held = results_of(module.graph)
    count = len(outputs)
    return Program(flat, module, held[:count], dict(zip(writes, held[count:], strict=True)))


def results_of(graph: torch.fx.Graph) -> list[Node]:
    """The nodes that a graph returns, as a tuple."""
    (held,) = graph.output_node().args
    return list(held)  # type: ignore[arg-type]


def _renamed(
    flat: FlatModule, module: torch.fx.GraphModule, graph: torch.fx.Graph
) -> torch.fx.GraphModule:
    """A module of the graph, with the weights under the names that they have in func."""
    attributes: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(module)
            name = public_name(flat, node.target)
            if isinstance(value, torch.Tensor) and "val" not in node.meta:
                node.meta["val"] = value
            attributes[name] = value
            node.target = name
    return torch.fx.GraphModule(attributes, graph)


def name_of(node: Node) -> str:
    """``aten::linear``, of the operator that a node calls; empty for what is no operator."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        # A custom operator that changes its arguments is wrapped.
        for inner in node.args[:1]:
            if isinstance(inner, torch._ops.OpOverload):
                return str(inner._schema.name)
        return f"higher_order::{node.target.__name__}"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name)
    return ""


def nodes_of(module: torch.fx.GraphModule) -> Iterator[Node]:
    """All nodes, with those inside of ``with torch.autocast(...)`` and the like in their place."""
    for node in module.graph.nodes:
        if _is_region(node):
            inner = next(one for one in node.all_input_nodes if one.op == "get_attr")
            yield from nodes_of(operator.attrgetter(str(inner.target))(module))
        else:
            yield node


def _is_region(node: Node) -> bool:
    return name_of(node) in (
        "higher_order::wrap_with_autocast",
        "higher_order::wrap_with_set_grad_enabled",
    )


def is_operator(node: Node) -> bool:
    """Whether a node is an operator of func: no arithmetic of sizes, no unpacking, no check."""
    name = name_of(node)
    space, _, base = name.partition("::")
    return bool(name) and not (space == "aten" and base in _BOOKKEEPING)


def is_mutating(node: Node) -> bool:
    """Whether a node changes one of its arguments in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
