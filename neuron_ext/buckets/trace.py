"""``bucket_model_trace``: several compiled subgraphs in one ScriptModule, chosen by the input."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from neuron_ext import _structure
from neuron_ext._structure import Const, Inputs, Leaf, Map, Node
from neuron_ext._trace import State, TraceParts, _make_subgraph, _make_workdir
from neuron_ext.buckets.config import BucketModelConfig
from neuron_ext.buckets.job import Job, compile_bucket
from neuron_ext.buckets.parallel import NotParallelError, pickled_jobs, usable_cpus
from neuron_ext.buckets.script_module import Bucket, build_bucket_module
from neuron_ext.buckets.shared_weights import share_weights
from neuron_ext.buckets.state import place_state, read_shared
from neuron_ext.buckets.workers import CannotLoadError, compile_in_processes
from neuron_ext.compiler import _verbosity, check_compiler, quiet
from neuron_ext.compiler.args import parse_compiler_args
from neuron_ext.compiler.naming import callable_name

_log = logging.getLogger("neuron_ext")


def bucket_model_trace(
    func: Callable[..., Any],
    example_inputs: Sequence[Any],
    bucket_config: BucketModelConfig,
    compiler_workdir: str | os.PathLike[str] | None = None,
    compiler_args: str | Sequence[str] | None = None,
    *,
    compiler: str | None = None,
) -> torch.jit.ScriptModule:
    """Compile a model for several shapes of its inputs and return one ScriptModule that takes any
    of them.

    ``forward`` hands its input tensors, as one flat list, to the TorchScript function of
    ``bucket_config``, and runs the bucket of its choice on the tensors that it returned. What it
    returns has the structure that ``trace`` gives it, and the shapes of the bucket. Behaves as the
    "Autobucketing" part of the "Trace" API page of the Neuron documentation says.

    Buckets compile at the same time, each in a worker process, as many as there are buckets and
    usable CPUs. Workers import the main script, so its work has to stand below ``if __name__ ==
    "__main__":``. Where that is missing, or ``func`` cannot be pickled, buckets are compiled one
    after another in this process, which one log line says. Buckets share weights: what is equal is
    there once, in memory and in a saved file, for native code.

    Args:
        func: returns a tuple of a model, which is compiled as ``trace`` does it, and a dict of
            ``input_output_aliases`` from its state tensors, parameters or buffers of the model, to
            output indices, as ``trace`` takes it. It is called once per bucket, with the
            ``func_kwargs`` of that bucket, in the worker. Before each call PyTorch's random state
            is set to the caller's ``torch.initial_seed()``, so that models with random weights
            agree. With a ``shared_state_buffer`` the states of each model stand for the shared
            buffers, in their order; else each bucket has a state of its own.
        example_inputs: a list with the example inputs of each bucket, in the order of their index:
            what ``trace`` takes as ``example_inputs``, of the same structure in all.
        bucket_config: how a bucket is chosen.
        compiler_workdir: as in ``trace``; bucket 0 has ``bucket_0`` in it, and so on.
        compiler_args: as in ``trace``, for all buckets.
        compiler: as in ``trace``, for all buckets.

    Returns:
        A ScriptModule in eval mode, with attributes ``kernel`` and, for each bucket,
        ``subgraph_0``, ``subgraph_1``, ... (``part_0.subgraph`` where bucket 0 takes parts of
        shared buffers). It holds the state: shared buffers as ``state_0``, ``state_1``, ..., that
        of bucket 0 alone as ``bucket_0.`` and its name in the model. ``docs/buckets.md`` has the
        rules. An input that fits no bucket is a ``ValueError`` that says what came and what the
        buckets take (out of a ScriptModule TorchScript makes it a ``RuntimeError`` with that text):
        the kernel returned no tensors, another number of them than the model has inputs, or no
        index of a bucket.

    Raises:
        ValueError: for arguments that cannot be used, a ``func`` that does not return what it
            should, buckets whose models differ in the names of their arguments or the structure
            of their outputs, states that do not fit the ``shared_state_buffer`` in number, dtype or
            (without a preprocessor) shape, and a preprocessor that does not return views of the
            buffers in the shapes of the states.
        TypeError: if ``func`` is not callable.
        RuntimeError: if a worker ended without a result; and as ``trace``.
        Errors of ``func`` and of ``trace`` come through as they are, with the bucket named.

    Thread-safety: may be called from any thread.
    """
    _check(func, bucket_config)
    examples = _read_examples(example_inputs)
    kwargs = bucket_config.kwargs_of_buckets(len(examples))
    check_compiler(compiler)
    options = parse_compiler_args(compiler_args)
    workdir = _make_workdir(compiler_workdir)
    seed = torch.initial_seed()
    shared = read_shared(bucket_config)
    jobs = [
        Job(
            index,
            len(examples),
            func,
            kwargs[index],
            example_inputs[index],
            seed,
            None if workdir is None else Path(workdir, f"bucket_{index}"),
            options.raw,
            compiler,
            None if shared is None else shared.spec,
        )
        for index in range(len(examples))
    ]
    with _verbosity(options.verbose):
        all_parts = _compile(jobs)
    inputs = _same_structures(all_parts)
    placed, takes, module_state = place_state(all_parts, shared)
    states = share_weights(placed)
    name = all_parts[0].name
    buckets = [
        Bucket(
            _make_subgraph(_named(state, f"{name}.bucket_{i}")),
            parts.output,
            tuple(tuple(tensor.shape) for tensor in tensors),
            takes[i],
        )
        for i, (state, parts, tensors) in enumerate(zip(states, all_parts, examples, strict=True))
    ]
    keeper = module_state.keeper
    with quiet():
        return build_bucket_module(
            name,
            bucket_config.scripted_kernel,
            inputs,
            buckets,
            module_state,
            None if keeper is None else _make_subgraph(_named(keeper, f"{name}.state")),
        )


def _check(func: Any, bucket_config: Any) -> None:
    if not callable(func):
        raise TypeError(
            "func must be a function that returns (model, input_output_aliases), got "
            f"{func!r} of type {type(func).__name__}"
        )
    if isinstance(func, torch.nn.Module):
        raise ValueError(
            f"func is a {type(func).__name__}, a model itself; expected a function that returns "
            "(model, input_output_aliases), such as (model, {})"
        )
    if not isinstance(bucket_config, BucketModelConfig):
        raise ValueError(
            f"bucket_config must be a BucketModelConfig, got {bucket_config!r} of type "
            f"{type(bucket_config).__name__}"
        )


def _read_examples(example_inputs: Any) -> list[list[torch.Tensor]]:
    """The flat tensors of each bucket."""
    if not isinstance(example_inputs, list) or not example_inputs:
        what = "an empty list" if isinstance(example_inputs, list) else type(example_inputs)
        raise ValueError(
            "example_inputs must be a list with the example inputs of each bucket, such as "
            f"[(x_128, mask_128), (x_512, mask_512)], got {what}"
        )
    found = []
    nodes: list[tuple[Node, ...]] = []
    for i, example in enumerate(example_inputs):
        arguments = list(example) if isinstance(example, (tuple, list)) else [example]
        if not arguments:
            raise ValueError(
                f"example_inputs[{i}] is empty; expected at least one tensor to trace with"
            )
        names = [f"example_inputs[{i}][{j}]" for j in range(len(arguments))]
        inputs, tensors = _structure.read_inputs(names, arguments)
        nodes.append(inputs.nodes)
        found.append(tensors)
        if nodes[i] != nodes[0]:
            raise ValueError(
                f"example_inputs[{i}] has the structure {_all_shown(nodes[i])}, and "
                f"example_inputs[0] has {_all_shown(nodes[0])}; expected the same for all buckets"
            )
    return found


def _compile(jobs: Sequence[Job]) -> list[TraceParts]:
    """In processes if that is of use and can be, else here."""
    processes = min(len(jobs), usable_cpus())
    if processes > 1:
        try:
            what = f"{len(jobs)} buckets of {callable_name(jobs[0].func)}"
            return compile_in_processes(pickled_jobs(jobs), processes, what)
        except (NotParallelError, CannotLoadError) as error:
            why = (
                f"a worker process cannot load func or its arguments ({error})"
                if isinstance(error, CannotLoadError)
                else str(error)
            )
            _log.warning("buckets are compiled one after another, in this process: %s", why)
    return [compile_bucket(job) for job in jobs]


def _same_structures(all_parts: Sequence[TraceParts]) -> Inputs:
    """The structure of the inputs, which all buckets have.

    Raises:
        ValueError: if they differ, or the structures of the outputs do.
    """
    first = all_parts[0]
    for i, parts in enumerate(all_parts):
        if parts.inputs != first.inputs:
            raise ValueError(
                f"the model of bucket {i} takes ({', '.join(parts.inputs.paths)}), and that of "
                f"bucket 0 takes ({', '.join(first.inputs.paths)}); expected arguments of the same "
                "names in all buckets"
            )
        if _shown(parts.output) != _shown(first.output):
            raise ValueError(
                f"the model of bucket {i} returns {_shown(parts.output)}, and that of bucket 0 "
                f"returns {_shown(first.output)}; expected the same structure in all buckets"
            )
    return first.inputs


def _all_shown(nodes: Sequence[Node]) -> str:
    return f"({', '.join(map(_shown, nodes))})"


def _shown(node: Node) -> str:
    """A structure in words; equal words are equal structures."""
    if isinstance(node, Leaf):
        return "Tensor"
    if isinstance(node, Const):
        return "None" if node.value is None else type(node.value).__name__
    items = list(map(_shown, node.items))
    if isinstance(node, Map):
        pairs = (f"{key!r}: {item}" for key, item in zip(node.keys, items, strict=True))
        return f"{{{', '.join(pairs)}}}"
    if node.is_list:
        return f"[{', '.join(items)}]"
    fields = (f"{field}=" for field in node.fields) if node.fields else [""] * len(items)
    return f"{node.name}({', '.join(f + item for f, item in zip(fields, items, strict=True))})"


def _named(state: State, name: str) -> State:
    """The state of a subgraph of that name."""
    version, ints, strings, int_lists, string_lists, tensors = state
    return version, ints, {**strings, "name": name}, int_lists, string_lists, tensors
