"""Where a graph is cut, and the graph of its parts."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.fx.node import Node
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.tools_common import stable_topological_sort
from torch.fx.passes.utils.fuser_utils import erase_nodes, fuse_as_graphmodule, insert_subgm

from neuron_ext.partition.exported import Program, is_operator
from neuron_ext.partition.support import Support


@dataclass(frozen=True)
class Part:
    """Nodes that run together, in order.

    Attributes:
        name: ``neuron_0``, ``cpu_1``, ...: the number is the place in the order of execution.
        compiled: whether it is a subgraph, or stays on the CPU.
        nodes: of the graph that is cut, without weights.
    """

    name: str
    compiled: bool
    nodes: tuple[Node, ...]

    @property
    def size(self) -> int:
        """How many operators it holds."""
        return sum(map(is_operator, self.nodes))


def cut(program: Program, support: Support) -> list[Part]:
    """The parts of a program, in an order in which they can run.

    Subgraphs are as large as they can be. What does not depend on the inputs at all, or only makes
    views, is no subgraph by itself, unless there is no other.
    """
    graph = program.module.graph
    partitioner = CapabilityBasedPartitioner(
        program.module, support, allows_single_node_partition=True
    )
    proposed = [list(one.nodes) for one in partitioner.propose_partitions()]
    fed = [nodes for nodes in proposed if _takes_inputs(nodes)]
    groups = [nodes for nodes in fed if not all(map(_is_trivial, nodes))] or fed
    place = {node: i for i, node in enumerate(graph.nodes)}
    calls = [node for node in graph.nodes if node.op == "call_function"]
    return _named(_in_order(calls, groups, place))


def _takes_inputs(nodes: Sequence[Node]) -> bool:
    inside = set(nodes)
    return any(
        source.op != "get_attr" and source not in inside
        for node in nodes
        for source in node.all_input_nodes
    )


def _is_trivial(node: Node) -> bool:
    """Whether a node gives its input back, as it is or seen in another way."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _in_order(
    calls: Iterable[Node], groups: Sequence[Sequence[Node]], place: dict[Node, int]
) -> list[tuple[bool, list[Node]]]:
    """Groups of nodes for subgraphs, and between them as few groups of other nodes as there can be.

    Each is ``(compiled, nodes)``.
    """
    unit_of: dict[Node, int] = {}
    units: list[list[Node]] = []
    for group in groups:
        unit_of.update(dict.fromkeys(group, len(units)))
        units.append(sorted(group, key=place.__getitem__))
    compiled = len(units)
    for node in calls:
        if node not in unit_of:
            unit_of[node] = len(units)
            units.append([node])
    waits = [
        {unit_of[s] for node in unit for s in node.all_input_nodes if s in unit_of} - {i}
        for i, unit in enumerate(units)
    ]
    users: list[list[int]] = [[] for _ in units]
    for i, sources in enumerate(waits):
        for source in sources:
            users[source].append(i)
    ready: dict[bool, list[tuple[int, int]]] = {True: [], False: []}

    def release(i: int) -> None:
        heapq.heappush(ready[i < compiled], (place[units[i][0]], i))

    def finish(i: int) -> None:
        for user in users[i]:
            waits[user].discard(i)
            if not waits[user]:
                release(user)

    for i, sources in enumerate(waits):
        if not sources:
            release(i)
    order: list[tuple[bool, list[Node]]] = []
    while ready[False] or ready[True]:
        on_cpu: list[Node] = []
        while ready[False]:
            _, i = heapq.heappop(ready[False])
            on_cpu += units[i]
            finish(i)
        if on_cpu:
            order.append((False, on_cpu))
        batch = [heapq.heappop(ready[True])[1] for _ in range(len(ready[True]))]
        for i in batch:
            order.append((True, units[i]))
        for i in batch:
            finish(i)
    return order


def _named(order: Sequence[tuple[bool, list[Node]]]) -> list[Part]:
    return [
        Part(f"{'neuron' if compiled else 'cpu'}_{i}", compiled, tuple(nodes))
        for i, (compiled, nodes) in enumerate(order)
    ]


def join(program: Program, parts: Sequence[Part]) -> torch.fx.GraphModule:
    """A graph that calls each part as a module of its name, which returns a tuple.

    Weights are attributes of the parts that use them. The program stays as it is.
    """
    copies: dict[Node, Node] = {}
    graph = torch.fx.Graph()
    output = graph.graph_copy(program.module.graph, copies)
    graph.output(output)
    top = torch.fx.GraphModule(program.module, graph)
    for part in parts:
        nodes = [copies[node] for node in part.nodes]
        nodes = [*_own_weights(graph, nodes), *nodes]
        module, sources, results = fuse_as_graphmodule(
            top, nodes, part.name, dict.fromkeys(nodes), always_return_tuple=True
        )
        insert_subgm(top, module, sources, results, nodes[-1])
        erase_nodes(top, nodes)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    stable_topological_sort(top)
    top.graph.lint()
    return top


def _own_weights(graph: torch.fx.Graph, nodes: Sequence[Node]) -> list[Node]:
    """Nodes for the weights that ``nodes`` use, for them alone."""
    own: dict[Node, Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in own:
                with graph.inserting_before(source):
                    own[source] = graph.get_attr(str(source.target))
                own[source].meta = dict(source.meta)
    for node in nodes:
        for source in node.all_input_nodes:
            if source in own:
                node.replace_input_with(source, own[source])
    return list(own.values())


def result_number(node: Node) -> tuple[Node, int] | None:
    """The call of a part and the number of its result that a node of `join`'s graph stands for."""
    if node.op == "call_function" and node.target is operator.getitem:
        source, number = node.args
        if isinstance(source, Node) and isinstance(number, int):
            return source, number
    return None
