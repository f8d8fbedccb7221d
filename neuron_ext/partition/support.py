"""Which operators a subgraph can hold."""

from __future__ import annotations

import contextlib
import importlib
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import Node
from torch.fx.passes.operator_support import OperatorSupportBase

from neuron_ext.compiler.toolchain import head
from neuron_ext.partition.exported import is_operator, name_of

LOWERING = "Lowering to HLO"
COMPILER = "neuronx-cc"


@dataclass(frozen=True)
class Problem:
    """Why a subgraph cannot hold an operator.

    Attributes:
        stage: where it fails, as the documentation names it: `LOWERING` where no code can be made,
            `COMPILER` where the code could not run.
        reason: a phrase for messages.
    """

    stage: str
    reason: str


@dataclass(frozen=True)
class _Lowered:
    """What native code makes of one operator: the operators that it calls, by name."""

    problem: Problem | None
    calls: frozenset[str]


class Support(OperatorSupportBase):
    """Decides for the nodes of one graph, whose weights are attributes of ``module``.

    Nothing is compiled: TorchInductor lowers each kind of operator, with its shapes and dtypes,
    once. Not thread-safe.

    Args:
        module: whose nodes are asked for.
        native: whether subgraphs are native code (compiler inductor) or TorchScript.
        ignored: names of operators that are taken as supported unless their shapes depend on data.
        unwanted: names of operators for `is_node_supported` to refuse.
    """

    def __init__(
        self,
        module: torch.fx.GraphModule,
        *,
        native: bool,
        ignored: Collection[str] = (),
        unwanted: Collection[str] = (),
    ) -> None:
        self.module = module
        self.native = native
        self.ignored = frozenset(ignored)
        self.unwanted = frozenset(name.rstrip("_") for name in unwanted)
        self._blocked: dict[str, Problem] = {}
        self._known: dict[Any, _Lowered] = {}

    def problem(self, node: Node) -> Problem | None:
        """Why the operator of a node cannot be in a subgraph, or None."""
        if _depends_on_data(node) or any(map(_depends_on_data, node.all_input_nodes)):
            return Problem(LOWERING, "its shapes or values depend on data")
        if node.name in self._blocked:
            return self._blocked[node.name]
        if not self.native and isinstance(node.target, torch._ops.HigherOrderOperator):
            return Problem(LOWERING, "torch.jit.trace does not know it")
        if not self.native or name_of(node) in self.ignored:
            return None
        return self._lowered(node).problem

    def is_node_supported(self, _submodules: Mapping[str, torch.nn.Module], node: Node) -> bool:
        """Whether a node goes into a subgraph. Items of a tuple go where the tuple is."""
        if node.op != "call_function":
            return False
        if node.target is operator.getitem:
            (source, _) = node.args
            return isinstance(source, Node) and self.is_node_supported({}, source)
        if not is_operator(node) or name_of(node).rstrip("_") in self.unwanted:
            return False
        return self.problem(node) is None

    def block(self, nodes: Collection[Node], names: Collection[str]) -> bool:
        """Take those of ``nodes`` as not supported that make native code call one of ``names``.

        Returns whether there are any.
        """
        wanted = set(names)
        found = [
            node
            for node in nodes
            if is_operator(node) and (name_of(node) in wanted or wanted & self._lowered(node).calls)
        ]
        for node in found:
            self._blocked[node.name] = Problem(COMPILER, "native code cannot call it")
        return bool(found)

    def _lowered(self, node: Node) -> _Lowered:
        values = _Values(self.module, node)
        if values.key not in self._known:
            self._known[values.key] = _lower(node, values)
        return self._known[values.key]


class _Values:
    """The arguments of a node: their example tensors, and what makes two calls alike."""

    def __init__(self, module: torch.fx.GraphModule, node: Node) -> None:
        flat, self._spec = pytree.tree_flatten(
            (node.args, node.kwargs), is_leaf=lambda value: isinstance(value, Node)
        )
        self._flat = [_example(module, item) if isinstance(item, Node) else item for item in flat]
        self._places = [i for i, v in enumerate(self._flat) if isinstance(v, torch.Tensor)]
        self.tensors: list[torch.Tensor] = [self._flat[i] for i in self._places]
        described = tuple(
            ("tensor", v.dtype, tuple(v.shape), tuple(v.stride()))
            if isinstance(v, torch.Tensor)
            else (type(v).__name__, repr(v))
            for v in self._flat
        )
        self.key: Any = (str(node.target), described, str(self._spec))
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            # It depends on graphs among its arguments, too.
            self.key = node.name

    def call(self, target: Callable[..., Any], tensors: tuple[torch.Tensor, ...]) -> Any:
        flat = list(self._flat)
        for place, tensor in zip(self._places, tensors, strict=True):
            flat[place] = tensor
        args, kwargs = pytree.tree_unflatten(flat, self._spec)
        return target(*args, **kwargs)


def _example(module: torch.fx.GraphModule, node: Node) -> Any:
    if "val" in node.meta:
        return node.meta["val"]
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(module)
    raise AssertionError(f"{node.name} has no example value")


def _depends_on_data(node: Node) -> bool:
    return any(
        bool(free_unbacked_symbols(value))
        for value in pytree.tree_leaves(node.meta.get("val"))
        if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))
    ) or isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _lower(node: Node, values: _Values) -> _Lowered:
    """Have TorchInductor lower the one operator, and look at what it would call."""
    mode = next(
        (t.fake_mode for t in values.tensors if hasattr(t, "fake_mode")),
        FakeTensorMode(allow_non_fake_inputs=True),
    )
    try:
        with torch.inference_mode(False), torch.no_grad(), mode:
            tensors = [
                t
                if hasattr(t, "fake_mode")
                else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
                for t in values.tensors
            ]
            graph = _decomposed(lambda *flat: values.call(node.target, flat), tensors, mode)  # type: ignore[arg-type]
            return _result(_kernels(graph, tensors, mode), graph)
    except (
        Exception
    ) as error:  # whatever TorchInductor or the operator raises, it cannot be lowered
        reason = f"TorchInductor cannot lower it: {head(str(error))}"
        return _Lowered(Problem(LOWERING, reason), frozenset())


def _decomposed(
    call: Callable[..., Any], tensors: list[torch.Tensor], mode: Any
) -> torch.fx.GraphModule:
    decomposition: Any = importlib.import_module("torch._inductor.decomposition")
    random: Any = importlib.import_module("torch._inductor.fx_passes.replace_random")
    table = decomposition.select_decomp_table()
    # Twice: decompositions of the first pass may change tensors in place.
    graph = make_fx(torch.func.functionalize(call), decomposition_table=table)(*tensors)
    graph = make_fx(torch.func.functionalize(graph), decomposition_table=table)(*tensors)
    graph.graph.eliminate_dead_code()
    virtualized: Any = importlib.import_module("torch._inductor.virtualized").V
    with virtualized.set_fake_mode(mode):
        random.replace_random_passes(graph)
    graph.recompile()
    return graph


def _kernels(graph: torch.fx.GraphModule, tensors: list[torch.Tensor], mode: Any) -> list[Any]:
    """The operators that native code would call as they are."""
    lowering: Any = importlib.import_module("torch._inductor.graph")
    ir: Any = importlib.import_module("torch._inductor.ir")
    virtualized: Any = importlib.import_module("torch._inductor.virtualized").V
    with _settings():
        made = lowering.GraphLowering(
            graph,
            example_inputs=tensors,
            shape_env=mode.shape_env,
            cpp_wrapper=True,
            aot_mode=True,
            is_inference=True,
        )
        with (
            virtualized.set_graph_handler(made),
            virtualized.set_fake_mode(mode),
            virtualized.set_extern_kernel_nodes([]),
        ):
            made.run(*tensors)
    return [one.op_overload for one in made.operations if isinstance(one, ir.FallbackKernel)]


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    config: Any = importlib.import_module("torch._inductor.config")
    # Nothing is compiled here, so nobody needs to find out what the C++ compiler can do.
    with config.patch({"cpp_wrapper": True, "cpp.vec_isa_ok": True}):
        yield


def _result(kernels: list[Any], graph: torch.fx.GraphModule) -> _Lowered:
    fallbacks: Any = importlib.import_module("torchgen.aoti.fallback_ops")
    missing = sorted(
        {
            kernel._schema.name
            for kernel in kernels
            if (kernel.namespace == "aten" and str(kernel) not in fallbacks.inductor_fallback_ops)
            or kernel.namespace not in ("aten", "_quantized")
        }
    )
    calls = frozenset(name_of(node) for node in graph.graph.nodes if node.op == "call_function")
    if missing:
        return _Lowered(Problem(COMPILER, f"native code cannot call {', '.join(missing)}"), calls)
    return _Lowered(None, calls)
