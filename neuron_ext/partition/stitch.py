"""``trace`` with a ``partitioner_config``: the parts of a model, compiled and joined."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx.node import Node

from neuron_ext import _trace
from neuron_ext._structure import Inputs, Leaf
from neuron_ext.compiler import CompiledExecutable, compile_executable, quiet, toolchain
from neuron_ext.compiler.args import CompilerOptions, parse_compiler_args
from neuron_ext.compiler.executable import UnsupportedOperatorsError
from neuron_ext.compiler.flat_module import FlatModule, fresh_inputs, warn_of_training
from neuron_ext.compiler.script_module import build_module, build_script_module
from neuron_ext.partition.config import TRACE_KEYWORDS, PartitionerConfig
from neuron_ext.partition.cpu_part import UnwritableError, script_part
from neuron_ext.partition.cut import Part, cut, join, result_number
from neuron_ext.partition.exported import (
    Program,
    is_operator,
    make_program,
    name_of,
    run_and_export,
)
from neuron_ext.partition.forward import call_lines
from neuron_ext.partition.report import Findings, examine, keep_report, make_report
from neuron_ext.partition.support import Support

_log = logging.getLogger("neuron_ext")


@dataclass(frozen=True)
class _Request:
    """What is asked for, for every subgraph."""

    name: str
    compiler: str | None
    options: CompilerOptions
    workdir: Path | None


class _RetryError(Exception):
    """Native code turned out to need operators that it cannot call; the cut was changed."""


def trace_partitioned(
    func: Callable[..., Any],
    inputs: Inputs,
    tensors: Sequence[torch.Tensor],
    config: PartitionerConfig,
    **trace_keywords: Any,
) -> torch.jit.ScriptModule:
    """What ``trace`` does with a ``partitioner_config``.

    Args:
        func: what to trace; not changed.
        inputs: its structure of the flat example inputs ``tensors``, which are not changed.
        config: how to cut.
        trace_keywords: those of `TRACE_KEYWORDS`, as ``trace`` got them.

    Raises:
        ValueError: if the model does not fit the configuration, or for what ``trace`` raises it.
        RuntimeError: if a part cannot be exported, compiled or written as TorchScript.
    """
    keywords = _merged(config, trace_keywords)
    options = parse_compiler_args(keywords["compiler_args"])
    workdir = _trace._make_workdir(keywords["compiler_workdir"])
    with (
        quiet(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        report_to = config.analyze_parameters.get("compiler_workdir")
        flat, exported = run_and_export(
            func, inputs, fresh_inputs(tensors), with_lines=report_to is not None
        )
        program = make_program(flat, exported)
        request = _Request(flat.name, _compiler(keywords["compiler"], flat), options, workdir)
        support = Support(
            program.module,
            native=request.compiler == "inductor",
            ignored=config.analyze_parameters.get("additional_ignored_ops", ()),
            unwanted=config.ops_to_partition,
        )
        _warn_of_absent(config, program)
        if report_to is not None:
            report = make_report(examine(program.module.graph.nodes, support))
            keep_report(report_to, report, str(exported))
    while True:
        with quiet(), torch.no_grad():
            parts = _plan(program, support, config)
        try:
            if not any(part for part in parts if not part.compiled):
                return _whole(func, inputs, tensors, program, support, request)
            warn_of_training(func, list(flat.parts))
            return _parted(inputs, tensors, program, parts, support, request)
        except _RetryError:
            continue


def _merged(config: PartitionerConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The keywords of ``trace`` and those of ``trace_kwargs``."""
    merged = {}
    defaults = {"compiler": None, "compiler_args": None, "compiler_workdir": None}
    for name in TRACE_KEYWORDS:
        default = defaults.get(name, False)
        own, configured = given[name], config.trace_kwargs.get(name, default)
        if own != default and configured not in (default, own):
            raise ValueError(
                f"{name} is {own!r} for trace and {configured!r} in trace_kwargs of the "
                "PartitionerConfig; say it once"
            )
        merged[name] = configured if own == default else own
    return merged


def _compiler(asked: str | None, flat: FlatModule) -> str:
    if asked is not None:
        return asked
    problem = toolchain.cpp_compiler_problem()
    if problem is None:
        return "inductor"
    _log.warning("%s is compiled with compiler='torchscript': %s", flat.name, problem)
    return "torchscript"


def _warn_of_absent(config: PartitionerConfig, program: Program) -> None:
    found = {name_of(node).rstrip("_") for node in program.module.graph.nodes}
    absent = sorted(name for name in config.ops_to_partition if name.rstrip("_") not in found)
    if absent:
        _log.warning(
            "ops_to_partition names %s, which %s does not call; analyze() lists what it calls",
            ", ".join(absent),
            program.flat.name,
        )


# ------------------------------------------------------------------------------- the cut


def _plan(program: Program, support: Support, config: PartitionerConfig) -> list[Part]:
    """The parts, after a check of what the configuration asks of them."""
    name = program.flat.name
    findings = examine(program.module.graph.nodes, support)
    if findings.part < config.model_support_percentage_threshold:
        raise ValueError(
            f"{100 * findings.part:.2f}% of the operators of {name} are supported "
            f"({findings.supported.total()} of {findings.total}), and "
            "model_support_percentage_threshold asks for "
            f"{100 * config.model_support_percentage_threshold:.2f}%. Not supported: "
            f"{_listed(findings)}. Lower the threshold, or use other operators"
        )
    parts = cut(program, support)
    compiled = [part for part in parts if part.compiled]
    if not compiled and any(is_operator(node) for part in parts for node in part.nodes):
        raise ValueError(
            f"no operator of {name} is left for a subgraph; not supported: "
            f"{_listed(findings) or 'none'}, in ops_to_partition: "
            f"{', '.join(sorted(config.ops_to_partition)) or 'none'}"
        )
    for part in compiled:
        if part.size < config.min_subgraph_size:
            raise ValueError(
                f"subgraph {part.name} of {name} would hold {part.size} operator(s) "
                f"({_operators(part)}), and min_subgraph_size asks for at least "
                f"{config.min_subgraph_size}. Put these into ops_to_partition, or ask for less"
            )
    if config.max_subgraph_count != -1 and len(compiled) > config.max_subgraph_count:
        raise ValueError(
            f"{name} would be cut into {len(compiled)} subgraphs, and max_subgraph_count allows "
            f"{config.max_subgraph_count}. On the CPU between them: "
            f"{', '.join(_operators(part) for part in parts if not part.compiled)}"
        )
    _log.info(
        "%s is cut into %s",
        name,
        ", ".join(f"{part.name} ({part.size} operators)" for part in parts) or "one subgraph",
    )
    return parts


def _listed(findings: Findings) -> str:
    reasons = {name_of(node): problem.reason for node, problem in findings.unsupported}
    return ", ".join(f"{name} ({reason})" for name, reason in reasons.items())


def _operators(part: Part) -> str:
    return ", ".join(dict.fromkeys(name_of(node) for node in part.nodes if is_operator(node)))


# ------------------------------------------------------------------------------- the parts


def _whole(
    func: Callable[..., Any],
    inputs: Inputs,
    tensors: Sequence[torch.Tensor],
    program: Program,
    support: Support,
    request: _Request,
) -> torch.jit.ScriptModule:
    """All of func in one subgraph, as without a configuration."""
    nodes = list(program.module.graph.nodes)
    executable = _compile(func, inputs, tensors, nodes, support, request, request.workdir)
    subgraph = _subgraph(request.name, inputs, tensors, executable)
    with quiet():
        return build_script_module(request.name, subgraph, inputs, executable.outputs.node)


def _parted(
    inputs: Inputs,
    tensors: Sequence[torch.Tensor],
    program: Program,
    parts: Sequence[Part],
    support: Support,
    request: _Request,
) -> torch.jit.ScriptModule:
    with quiet(), torch.inference_mode(False), torch.no_grad():
        top = join(program, parts)
        runs = _Recorder(top)
        with torch.random.fork_rng(devices=[]):
            runs.run(*fresh_inputs(tensors))
    paths = _paths(top, inputs)
    modules: dict[str, Any] = {}
    for part in parts:
        module = getattr(top, part.name)
        if not part.compiled:
            modules[part.name] = _cpu_part(module, part, runs, request)
            continue
        arguments = runs.arguments[part.name]
        structure = Inputs(
            tuple(f"input_{i}" for i in range(len(arguments))),
            tuple(Leaf(i) for i in range(len(arguments))),
            tuple(paths[part.name]),
        )
        folder = (
            None if request.workdir is None else _trace._make_workdir(request.workdir / part.name)
        )
        name = f"{request.name}_{part.name}"
        type(module).__name__ = name
        executable = _compile(module, structure, arguments, part.nodes, support, request, folder)
        subgraph = _subgraph(name, structure, arguments, executable)
        with quiet():
            modules[part.name] = build_script_module(
                name, subgraph, structure, executable.outputs.node
            )
    outputs = program.flat.outputs
    if outputs is None:
        raise AssertionError("the program was run")
    lines = call_lines(top, program, parts, inputs, tensors)
    with quiet():
        return build_module(request.name, modules, inputs, outputs.node, lines)


def _compile(
    func: Callable[..., Any],
    inputs: Inputs,
    tensors: Sequence[torch.Tensor],
    nodes: Sequence[Node],
    support: Support,
    request: _Request,
    workdir: Path | None,
) -> CompiledExecutable:
    try:
        return compile_executable(
            func,
            inputs,
            tensors,
            compiler=request.compiler,
            options=request.options,
            workdir=workdir,
        )
    except RuntimeError as error:
        cause = error.__cause__
        if not isinstance(cause, UnsupportedOperatorsError):
            raise
        with quiet(), torch.no_grad():
            if not support.block(nodes, cause.operators):
                raise
        raise _RetryError from error


def _subgraph(
    name: str, inputs: Inputs, tensors: Sequence[torch.Tensor], executable: CompiledExecutable
) -> Any:
    return _trace._make_subgraph(_trace._encode(name, inputs.paths, tensors, executable))


def _paths(top: torch.fx.GraphModule, inputs: Inputs) -> dict[str, list[str]]:
    """What to call the inputs of each part in messages."""
    users = iter(inputs.paths)
    names: dict[Node, str] = {}
    paths: dict[str, list[str]] = {}
    for node in top.graph.nodes:
        result = result_number(node)
        if node.op == "placeholder":
            names[node] = next(users)
        elif node.op == "call_module":
            paths[str(node.target)] = [names[source] for source in node.args]
        elif result is not None:
            names[node] = f"{result[0].target}[{result[1]}]"
    return paths


class _Recorder(torch.fx.Interpreter):
    """Runs the parts as they are, and keeps what each was called with and returned."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.arguments: dict[str, tuple[Any, ...]] = {}
        self.results: dict[str, tuple[Any, ...]] = {}
        self.random_states: dict[str, torch.Tensor] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.random_states[target] = torch.get_rng_state()
        self.arguments[target] = args
        self.results[target] = super().call_module(target, args, kwargs)
        return self.results[target]


def _cpu_part(module: torch.fx.GraphModule, part: Part, runs: _Recorder, request: _Request) -> Any:
    """The part as TorchScript, which is seen to compute what the part computes."""
    try:
        with quiet(), torch.inference_mode(False), torch.no_grad():
            script = script_part(module)
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(runs.random_states[part.name])
                got = script(*runs.arguments[part.name])
        _check_same(got, runs.results[part.name], part)
    except UnwritableError as error:
        raise RuntimeError(
            f"{_operators(part)} of {request.name} cannot run on the CPU between subgraphs: {error}"
        ) from error
    return script


def _check_same(got: Sequence[Any], want: Sequence[Any], part: Part) -> None:
    # What is in memory that nobody has written to is nobody's result.
    unset = any(name_of(node).startswith(("aten::empty", "aten::new_empty")) for node in part.nodes)
    for one, other in zip(got, want, strict=True):
        if isinstance(other, torch.Tensor):
            same = one.dtype == other.dtype and one.shape == other.shape
            same = same and (unset or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))
        else:
            same = one == other
        if not same:
            raise UnwritableError("TorchScript computes something else")
