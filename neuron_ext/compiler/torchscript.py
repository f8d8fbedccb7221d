"""The torchscript compiler: a frozen graph that runs wherever PyTorch runs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from neuron_ext.compiler.args import CompilerOptions
from neuron_ext.compiler.executable import CompiledExecutable
from neuron_ext.compiler.flat_module import FlatModule, fresh_inputs, nesting_refused


def compile_torchscript(
    flat: FlatModule,
    tensors: Sequence[torch.Tensor],
    _options: CompilerOptions,
    workdir: Path | None,
) -> CompiledExecutable:
    """Trace, freeze and save func as a graph.

    ``tensors`` are contiguous example inputs that func may write to. The cast that the options ask
    for is part of ``flat``.

    Raises:
        ValueError: if func calls a traced module.
        RuntimeError: if func cannot be traced, with the tracer's error as the cause.
    """
    graph = trace_graph(flat, tensors)
    if workdir is not None:
        Path(workdir, "graph.pt").write_bytes(graph.numpy().tobytes())
    if flat.outputs is None:
        raise AssertionError("run_once has to come first")
    return CompiledExecutable("torchscript", flat.outputs, graph=graph)


def trace_graph(flat: FlatModule, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The saved bytes, uint8, of a frozen ScriptModule from flat tensors to a tuple of flat
    tensors.
    """
    flat.copied_outputs = frozenset()
    flat.check_before_script(tensors)
    try:
        frozen = _freeze(flat, tensors)
        shared = constant_outputs(frozen)
        if shared:
            # Otherwise a caller that writes to such an output would change what the next call
            # returns.
            flat.copied_outputs = shared
            frozen = _freeze(flat, tensors)
    except Exception as error:
        raise RuntimeError(
            f"{flat.name} cannot be traced by compiler='torchscript': {type(error).__name__}: "
            f"{error}. Make func take and return tensors only, and compute on them with PyTorch "
            "operators"
        ) from error
    finally:
        flat.copied_outputs = frozenset()
    _check_not_nested(flat.name, frozen)
    buffer = io.BytesIO()
    torch.jit.save(frozen, buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def _freeze(flat: FlatModule, tensors: Sequence[torch.Tensor]) -> Any:
    trace: Any = torch.jit.trace
    traced = trace(flat, fresh_inputs(tensors), check_trace=False, strict=False)
    # Freezing wants eval. That changes the traced copy only, in which each layer's mode is settled.
    return torch.jit.freeze(traced.eval())


def _check_not_nested(name: str, frozen: Any) -> None:
    for call in ("forward", "forward_held", "forward_parallel"):
        if frozen.graph.findAllNodes(f"neuron_ext::{call}"):
            raise nesting_refused(name)


def constant_outputs(frozen: Any) -> frozenset[int]:
    """The flat outputs that are, or are views of, constants of the graph."""
    graph = frozen.graph
    (result,) = graph.outputs()
    if result.node().kind() != "prim::TupleConstruct":
        # The tuple itself is a constant, and with it each item.
        return frozenset(range(len(result.type().elements())))
    aliases = graph.alias_db()
    constants = [
        node.output()
        for node in graph.findAllNodes("prim::Constant")
        if node.output().type().kind() == "TensorType"
    ]
    return frozenset(
        i
        for i, value in enumerate(result.node().inputs())
        if not _depends_on_inputs(value)
        or any(aliases.may_contain_alias(value, constant) for constant in constants)
    )


def _depends_on_inputs(value: Any) -> bool:
    seen: set[str] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        node = one.node()
        if node.kind() == "prim::Param":
            if one.type().kind() != "ClassType":  # the module itself
                return True
        elif one.debugName() not in seen:
            seen.add(one.debugName())
            waiting.extend(node.inputs())
            for block in node.blocks():
                waiting.extend(block.outputs())
    return False
