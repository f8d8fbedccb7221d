"""The form of a func with held tensors that compilers take: flat inputs of the caller first, then
the held tensors, which func finds in places of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neuron_ext import _structure
from neuron_ext._structure import Inputs, Leaf
from neuron_ext.compiler.args import CompilerOptions
from neuron_ext.compiler.flat_module import (
    FlatModule,
    dtype_name,
    mutated_state_error,
    same_bytes,
)
from neuron_ext.compiler.held import HeldPlan, Place


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
        self._originals = self._found()
        modules = (one for part in self.parts for one in part.modules())
        self._rnns = [one for one in modules if isinstance(one, torch.nn.RNNBase)]

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

    def _found(self) -> dict[Any, str]:
        return {place.table[place.key]: one.name for one in self._plan.held for place in one.places}

    def _arguments(
        self, users: Sequence[torch.Tensor], held: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """All flat arguments in func's own order."""
        by_position = dict(zip(self._plan.user_positions, users, strict=True))
        for one, tensor in zip(self._plan.held, held, strict=True):
            if one.position is not None:
                by_position[one.position] = tensor
        return [by_position[i] for i in range(len(by_position))]

    def _first_call(self, users: Sequence[torch.Tensor], held: list[torch.Tensor]) -> Any:
        """Also learns which held tensors func changes, and which it reaches past us."""
        given = [
            tensor if one.is_parameter and one.output is None else tensor.clone()
            for one, tensor in zip(self._plan.held, held, strict=True)
        ]
        versions = [tensor._version for tensor in given]
        # Whoever runs us may have put copies in the places of the originals.
        watch = _Watch({**self._originals, **self._found()})
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


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices operators that take one of these tensors."""

    def __init__(self, names: Mapping[Any, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()
        self._names = {_identity(tensor): name for tensor, name in names.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.numel():
                name = self._names.get(_identity(value))
                if name is not None:
                    self.seen.add(name)
        return func(*args, **(kwargs or {}))


def _identity(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
