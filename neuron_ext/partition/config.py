"""``PartitionerConfig``: what a caller asks of the graph partitioner."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from neuron_ext.compiler import check_compiler
from neuron_ext.compiler.args import parse_compiler_args

TRACE_KEYWORDS = ("compiler", "compiler_args", "compiler_workdir", "cpu_backend")
ANALYZE_KEYWORDS = ("additional_ignored_ops", "compiler_workdir", "max_workers")

_OPERATOR = re.compile(r"[A-Za-z_]\w*::[A-Za-z_]\w*")


class PartitionerConfig:
    """Has ``trace`` run operators that cannot be in a subgraph, and named ones, on the CPU.

    Behaves as the "Graph Partitioner" section of the "Trace" API page of the Neuron documentation
    says. ``docs/partitioner.md`` says what is cut where. Immutable in use, so free to share between
    traces and threads.

    Args:
        trace_kwargs: for every subgraph: ``compiler``, ``compiler_args``, ``compiler_workdir`` (one
            folder below it for each subgraph) and ``cpu_backend``, as ``trace`` takes them. What is
            given to ``trace`` itself counts for every subgraph, too, and must not contradict.
        model_support_percentage_threshold: from 0 to 1; the part of the operators that subgraphs
            must be able to hold.
        min_subgraph_size: the least number of operators in each subgraph, or -1.
        max_subgraph_count: the greatest number of subgraphs, or -1.
        ops_to_partition: operators, as ``"aten::sort"``, that go to the CPU in any case.
        analyze_parameters: ``compiler_workdir``, ``additional_ignored_ops`` and ``max_workers``, as
            ``analyze`` takes them.

    Raises:
        ValueError: for a value of the wrong type or out of range, and for a key in one of the dicts
            that is not named above.
        TypeError: for an unknown keyword, as Python does.
        RuntimeError: for a compiler that is not available.
    """

    def __init__(
        self,
        *,
        trace_kwargs: Mapping[str, Any] | None = None,
        model_support_percentage_threshold: float = 0.5,
        min_subgraph_size: int = -1,
        max_subgraph_count: int = -1,
        ops_to_partition: Iterable[str] | None = None,
        analyze_parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self.trace_kwargs = _keywords("trace_kwargs", trace_kwargs, TRACE_KEYWORDS)
        _check_trace_keywords(self.trace_kwargs)
        self.model_support_percentage_threshold = _part(
            "model_support_percentage_threshold", model_support_percentage_threshold
        )
        self.min_subgraph_size = _count("min_subgraph_size", min_subgraph_size)
        self.max_subgraph_count = _count("max_subgraph_count", max_subgraph_count)
        self.ops_to_partition = operator_names("ops_to_partition", ops_to_partition or ())
        parameters = _keywords("analyze_parameters", analyze_parameters, ANALYZE_KEYWORDS)
        self.analyze_parameters = check_analyze_keywords("analyze_parameters: ", parameters)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"PartitionerConfig({fields})"


def operator_names(what: str, names: Any) -> frozenset[str]:
    """The names of operators that a caller gave as ``what``.

    Raises:
        ValueError: for anything but a set, list or tuple of names like ``"aten::sort"``, and for
            names in ``aten`` that PyTorch does not know.
    """
    example = 'use names like "aten::sort"'
    if not isinstance(names, (set, frozenset, list, tuple)):
        raise ValueError(f"{what} must be a set of names of operators, got {names!r}; {example}")
    for name in names:
        if not isinstance(name, str) or not _OPERATOR.fullmatch(name):
            raise ValueError(f"{what} holds {name!r}, which names no operator; {example}")
        if name.startswith("aten::") and not torch._C._jit_get_schemas_for_operator(name):
            raise ValueError(f"{what} holds {name!r}, an operator that PyTorch does not have")
    return frozenset(names)


def check_analyze_keywords(prefix: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check values for those of `ANALYZE_KEYWORDS` that are given.

    Raises:
        ValueError: naming the keyword, with ``prefix`` before it.
    """
    checked = dict(given)
    if "additional_ignored_ops" in checked:
        name = f"{prefix}additional_ignored_ops"
        checked["additional_ignored_ops"] = operator_names(name, checked["additional_ignored_ops"])
    if "max_workers" in checked:
        workers = checked["max_workers"]
        if not _is_whole(workers) or workers < 1:
            raise ValueError(f"{prefix}max_workers must be a number from 1 on, got {workers!r}")
    _check_folder(prefix, checked)
    return checked


def _keywords(what: str, given: Any, known: tuple[str, ...]) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} must be a dict or None, got {given!r}")
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(
            f"{what} has the unknown key(s) {', '.join(map(repr, unknown))}; it takes "
            f"{', '.join(map(repr, known))}"
        )
    return dict(given)


def _check_trace_keywords(given: Mapping[str, Any]) -> None:
    check_compiler(given.get("compiler"))
    parse_compiler_args(given.get("compiler_args"))
    if not isinstance(given.get("cpu_backend", False), bool):
        raise ValueError(
            f"trace_kwargs: cpu_backend must be True or False, got {given['cpu_backend']!r}"
        )
    _check_folder("trace_kwargs: ", given)


def _check_folder(prefix: str, given: Mapping[str, Any]) -> None:
    folder = given.get("compiler_workdir")
    if folder is not None and not (isinstance(folder, (str, os.PathLike)) and os.fspath(folder)):
        raise ValueError(
            f"{prefix}compiler_workdir must be the path of a directory, got {folder!r}"
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _part(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
    return float(value)


def _count(name: str, value: Any) -> int:
    if not _is_whole(value) or (value != -1 and value < 1):
        raise ValueError(f"{name} must be a whole number from 1 on, or -1, got {value!r}")
    return int(value)
