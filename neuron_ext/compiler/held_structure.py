"""Structures of inputs and outputs without what the module holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from neuron_ext import _structure
from neuron_ext._structure import Const, Inputs, Leaf, Map, Node, Seq


def user_inputs(inputs: Inputs, kept: Sequence[int]) -> Inputs:
    """The structure of a call with only the tensors at ``kept`` in it, numbered anew."""
    numbers = {position: i for i, position in enumerate(kept)}
    pairs = [
        (name, _kept_input(node, numbers))
        for name, node in zip(inputs.names, inputs.nodes, strict=True)
    ]
    left = [(name, node) for name, node in pairs if node is not None]
    return Inputs(
        tuple(name for name, _ in left),
        tuple(node for _, node in left),
        tuple(inputs.paths[i] for i in kept),
    )


def _kept_input(node: Node, numbers: Mapping[int, int]) -> Node | None:
    if isinstance(node, Leaf):
        return Leaf(numbers[node.index]) if node.index in numbers else None
    return _filtered(node, lambda item: _kept_input(item, numbers))


def _filtered(node: Node, keep: Callable[[Node], Node | None]) -> Node | None:
    """The container with what ``keep`` makes of its items; None if it made None of all of them."""
    if not isinstance(node, (Seq, Map)) or not node.items:
        return node
    items = [keep(item) for item in node.items]
    left = [i for i, item in enumerate(items) if item is not None]
    if not left:
        return None
    kept = tuple(item for item in items if item is not None)
    if isinstance(node, Map):
        return Map(tuple(node.keys[i] for i in left), kept)
    fields = tuple(node.fields[i] for i in left) if node.fields else ()
    return Seq(kept, node.is_list, node.name, fields)


def without_outputs(node: Node, hidden: set[int]) -> Node:
    """``node`` without the tensors at these places in the order of all tensors returned. A tuple or
    list at the top with one item left is that item; where nothing is left it is None.
    """
    places = iter(range(sum(isinstance(one, Leaf) for one in _structure.walk(node))))

    def keep(one: Node) -> Node | None:
        if isinstance(one, Leaf):
            return None if next(places) in hidden else one
        return _filtered(one, keep)

    left = keep(node)
    if left is None:
        return Const(None)
    if left != node and isinstance(left, Seq) and len(left.items) == 1:
        return left.items[0]
    return left
