"""The lines of TorchScript that call the parts of a model one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx.node import Node

from neuron_ext._structure import Inputs
from neuron_ext.compiler.flat_module import dtype_name
from neuron_ext.partition.cut import Part, result_number
from neuron_ext.partition.exported import Program, results_of

# TorchScript knows dtypes by number.
_DTYPES = [
    *("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex32"),
    *("complex64", "complex128", "bool"),
]


def call_lines(
    top: torch.fx.GraphModule,
    program: Program,
    parts: Sequence[Part],
    inputs: Inputs,
    tensors: Sequence[torch.Tensor],
) -> Callable[[Sequence[str]], list[str]]:
    """For ``script_module.build_module``: checks of the inputs, a call of each part, which is an
    attribute of its name, and the writes to inputs.

    ``top`` is the graph of ``parts``, ``tensors`` are the example inputs.
    """
    compiled = {part.name for part in parts if part.compiled}
    placeholders = [node for node in top.graph.nodes if node.op == "placeholder"]
    checked = [
        i
        for i, node in enumerate(placeholders)
        if any(user.target in compiled for user in node.users)
    ]

    def lines(flat: Sequence[str]) -> list[str]:
        written = []
        for i, name in enumerate(flat):
            if i not in checked:
                like = [flat[j] for j in checked if _same_batch(tensors[j], tensors[i])]
                path = inputs.paths[i]
                written += _check(name, path, tensors[i], like[:1], program.flat.name)
        names: dict[Node, str] = dict(zip(placeholders, flat, strict=True))
        for node in top.graph.nodes:
            result = result_number(node)
            if result is not None:
                names[node] = f"{names[result[0]]}[{result[1]}]"
            elif node.op == "call_module":
                names[node] = f"_part_{node.target}"
                arguments = [
                    # Strides are fixed in a part, and checked by none.
                    f"{names[one]}.contiguous()"
                    if one in placeholders and node.target not in compiled
                    else names[one]
                    for one in node.args
                    if isinstance(one, Node)
                ]
                written.append(f"{names[node]} = self.{node.target}({', '.join(arguments)})")
        values = [names[node] for node in results_of(top.graph)]
        count = len(program.outputs)
        written.append(f"_outputs = [{', '.join(values[:count])}]")
        for i, value in zip(program.writes, values[count:], strict=True):
            written.append(f"{flat[i]}.copy_({value})")
        return written

    return lines


def _same_batch(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dim() > 0 and other.dim() > 0 and one.shape[0] == other.shape[0]


def _check(
    name: str, path: str, example: torch.Tensor, like: Sequence[str], model: str
) -> list[str]:
    """Refuse what is not like the example. No subgraph sees this input.

    Dimension 0 is that of another input, ``like``, where both had the same: with dynamic batching
    on, that one may have any; without, a subgraph refuses it.
    """
    sizes = ", ".join(map(str, example.shape))
    wanted = f"a {dtype_name(example.dtype)} tensor of shape [{sizes}] on cpu"
    shape = [str(size) for size in example.shape]
    if like:
        shape[0] = f"{like[0]}.size(0)"
    same_shape = f"{name}.size() == [{', '.join(shape)}]" if shape else f"{name}.dim() == 0"
    text = f"input '{path}' of '{model}': expected {wanted}, got a "
    known = ", ".join(f"{i}: {kind!r}" for i, kind in enumerate(_DTYPES))
    return [
        f"if not ({same_shape} and {name}.dtype == torch.{dtype_name(example.dtype)}"
        f" and {name}.device == torch.device('cpu')):",
        f"    _dtypes = {{{known}}}",
        f"    _dtype = _dtypes[{name}.dtype] if {name}.dtype in _dtypes else 'tensor'",
        f"    torch.ops.neuron_ext.refuse({text!r} + _dtype + ' tensor of shape '"
        f" + str({name}.size()) + ' on ' + str({name}.device)"
        " + '; a traced module takes what it was traced with')",
    ]
