"""``analyze``: which operators of a model a subgraph can hold."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx.node import Node

from neuron_ext import _structure
from neuron_ext._version import __version__
from neuron_ext.compiler import quiet
from neuron_ext.compiler.flat_module import fresh_inputs
from neuron_ext.compiler.naming import argument_names
from neuron_ext.partition.config import check_analyze_keywords
from neuron_ext.partition.exported import is_operator, name_of, nodes_of, run_and_export
from neuron_ext.partition.support import Problem, Support


@dataclass
class Findings:
    """Operators of a graph, in order.

    Attributes:
        supported: how often each name occurs that a subgraph can hold.
        unsupported: each node that no subgraph can hold, and why.
    """

    supported: collections.Counter[str] = field(default_factory=collections.Counter)
    unsupported: list[tuple[Node, Problem]] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many operators there are."""
        return self.supported.total() + len(self.unsupported)

    @property
    def part(self) -> float:
        """Which part of them is supported, from 0 to 1; 1 where there are none."""
        return self.supported.total() / self.total if self.total else 1.0


def examine(nodes: Iterable[Node], support: Support) -> Findings:
    """Look at each operator once, but those that ``support`` ignores."""
    findings = Findings()
    for node in nodes:
        name = name_of(node)
        if not is_operator(node) or name in support.ignored:
            continue
        problem = support.problem(node)
        if problem is None:
            findings.supported[name] += 1
        else:
            findings.unsupported.append((node, problem))
    return findings


def analyze(
    func: Callable[..., Any],
    example_inputs: Any,
    compiler_workdir: Any = None,
    *,
    additional_ignored_ops: Collection[str] = frozenset(),
    max_workers: int = 4,
    is_hf_transformers: bool = False,
    cleanup: bool = False,
) -> dict[str, Any]:
    """Tell which operators of ``func`` a subgraph of native code can hold.

    Nothing is compiled and nothing of ``func`` changed; it is run once. Behaves as the "Analyze"
    API page of the Neuron documentation says, where Neuron's compiler is TorchInductor.

    Args:
        func: a module or another callable, as for ``trace``.
        example_inputs: a tensor, or a tuple of arguments, as for ``trace``.
        compiler_workdir: a directory, made if missing, that keeps the exported program
            (``program.txt``) and the report (``analysis.json``).
        additional_ignored_ops: names as ``"aten::sort"`` of operators to leave out of the report.
        max_workers: accepted, from 1 on. Operators are looked at on the calling thread.
        is_hf_transformers: accepted; there is nothing to change for such models.
        cleanup: whether to delete again what ``compiler_workdir`` got.

    Returns:
        A dict that ``json.dumps`` takes: ``torch_neuronx_version`` (this package's version),
        ``neuronx_cc_version`` (the compiler), ``support_percentage`` (as ``"66.67%"``),
        ``supported_operators`` (name to count), and ``unsupported_operators``: for each call site
        ``kind`` (the name), ``failureAt`` (``"Lowering to HLO"`` where no code can be made, as for
        shapes that depend on data, ``"neuronx-cc"`` where native code cannot call the operator),
        ``call`` (the lines of Python that led there, innermost first) and ``opGraph``. Operators
        are those of the exported program, before any decomposition.

    Raises:
        ValueError: for arguments of the wrong kind, and what ``trace`` raises it for.
        TypeError: if ``func`` is not callable.
        RuntimeError: if ``func`` fails or cannot be exported.

    Thread-safety: may be called from any thread; compiles and analyses run one after another.
    """
    if not callable(func):
        raise TypeError(f"func must be a module or another callable, got {func!r}")
    given = {
        "compiler_workdir": compiler_workdir,
        "additional_ignored_ops": additional_ignored_ops,
        "max_workers": max_workers,
    }
    ignored = check_analyze_keywords("", given)["additional_ignored_ops"]
    for name, value in (("is_hf_transformers", is_hf_transformers), ("cleanup", cleanup)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    arguments = (
        list(example_inputs) if isinstance(example_inputs, (tuple, list)) else [example_inputs]
    )
    inputs, tensors = _structure.read_inputs(argument_names(func, len(arguments)), arguments)
    with (
        quiet(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        _flat, program = run_and_export(func, inputs, fresh_inputs(tensors), with_lines=True)
        support = Support(program.graph_module, native=True, ignored=ignored)
        findings = examine(nodes_of(program.graph_module), support)
        report = make_report(findings)
    if compiler_workdir is not None and not cleanup:
        keep_report(compiler_workdir, report, str(program))
    return report


def make_report(findings: Findings) -> dict[str, Any]:
    """The documented dict."""
    return {
        "torch_neuronx_version": __version__,
        "neuronx_cc_version": f"inductor (torch {torch.__version__.split('+')[0]})",
        "support_percentage": f"{100 * findings.part:.2f}%",
        "supported_operators": dict(findings.supported),
        "unsupported_operators": _call_sites(findings),
    }


def keep_report(folder: Any, report: dict[str, Any], program: str) -> None:
    """Write the report and the program that it is about into a folder, made if missing.

    Raises:
        RuntimeError: if that is not possible.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "analysis.json").write_text(json.dumps(report, indent=4) + "\n")
        Path(folder, "program.txt").write_text(program + "\n")
    except OSError as error:
        raise RuntimeError(
            f"compiler_workdir {str(folder)!r} cannot be written: {error}; choose another"
        ) from error


def _call_sites(findings: Findings) -> list[dict[str, str]]:
    """A loop may come by one place more than once."""
    sites: dict[tuple[str, ...], dict[str, str]] = {}
    for node, problem in findings.unsupported:
        site = {
            "kind": name_of(node),
            "failureAt": problem.stage,
            "call": call_of(node),
            "opGraph": graph_of(node),
        }
        sites.setdefault(tuple(site.values()), site)
    return list(sites.values())


_FRAME = re.compile(r'File "(.*)", line (\d+), in (.*)')


def call_of(node: Node) -> str:
    """The lines of Python that led to a node, innermost first, one ``file(line): function`` each;
    empty where they are not known.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return "".join(f"{file}({line}): {function}\n" for file, line, function in reversed(frames))


def graph_of(node: Node) -> str:
    """A graph of the one operator, in TorchScript's notation."""
    numbers: dict[Any, str] = {}
    parameters = []

    def value_of(item: Any) -> str:
        known = item if isinstance(item, Node) else object()
        if known not in numbers:
            numbers[known] = f"%neuron_{len(numbers)}"
            kind = _type_of(item.meta.get("val") if isinstance(item, Node) else item)
            parameters.append(f"{numbers[known]} : {kind}")
        return numbers[known]

    arguments = [
        f"[{', '.join(map(value_of, item))}]"
        if isinstance(item, (list, tuple)) and any(isinstance(one, Node) for one in item)
        else value_of(item)
        for item in (*node.args, *node.kwargs.values())
    ]
    results = pytree.tree_leaves(node.meta.get("val"))
    names = [f"%neuron_{len(numbers) + i}" for i in range(len(results))]
    made = ", ".join(
        f"{name} : {_type_of(value)}" for name, value in zip(names, results, strict=True)
    )
    call = f"{name_of(node)}({', '.join(arguments)})"
    return (
        f"graph({(',' + chr(10) + ' ' * 6).join(parameters)}):\n"
        f"  {made + ' = ' if made else ''}{call}\n  return ({', '.join(names)})\n"
    )


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(
            [*map(str, value.shape), f"strides=[{', '.join(map(str, value.stride()))}]"]
        )
        kind = str(torch.empty((), dtype=value.dtype).type()).removeprefix("torch.")
        return f"{kind.removesuffix('Tensor')}({sizes}, requires_grad=0, device={value.device})"
    if value is None:
        return "NoneType"
    if isinstance(value, (list, tuple)):
        return f"{_type_of(value[0])}[]" if value else "int[]"
    for kinds, name in (
        ((bool, torch.SymBool), "bool"),
        ((int, torch.SymInt), "int"),
        ((float, torch.SymFloat), "float"),
    ):
        if isinstance(value, kinds):
            return name
    return "int" if isinstance(value, torch.dtype) else type(value).__name__
