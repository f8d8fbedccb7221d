"""Held tensors: weights and state that stay tensors in the traced module.

`plan_held` finds them, before anything is compiled; `held_module` is the form that compilers take.
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

from neuron_ext import _structure
from neuron_ext._structure import Inputs, Leaf, Node
from neuron_ext.compiler.flat_module import dtype_name, reachable
from neuron_ext.compiler.held_structure import user_inputs, without_outputs
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
        position: of the flat example input that it stands for, if it is one.
        output: the flat output that updates it, None for a weight.
    """

    names: list[str]
    value: torch.Tensor
    is_parameter: bool
    places: list[Place] = field(default_factory=list)
    position: int | None = None
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
        if id(tensor) in held:
            raise ValueError(
                f"input_output_aliases: one tensor is {held[id(tensor)].name!r} and the example "
                f"input {path!r}; pass a clone for the one that is no state"
            )
        held[id(tensor)] = HeldTensor(
            [_as_name(path)], _own_copy(path, tensor), False, position=position
        )
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
    # Among themselves states are in the order of the aliases.
    states = iter([held[id(key)] for key in aliases])
    plan_of = tuple(one if one.output is None else next(states) for one in held.values())
    check_names(plan_of)
    stateful = {one.position for one in plan_of}
    kept = tuple(i for i in range(len(tensors)) if i not in stateful)
    return HeldPlan(plan_of, user_inputs(inputs, kept), tuple(tensors[i] for i in kept), kept)


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


def add_held_fields(plan: HeldPlan, node: Node, state: tuple[Any, ...]) -> None:
    """Put into the state of a new subgraph what it says of held tensors; ``node`` is the structure
    of all outputs.
    """
    _, ints, _, int_lists, string_lists, tensors = state
    users = len(plan.user_tensors)
    tied = [(name, users + i) for i, one in enumerate(plan.held) for name in one.names[1:]]
    outputs = [one.index for one in _structure.walk(node) if isinstance(one, Leaf)]
    states = [
        (users + i, outputs[one.output], _initial_bytes(one.value))
        for i, one in enumerate(plan.held)
        if one.output is not None
    ]
    ints["held_inputs"] = len(plan.held)
    string_lists["tied_names"] = [name for name, _ in tied]
    int_lists["tied_inputs"] = [number for _, number in tied]
    int_lists["state_inputs"] = [number for number, _, _ in states]
    int_lists["state_outputs"] = [output for _, output, _ in states]
    int_lists["state_initial_sizes"] = [part.numel() for _, _, part in states]
    if states:
        tensors["state_initial"] = torch.cat([part for _, _, part in states])


def _initial_bytes(value: torch.Tensor) -> torch.Tensor:
    """The bytes of a value, or of one element where all are the same bytes, as in zeros."""
    if value.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    elements = value.reshape(-1).view(torch.uint8).reshape(value.numel(), -1)
    first = elements[:1]
    return (first if bool((elements == first).all()) else elements).reshape(-1).clone()
