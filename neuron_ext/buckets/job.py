"""One bucket's share of the work: make the model, and compile it for that bucket's inputs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuron_ext._structure import Map, Node, Seq
from neuron_ext._trace import TraceParts, trace_parts
from neuron_ext.buckets.state import SharedSpec
from neuron_ext.compiler import _compile_lock


@dataclass(frozen=True)
class Job:
    """What is needed to compile bucket ``index`` of ``count``, in this process or another.

    ``seed`` is the same for all buckets, so that they agree on random weights. ``shared`` is what
    the states of the model have to agree with; None where they are the bucket's own.
    """

    index: int
    count: int
    func: Callable[..., Any]
    kwargs: dict[str, Any]
    example_inputs: Any
    seed: int
    compiler_workdir: Path | None
    compiler_args: Sequence[str]
    compiler: str | None
    shared: SharedSpec | None = None


def compile_bucket(job: Job) -> TraceParts:
    """Call func and compile what it returns. The random state of the caller stays as it was.

    Raises:
        ValueError: if func does not return a model and a dict, or its states do not fit.
        Whatever func and ``trace`` raise. The bucket is named in each error.

    Thread-safe; buckets in one process are compiled one after another.
    """
    # The lock: traces in other threads put the process's random state back when they end.
    with _naming(job), _compile_lock, torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model, aliases = _take_model(job.func(**job.kwargs))
        if job.shared is not None:
            job.shared.check(aliases)
        parts = trace_parts(
            model,
            job.example_inputs,
            compiler_workdir=job.compiler_workdir,
            compiler_args=job.compiler_args,
            compiler=job.compiler,
            input_output_aliases=aliases,
            shared_weights=True,
        )
        _refuse_inputs(parts)
    inputs = dataclasses.replace(parts.inputs, nodes=tuple(map(_plain, parts.inputs.nodes)))
    # Without the places in the model: what is kept is the module's own.
    held = tuple(dataclasses.replace(one, places=[]) for one in parts.held)
    return dataclasses.replace(parts, inputs=inputs, held=held)


def _refuse_inputs(parts: TraceParts) -> None:
    for one in parts.held:
        if one.position is not None:
            raise ValueError(
                f"input_output_aliases has the example input {one.name!r}; expected parameters and "
                "buffers of the model that func returns: a bucket cannot hold its input"
            )


def _take_model(returned: Any) -> tuple[Callable[..., Any], Mapping[Any, Any]]:
    if not isinstance(returned, tuple) or len(returned) != 2:
        what = (
            f"a tuple of {len(returned)}"
            if isinstance(returned, tuple)
            else f"an object of type {type(returned).__name__}"
        )
        raise ValueError(
            "func must return a tuple of a model and its input_output_aliases, such as "
            f"(model, {{}}), but it returned {what}"
        )
    model, aliases = returned
    if not callable(model):
        raise ValueError(
            "func must return a model, or another callable, as the first of two; got an object of "
            f"type {type(model).__name__}"
        )
    if aliases is not None and not isinstance(aliases, Mapping):
        raise ValueError(
            "func must return input_output_aliases, a dict, as the second of two; got an object "
            f"of type {type(aliases).__name__}"
        )
    return model, aliases or {}


@contextlib.contextmanager
def _naming(job: Job) -> Iterator[None]:
    """Errors that leave this say which bucket they are of."""
    where = f"bucket {job.index} of {job.count}"
    try:
        yield
    except Exception as error:
        plain_text = type(error).__str__ is BaseException.__str__
        if plain_text and len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (f"{where}: {error.args[0]}",)
        else:
            error.add_note(f"This is of {where}.")
        raise


def _plain(node: Node) -> Node:
    """The node without the caller's own containers, which only func needs to see."""
    if isinstance(node, Seq):
        items = tuple(map(_plain, node.items))
        return Seq(items, node.is_list, node.name, node.fields)
    if isinstance(node, Map):
        return Map(node.keys, tuple(map(_plain, node.items)))
    return node
