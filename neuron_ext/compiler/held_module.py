"""The form of a func with held tensors that compilers take: flat inputs of the caller first, then
the held tensors, which func finds in places of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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
        self._originals = {
            _identity(place.table[place.key]): one.name for one in plan.held for place in one.places
        }
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
        changed = [self._plan.held[i] for i in sorted(self._changed)]
        weights = [one.name for one in changed if one.output is None]
        if weights:
            raise mutated_state_error(self, weights)
        self._check_outputs()

    def check_program(self, program: torch.export.ExportedProgram) -> None:
        used = {
            node.name for node in program.graph.nodes if node.op == "placeholder" and node.users
        }
        tensors = (
            program.constants.get(spec.target, program.state_dict.get(spec.target))
            for spec in program.graph_signature.input_specs
            if spec.target is not None and getattr(spec.arg, "name", None) in used
        )
        self._refuse({_identity(one) for one in tensors if isinstance(one, torch.Tensor)})

    def check_before_script(self, tensors: Sequence[torch.Tensor]) -> None:
        if not self._originals:
            return
        # Not earlier: what TorchDynamo compiles under such a mode does not work outside of it.
        watch = _Watch()
        with watch:
            self(*(tensor.clone() for tensor in tensors))
        self._refuse(watch.seen)

    def _refuse(self, read: set[Any]) -> None:
        """Raise if ``read`` has the identity of a tensor that the module is to hold."""
        names = sorted({self._originals[one] for one in read - {None} if one in self._originals})
        if names:
            raise ValueError(
                f"{self.name} reaches {', '.join(map(repr, names))} by another way than the "
                "attribute of that name, so it cannot be held apart from the code; read it from "
                "the attribute in forward"
            )

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
        """Also learns which held tensors func changes."""
        given = [
            tensor if one.is_parameter and one.output is None else tensor.clone()
            for one, tensor in zip(self._plan.held, held, strict=True)
        ]
        versions = [tensor._version for tensor in given]
        with self._in_place(given) as replaced:
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
    """Notes the tensors that operators take."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.update(
            _identity(one) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)
        )
        return func(*args, **(kwargs or {}))


def _identity(tensor: Any) -> Any:
    """The same for two tensors that are one in memory. None where there is no memory."""
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.device.type != "cpu":
        return None
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
