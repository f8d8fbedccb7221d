"""Held tensors: weights and state that stay tensors in the traced module.

`plan_held` finds them, before anything is compiled. `HeldModule` is the form that compilers take:
flat inputs of the caller first, then the held tensors, which func finds in the places of its own.
"""

from __future__ import annotations

import contextlib
import functools
import keyword
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neuron_ext import _structure
from neuron_ext._structure import Const, Inputs, Leaf, Map, Node, Seq
from neuron_ext.compiler.args import CompilerOptions
from neuron_ext.compiler.flat_module import (
    FlatModule,
    dtype_name,
    mutated_state_error,
    reachable,
    same_bytes,
)
from neuron_ext.compiler.naming import callable_name


@dataclass(frozen=True)
class Place:
    """Where a module of func keeps a tensor: ``kind`` is ``_parameters`` or ``_buffers``."""

    module: torch.nn.Module
    kind: str
    key: str

    @property
    def table(self) -> dict[str, torch.Tensor | None]:
        return getattr(self.module, self.kind)  # type: ignore[no-any-return]


@dataclass
class HeldTensor:
    """One held tensor.

    Attributes:
        names: in the traced module; several where weights are tied. The first one is what messages
            and the subgraph call it.
        value: a dense copy of its own, which the traced module will have.
        is_parameter: whether it is a parameter there, else a buffer.
        places: where func keeps it.
        positions: of flat example inputs that it stands for.
        output: the flat output that updates it, None for a weight.
    """

    names: list[str]
    value: torch.Tensor
    is_parameter: bool
    places: list[Place] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    output: int | None = None

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class HeldPlan:
    """What a trace holds.

    Attributes:
        held: in the order of the program's inputs, after those of the caller.
        inputs: the structure of the traced module's own arguments.
        user_tensors: the example inputs for them.
        user_positions: where each of them stands among all flat example inputs.
    """

    held: tuple[HeldTensor, ...]
    inputs: Inputs
    user_tensors: tuple[torch.Tensor, ...]
    user_positions: tuple[int, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Example values of all inputs of the program."""
        return [*self.user_tensors, *(one.value for one in self.held)]

    @property
    def paths(self) -> tuple[str, ...]:
        """Names of all inputs of the program."""
        return (*self.inputs.paths, *(one.name for one in self.held))

    def visible_output(self, node: Node) -> Node:
        """The structure of what is returned: ``node`` without the outputs that update state."""
        hidden = {one.output for one in self.held if one.output is not None}
        return without_outputs(node, hidden) if hidden else node


def plan_held(
    func: Callable[..., Any],
    inputs: Inputs,
    tensors: Sequence[torch.Tensor],
    aliases: Mapping[Any, Any],
    *,
    separate_weights: bool,
) -> HeldPlan | None:
    """Find what a trace of ``func`` will hold; None if nothing.

    Args:
        func: as for ``trace``; not changed.
        inputs: the structure of all its arguments.
        tensors: the flat example inputs, the very objects that the caller passed.
        aliases: from state tensors to flat output indices.
        separate_weights: whether parameters and persistent buffers are held.

    Raises:
        ValueError: for aliases that mean nothing, and tensors that cannot be held; the text names
            them.
    """
    outputs = _read_aliases(aliases)
    held = _of_modules(func, set(outputs), separate_weights)
    for position, (tensor, path) in enumerate(zip(tensors, inputs.paths, strict=True)):
        if id(tensor) not in outputs:
            continue
        if id(tensor) not in held:
            held[id(tensor)] = HeldTensor([_as_name(path)], _own_copy(path, tensor), False)
        held[id(tensor)].positions.append(position)
    for key in aliases:
        if id(key) not in held:
            raise ValueError(
                f"input_output_aliases: a {dtype_name(key.dtype)} tensor of shape "
                f"{list(key.shape)} is neither a parameter or buffer of {callable_name(func)} nor "
                "one of the example inputs; a state is told by identity: pass the very same object"
            )
        held[id(key)].output = outputs[id(key)]
    if not held:
        return None
    plan_of = tuple(held.values())
    check_names(plan_of)
    stateful = {position for one in plan_of for position in one.positions}
    kept = tuple(i for i in range(len(tensors)) if i not in stateful)
    return HeldPlan(plan_of, _user_inputs(inputs, kept), tuple(tensors[i] for i in kept), kept)


def _read_aliases(aliases: Mapping[Any, Any]) -> dict[int, int]:
    outputs: dict[int, int] = {}
    for key, index in aliases.items():
        if not isinstance(key, torch.Tensor):
            raise ValueError(
                f"input_output_aliases has the key {key!r} of type {type(key).__name__}; expected "
                "a state tensor: a parameter or buffer of func, or an example input"
            )
        if type(index) is not int:
            raise ValueError(
                f"input_output_aliases has the value {index!r} of type {type(index).__name__}; "
                "expected the index of a flat output"
            )
        if index in outputs.values():
            raise ValueError(
                f"input_output_aliases gives output {index} to two states; each state needs an "
                "output of its own"
            )
        outputs[id(key)] = index
    return outputs


def _of_modules(
    func: Callable[..., Any], states: set[int], separate_weights: bool
) -> dict[int, HeldTensor]:
    """The tensors of func's modules that are held, by identity, in the order of a state dict."""
    found: dict[int, HeldTensor] = {}
    parts = _named_parts(func)
    wanted = {
        id(tensor)
        for path, place, tensor in _places(parts)
        if id(tensor) in states or (separate_weights and _is_persistent(place))
    }
    for path, place, tensor in _places(parts):
        if id(tensor) not in wanted:
            continue
        if isinstance(place.module, torch.jit.ScriptModule):
            raise ValueError(
                f"{path!r} belongs to a ScriptModule, whose tensors cannot be held apart from its "
                "code; pass the Python module that it was made of"
            )
        if id(tensor) not in found:
            is_parameter = place.kind == "_parameters"
            found[id(tensor)] = HeldTensor([], _own_copy(path, tensor), is_parameter)
        one = found[id(tensor)]
        if path not in one.names:
            one.names.append(path)
        if place not in one.places:
            one.places.append(place)
    return found


def _places(
    parts: Mapping[str, torch.nn.Module],
) -> Iterator[tuple[str, Place, torch.Tensor]]:
    for name, part in parts.items():
        for path, module in part.named_modules(remove_duplicate=False):
            prefix = ".".join(one for one in (name, path) if one)
            for kind in ("_parameters", "_buffers"):
                for key, tensor in getattr(module, kind).items():
                    if tensor is not None:
                        full = f"{prefix}.{key}" if prefix else key
                        yield full, Place(module, kind, key), tensor


def _is_persistent(place: Place) -> bool:
    return place.kind == "_parameters" or (
        place.key not in getattr(place.module, "_non_persistent_buffers_set", ())
    )


def _named_parts(func: Callable[..., Any]) -> dict[str, torch.nn.Module]:
    """The modules that func reaches. One alone has no name, so that its weights are named as in its
    own state dict; several go by the names that func knows them under.
    """
    modules, _ = reachable(func)
    if len(modules) == 1:
        return {"": modules[0]}
    known = {id(value): name for name, value in _variables(func)}
    names: dict[str, torch.nn.Module] = {}
    for i, module in enumerate(modules):
        name = known.get(id(module), f"module_{i}")
        names[name if name not in names else f"{name}_{i}"] = module
    return names


def _variables(func: Any) -> Iterator[tuple[str, Any]]:
    """Names and values that func refers to directly."""
    if isinstance(func, functools.partial):
        yield from func.keywords.items()
        yield from _variables(func.func)
    elif isinstance(func, types.MethodType):
        yield from getattr(func.__self__, "__dict__", {}).items()
        yield from _variables(func.__func__)
    elif isinstance(func, types.FunctionType):
        for name in func.__code__.co_names:
            if name in func.__globals__:
                yield name, func.__globals__[name]
        for name, cell in zip(func.__code__.co_freevars, func.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a variable that is not set yet
                yield name, cell.cell_contents
    else:
        yield from getattr(func, "__dict__", {}).items()


def _own_copy(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(
            f"{name!r} is on device {tensor.device} with layout {tensor.layout}; expected a dense "
            "CPU tensor: convert it before tracing"
        )
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone(memory_format=torch.contiguous_format)


def _as_name(path: str) -> str:
    """``past[0]['k']`` as a name: ``past_0_k``."""
    return _structure.identifier("_".join(part for part in _words(path) if part))


def _words(path: str) -> list[str]:
    return "".join(c if c.isalnum() or c == "_" else " " for c in path).split()


def check_names(held: Sequence[HeldTensor]) -> None:
    """Raise ValueError if a name cannot stand in a traced module beside the others."""
    shell = torch.nn.Module()
    shell.subgraph = None  # type: ignore[assignment]
    hold(shell, held)


def hold(shell: torch.nn.Module, held: Sequence[HeldTensor]) -> None:
    """Put the tensors into ``shell`` under their names, in plain submodules.

    Raises:
        ValueError: a name is taken, or no name that TorchScript can save.
    """
    for one in held:
        tensor = (
            torch.nn.Parameter(one.value, requires_grad=False) if one.is_parameter else one.value
        )
        for name in one.names:
            *path, last = name.split(".")
            owner = shell
            for part in path:
                child = owner._modules.get(part)
                if child is None:
                    _check_free(owner, part, name)
                    child = torch.nn.Module()
                    owner.add_module(part, child)
                owner = child
            _check_free(owner, last, name)
            if one.is_parameter:
                owner.register_parameter(last, tensor)  # type: ignore[arg-type]
            else:
                owner.register_buffer(last, tensor)


def _check_free(owner: torch.nn.Module, part: str, name: str) -> None:
    if hasattr(owner, part):
        raise ValueError(
            f"the tensor {name!r} cannot be held under its name: a traced module has {part!r} of "
            "its own, or another held tensor is called so. Rename it in func"
        )
    if keyword.iskeyword(part):
        raise ValueError(
            f"the tensor {name!r} cannot be held under its name: {part!r} is a keyword, which "
            "TorchScript cannot save. Rename it in func"
        )


# -------------------------------------------------------------------------------------------------
# structures without what is held


def _user_inputs(inputs: Inputs, kept: Sequence[int]) -> Inputs:
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


# -------------------------------------------------------------------------------------------------
# what is compiled


class HeldModule(FlatModule):
    """`FlatModule` whose last flat tensors are the held ones, in the places where func looks.

    States that func changes itself are copied first, so that a call that fails changes nothing.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        inputs: Inputs,
        options: CompilerOptions,
        plan: HeldPlan,
    ) -> None:
        names, nodes = inputs.names, inputs.nodes
        super().__init__(func, Inputs(names, nodes, plan.inputs.paths), options)
        self.castable = len(plan.user_tensors)
        self._plan = plan
        self._changed: frozenset[int] = frozenset()
        self._bypassed: list[str] = []
        self._rnns = [
            one for part in self.parts for one in part.modules() if isinstance(one, torch.nn.RNNBase)
        ]

    def call(self, flat: Sequence[torch.Tensor]) -> Any:
        users, held = flat[: self.castable], list(flat[self.castable :])
        if self.outputs is None:
            return self._first_call(users, held)
        for i in self._changed:
            held[i] = held[i].clone()
        with self._in_place(held):
            return super().call(self._arguments(users, held))

    def check_first_run(self) -> None:
        if self._bypassed:
            raise ValueError(
                f"{self.name} reaches {', '.join(map(repr, self._bypassed))} by another way than "
                "the attribute of that name, so it cannot be held apart from the code; read it "
                "from the attribute in forward"
            )
        changed = [self._plan.held[i] for i in sorted(self._changed)]
        weights = [one.name for one in changed if one.output is None]
        if weights:
            raise mutated_state_error(self, weights)
        self._check_outputs()

    def _arguments(
        self, users: Sequence[torch.Tensor], held: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """All flat arguments in func's own order."""
        by_position = dict(zip(self._plan.user_positions, users, strict=True))
        for one, tensor in zip(self._plan.held, held, strict=True):
            by_position.update(dict.fromkeys(one.positions, tensor))
        return [by_position[i] for i in range(len(by_position))]

    def _first_call(self, users: Sequence[torch.Tensor], held: list[torch.Tensor]) -> Any:
        """Also learns which held tensors func changes, and which it reaches past us."""
        given = [
            tensor if one.is_parameter and one.output is None else tensor.clone()
            for one, tensor in zip(self._plan.held, held, strict=True)
        ]
        versions = [tensor._version for tensor in given]
        watch = _Watch(
            {place.table[place.key]: one.name for one in self._plan.held for place in one.places}
        )
        with self._in_place(given) as replaced, watch:
            value = super().call(self._arguments(users, given))
            replaced += [
                i
                for i, one in enumerate(self._plan.held)
                if any(place.table[place.key] is not given[i] for place in one.places)
            ]
        changed = {
            i
            for i, tensor in enumerate(given)
            if tensor._version != versions[i]
            or (tensor is not held[i] and not same_bytes(tensor, held[i]))
        }
        self._changed = frozenset({*changed, *replaced})
        self._bypassed = sorted(watch.seen)
        return value

    @contextlib.contextmanager
    def _in_place(self, held: Sequence[torch.Tensor]) -> Iterator[list[int]]:
        before: list[tuple[Place, Any]] = []
        weights_of_rnns = [(rnn, rnn._flat_weights) for rnn in self._rnns]
        try:
            for one, tensor in zip(self._plan.held, held, strict=True):
                for place in one.places:
                    before.append((place, place.table[place.key]))
                    place.table[place.key] = tensor
            # They keep a list of their weights beside the attributes.
            for rnn in self._rnns:
                rnn._flat_weights = [getattr(rnn, name, None) for name in rnn._flat_weights_names]
            yield []
        finally:
            for rnn, weights in weights_of_rnns:
                rnn._flat_weights = weights
            for place, tensor in reversed(before):
                place.table[place.key] = tensor

    def _check_outputs(self) -> None:
        if self.outputs is None:
            raise AssertionError("run_once has to come first")
        leaves = [one.index for one in _structure.walk(self.outputs.node) if isinstance(one, Leaf)]
        used: dict[int, str] = {}
        for one in self._plan.held:
            if one.output is None:
                continue
            if not 0 <= one.output < len(leaves):
                raise ValueError(
                    f"input_output_aliases gives state {one.name!r} the output {one.output}; "
                    f"{self.name} returns {len(leaves)} tensor(s), numbered from 0"
                )
            index = leaves[one.output]
            shape, dtype = self.outputs.shapes[index], self.outputs.dtypes[index]
            if shape != tuple(one.value.shape) or dtype != one.value.dtype:
                raise ValueError(
                    f"input_output_aliases gives state {one.name!r}, a "
                    f"{dtype_name(one.value.dtype)} tensor of shape {list(one.value.shape)}, the "
                    f"output {one.output}, a {dtype_name(dtype)} tensor of shape {list(shape)}; "
                    "expected the same shape and dtype"
                )
            if index in used:
                raise ValueError(
                    f"input_output_aliases gives the states {used[index]!r} and {one.name!r} "
                    f"outputs that are one tensor; return a tensor of its own for each"
                )
            used[index] = one.name


class _Watch(TorchDispatchMode):
    """Notices operators that take one of these tensors."""

    def __init__(self, names: Mapping[Any, str]) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self._names = {_identity(tensor): name for tensor, name in names.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.numel():
                name = self._names.get(_identity(value))
                if name is not None:
                    self.seen.add(name)
        return func(*args, **(kwargs or {}))


def _identity(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def output_index(node: Node, place: int) -> int:
    """The flat output at a place in the order of all tensors returned: one that is returned twice
    is one flat output.
    """
    return [one.index for one in _structure.walk(node) if isinstance(one, Leaf)][place]


def held_fields(
    plan: HeldPlan, node: Node
) -> tuple[int, dict[str, list[int]], dict[str, list[str]], dict[str, torch.Tensor]]:
    """How many are held, and the int lists, string lists and tensors that the state of the
    subgraph has for them.
    """
    users = len(plan.user_tensors)
    tied = [(name, users + i) for i, one in enumerate(plan.held) for name in one.names[1:]]
    states = [(i, one) for i, one in enumerate(plan.held) if one.output is not None]
    initial = [_initial_bytes(one.value) for _, one in states]
    int_lists = {
        "tied_inputs": [number for _, number in tied],
        "state_inputs": [users + i for i, _ in states],
        "state_outputs": [output_index(node, one.output or 0) for _, one in states],
        "state_initial_sizes": [part.numel() for part in initial],
    }
    tensors = {"state_initial": torch.cat(initial)} if initial else {}
    return len(plan.held), int_lists, {"tied_names": [name for name, _ in tied]}, tensors


def _initial_bytes(value: torch.Tensor) -> torch.Tensor:
    """The bytes of a value, or of one element where all are the same bytes, as in zeros."""
    if value.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    elements = value.reshape(-1).view(torch.uint8).reshape(value.numel(), -1)
    first = elements[:1]
    return (first if bool((elements == first).all()) else elements).reshape(-1).clone()
