"""The ScriptModule around buckets: it calls the bucket kernel and runs the subgraph of its choice.

Its attributes are ``kernel`` (the scripted bucket kernel) and ``subgraph_0``, ``subgraph_1``, ...
(the ``NeuronSubgraph`` of each bucket), and what `neuron_ext.buckets.state` says where there is
state. No Python is left in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, List  # noqa: UP035 (TorchScript knows it by this name)

import torch

from neuron_ext._structure import Inputs, Node, identifier, script_type
from neuron_ext.buckets.state import BucketState, ModuleState, part_bucket_type
from neuron_ext.compiler.held import hold
from neuron_ext.compiler.script_module import (
    _TYPE_HOME,
    _attribute,
    _define,
    _literal,
    _Writer,
)


@dataclass(frozen=True)
class Bucket:
    """A bucket of a module: its subgraph, the structure of its output, the shapes it takes, and the
    state.

    ``subgraph`` is None to learn whether the module can be made at all.
    """

    subgraph: Any
    output: Node
    shapes: tuple[tuple[int, ...], ...]
    state: BucketState


def build_bucket_module(
    name: str,
    kernel: Any,
    inputs: Inputs,
    buckets: Sequence[Bucket],
    state: ModuleState,
    keeper: Any = None,
) -> torch.jit.ScriptModule:
    """Make the ScriptModule, in eval state.

    Args:
        name: name of the type of the module; made into an identifier.
        kernel: a ScriptFunction or ScriptModule from the flat inputs to those of a bucket and a
            tensor with its index.
        inputs: structure of the call, the same for all buckets.
        buckets: in the order of their index. Their outputs have the same TorchScript type.
        state: what the module has for the state of its buckets.
        keeper: the subgraph of ``state.keeper``, if there is one.

    Raises:
        RuntimeError: if TorchScript does not accept the structures.

    Not safe from several threads at once: it changes the warning filters of the process meanwhile.
    """
    writer = _BucketWriter(inputs)
    source = writer.bucket_source(buckets)
    kind = type(identifier(name), (torch.nn.Module,), {"__module__": _TYPE_HOME})
    shell = kind()
    shell.kernel = kernel
    for i, bucket in enumerate(buckets):
        if bucket.state.is_part:
            setattr(shell, f"part_{i}", part_bucket_type()(bucket.subgraph))
        else:
            setattr(shell, f"subgraph_{i}", bucket.subgraph)
    if keeper is not None:
        shell.keeper = keeper
    if state.preprocessor is not None:
        shell.preprocessor = state.preprocessor
        shapes = [[list(one) for one in bucket] for bucket in state.shapes]
        shell.state_shapes = torch.jit.Attribute(shapes, List[List[List[int]]])  # noqa: UP006
    hold(shell, state.held)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript warns of its own age at each step
        module = torch.jit.script(shell)
        _define(module, source, writer.named_tuples)
    module.eval()
    return module  # type: ignore[no-any-return]


class _BucketWriter(_Writer):
    """Writes the ``forward`` of buckets. Used once."""

    def bucket_source(self, buckets: Sequence[Bucket]) -> str:
        arguments = ", ".join(
            f"{name}: {script_type(node, self._tuple_type)}"
            for name, node in zip(self._inputs.names, self._inputs.nodes, strict=True)
        )
        for name, node in zip(self._inputs.names, self._inputs.nodes, strict=True):
            self._flatten(node, name, name)
        self._choose(buckets)
        for i, bucket in enumerate(buckets):
            indent = ""
            # The last one needs no condition: the index is known to be in range.
            if i < len(buckets) - 1:
                self._lines.append(f"if _bucket == {i}:")
                indent = "    "
            lines = [*_run(i, bucket.state), f"return {self._build(bucket.output)}"]
            self._lines += [indent + line for line in lines]
        result = script_type(buckets[0].output, self._tuple_type)
        body = "".join(f"    {line}\n" for line in self._lines)
        return f"def forward(self, {arguments}) -> {result}:\n{body}"

    def _choose(self, buckets: Sequence[Bucket]) -> None:
        """Call the kernel, and refuse what cannot be run."""
        paths, last = self._inputs.paths, len(buckets) - 1
        # What came is put into words only where something is wrong.
        came = " + ', ' + ".join(
            f"{_literal(path + ' ')} + str({value}.shape)"
            for path, value in zip(paths, self._flat, strict=True)
        )
        found = f"'no bucket fits the inputs ' + {came} + ': the bucket kernel returned '"
        take = f"The buckets take {_describe(paths, buckets)}"
        expected = f"expected {len(paths)} tensor(s) and an index from 0 to {last}. {take}"
        self._lines += [
            f"_tensors, _chosen = self.kernel([{', '.join(self._flat)}])",
            "if _chosen.numel() != 1 or _chosen.is_floating_point() or _chosen.is_complex():",
            f"    torch.ops.neuron_ext.refuse({found} + 'a tensor of shape '"
            f" + str(_chosen.shape) + {_literal(' as index, not one whole number. ' + take)})",
            "_bucket = int(_chosen.item())",
            "if len(_tensors) == 0:",
            f"    torch.ops.neuron_ext.refuse({found} + {_literal('no tensors. ' + take)})",
            f"if _bucket < 0 or _bucket > {last} or len(_tensors) != {len(paths)}:",
            f"    torch.ops.neuron_ext.refuse({found} + str(len(_tensors))"
            f" + ' tensor(s) and index ' + str(_bucket) + {_literal('; ' + expected)})",
        ]


def _run(index: int, state: BucketState) -> list[str]:
    """The lines that make ``_outputs`` of ``_tensors`` in a bucket."""
    if not state.names:
        return [f"_outputs = torch.ops.neuron_ext.forward(_tensors, self.subgraph_{index})"]
    held = f"[{', '.join(map(_attribute, state.names))}]"
    subgraph = f"self.subgraph_{index}"
    if state.is_part:
        held = f"self.preprocessor(self.state_shapes, {held}, _chosen)"
        subgraph = f"self.part_{index}.subgraph"
    return [f"_outputs = torch.ops.neuron_ext.forward_held(_tensors, {held}, {subgraph})"]


def _describe(paths: Sequence[str], buckets: Sequence[Bucket]) -> str:
    """``0: x [1, 16], mask [1, 16]; 1: x [1, 32], mask [1, 32]``."""
    return "; ".join(
        f"{i}: "
        + ", ".join(
            f"{path} {list(shape)}" for path, shape in zip(paths, bucket.shapes, strict=True)
        )
        for i, bucket in enumerate(buckets)
    )
