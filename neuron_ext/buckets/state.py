"""State of buckets: buffers that all share, or tensors of each bucket's own.

The bucket module holds them. A bucket that takes the shared buffers as they are gets them under
their names. One that takes parts of them gets the views that the preprocessor returns, and its
subgraph stands in a `PartBucket`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neuron_ext._trace import State, TraceParts, trace_parts
from neuron_ext.buckets.config import BucketModelConfig
from neuron_ext.compiler.flat_module import dtype_name
from neuron_ext.compiler.held import HeldTensor, _initial_bytes, _own_copy


@dataclass(frozen=True)
class SharedSpec:
    """What the aliased states of each model have to agree with: the dtypes and shapes of the shared
    buffers. ``whole``: no preprocessor makes other shapes of them.
    """

    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    whole: bool

    def check(self, aliases: Mapping[Any, Any]) -> None:
        """Raise ValueError, with what differs, if the states of a model do not fit the buffers."""
        if len(aliases) != len(self.dtypes):
            raise ValueError(
                f"func returned input_output_aliases of {len(aliases)} state(s), and "
                f"shared_state_buffer has {len(self.dtypes)} tensor(s); expected one state of the "
                "model for each, in their order"
            )
        for i, state in enumerate(aliases):
            if not isinstance(state, torch.Tensor):
                continue  # which trace says
            shape = tuple(state.shape)
            fits = state.dtype == self.dtypes[i] and (not self.whole or shape == self.shapes[i])
            if not fits:
                wanted = "shape and dtype" if self.whole else "dtype"
                raise ValueError(
                    f"state {i} of input_output_aliases is {_described(state.dtype, shape)}, and "
                    f"shared_state_buffer[{i}] is {_described(self.dtypes[i], self.shapes[i])}; "
                    f"expected the same {wanted}"
                    + (", or a shared_state_buffer_preprocessor" if self.whole else "")
                )


@dataclass(frozen=True)
class SharedState:
    """The shared buffers: copies of their initial values, and the preprocessor, if any."""

    values: tuple[torch.Tensor, ...]
    preprocessor: Any

    @property
    def names(self) -> tuple[str, ...]:
        """Of the buffers, in the bucket module."""
        return tuple(f"state_{i}" for i in range(len(self.values)))

    @property
    def spec(self) -> SharedSpec:
        return SharedSpec(
            tuple(one.dtype for one in self.values),
            tuple(tuple(one.shape) for one in self.values),
            self.preprocessor is None,
        )

    def views(self, index: int, shapes: Sequence[Sequence[Sequence[int]]]) -> list[torch.Tensor]:
        """What bucket ``index`` takes.

        Raises:
            ValueError: the preprocessor fails, or returns other tensors than one view of each
                buffer, of the shape of the state.
        """
        if self.preprocessor is None:
            return list(self.values)
        what = f"the shared_state_buffer_preprocessor, called for bucket {index},"
        with torch.inference_mode(False), torch.no_grad():
            try:
                views = self.preprocessor(
                    [list(map(list, one)) for one in shapes],
                    list(self.values),
                    torch.tensor([index]),
                )
            except Exception as error:  # TorchScript's own are of many kinds
                raise ValueError(f"{what} failed: {error}") from error
        if len(views) != len(self.values):
            raise ValueError(
                f"{what} returned {len(views)} tensor(s); expected {len(self.values)}, one for "
                "each tensor of shared_state_buffer"
            )
        for i, (view, value) in enumerate(zip(views, self.values, strict=True)):
            if tuple(view.shape) != tuple(shapes[index][i]) or view.dtype != value.dtype:
                raise ValueError(
                    f"{what} returned {_described(view.dtype, view.shape)} for state {i}; expected "
                    f"{_described(value.dtype, shapes[index][i])}, as the model has it"
                )
            if not _writes_through(view, value):
                raise ValueError(
                    f"{what} returned a tensor for state {i} that is no view of "
                    f"shared_state_buffer[{i}] with an element of the buffer for each of its own, "
                    "so the bucket cannot update the buffer through it; return slices and "
                    "reshapes, not copies and expansions"
                )
        return views  # type: ignore[no-any-return]


@dataclass(frozen=True)
class BucketState:
    """What a bucket takes: tensors of the module of these names, or, if ``is_part``, what the
    preprocessor makes of them.
    """

    names: tuple[str, ...] = ()
    is_part: bool = False


@dataclass(frozen=True)
class ModuleState:
    """What the bucket module has for the state of its buckets.

    Attributes:
        held: the tensors.
        preprocessor: None if no bucket takes parts.
        shapes: of the states of each bucket, for the preprocessor.
        keeper: the state of a subgraph that holds the shared buffers whole and is never called, for
            `reset_state`; None where a bucket takes them whole.
    """

    held: tuple[HeldTensor, ...] = ()
    preprocessor: Any = None
    shapes: tuple[tuple[tuple[int, ...], ...], ...] = ()
    keeper: State | None = None


def read_shared(config: BucketModelConfig) -> SharedState | None:
    """The shared state of a configuration; None without ``shared_state_buffer``.

    Raises:
        ValueError: a tensor of it is not dense.
    """
    if config.shared_state_buffer is None:
        return None
    values = tuple(
        _own_copy(f"shared_state_buffer[{i}]", one)
        for i, one in enumerate(config.shared_state_buffer)
    )
    return SharedState(values, config.scripted_preprocessor)


def place_state(
    all_parts: Sequence[TraceParts], shared: SharedState | None
) -> tuple[list[State], list[BucketState], ModuleState]:
    """The states of the buckets' subgraphs with the names of what the module holds, what each
    bucket takes, and what the module has for it.

    Raises:
        ValueError: as `SharedState.views`.
    """
    if shared is None:
        return _own_states(all_parts)
    names = shared.names
    shapes = tuple(tuple(tuple(one.value.shape) for one in parts.held) for parts in all_parts)
    states, takes = [], []
    for i, parts in enumerate(all_parts):
        views = shared.views(i, shapes)
        whole = all(map(torch.Tensor.is_set_to, views, shared.values))
        # Another name for a part: what looks for held tensors would take the whole for it.
        held = names if whole else [f"bucket_{i}.{name}" for name in names]
        states.append(_with_initial(_renamed(parts.state, held, {}), views))
        takes.append(BucketState(names, not whole))
    return (
        states,
        takes,
        ModuleState(
            tuple(
                HeldTensor([name], value, False)
                for name, value in zip(names, shared.values, strict=True)
            ),
            shared.preprocessor if any(one.is_part for one in takes) else None,
            shapes,
            _keeper(shared) if all(one.is_part for one in takes) else None,
        ),
    )


@functools.cache
def part_bucket_type() -> Any:
    """The TorchScript class around the subgraph of a bucket that takes parts of shared buffers.

    `reset_state` and its like look for the tensors of a subgraph among the attributes of the module
    that it is an attribute of. Parts are none. This hides the subgraph from them, and from nothing
    else.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript warns of its own age
        return torch.jit.script(PartBucket)


class PartBucket:
    """See `part_bucket_type`."""

    def __init__(self, subgraph: torch.classes.neuron_ext.NeuronSubgraph) -> None:  # type: ignore[name-defined]
        self.subgraph = subgraph


def _own_states(
    all_parts: Sequence[TraceParts],
) -> tuple[list[State], list[BucketState], ModuleState]:
    states, takes = [], []
    held: list[HeldTensor] = []
    for i, parts in enumerate(all_parts):
        prefixed = [
            HeldTensor([f"bucket_{i}.{name}" for name in one.names], one.value, one.is_parameter)
            for one in parts.held
        ]
        names = tuple(one.name for one in prefixed)
        tied = {name: j for j, one in enumerate(prefixed) for name in one.names[1:]}
        states.append(_renamed(parts.state, names, tied) if names else parts.state)
        takes.append(BucketState(names))
        held += prefixed
    return states, takes, ModuleState(tuple(held))


def _keeper(shared: SharedState) -> State:
    state = trace_parts(
        lambda *buffers: buffers,
        shared.values,
        compiler_workdir=None,
        compiler_args=None,
        compiler="torchscript",
        input_output_aliases={one: i for i, one in enumerate(shared.values)},
    ).state
    version, ints, strings, int_lists, string_lists, tensors = _renamed(state, shared.names, {})
    return version, {**ints, "lazy_load": 1}, strings, int_lists, string_lists, tensors


def _renamed(state: State, names: Sequence[str], tied: Mapping[str, int]) -> State:
    """The state of a subgraph whose held tensors are called ``names``; ``tied`` are more names of
    them.
    """
    version, ints, strings, int_lists, string_lists, tensors = state
    inputs = string_lists["input_names"]
    users = len(inputs) - len(names)
    return (
        version,
        ints,
        strings,
        {**int_lists, "tied_inputs": [users + i for i in tied.values()]},
        {**string_lists, "input_names": [*inputs[:users], *names], "tied_names": list(tied)},
        tensors,
    )


def _with_initial(state: State, values: Sequence[torch.Tensor]) -> State:
    """The state of a subgraph whose held tensors are all state, with these initial values."""
    version, ints, strings, int_lists, string_lists, tensors = state
    initial = [_initial_bytes(one) for one in values]
    return (
        version,
        ints,
        strings,
        {**int_lists, "state_initial_sizes": [one.numel() for one in initial]},
        string_lists,
        {**tensors, "state_initial": torch.cat(initial)},
    )


def _writes_through(view: torch.Tensor, value: torch.Tensor) -> bool:
    same_memory = view.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    # What `copy_` asks before it writes; 1 is for elements that certainly are one in memory.
    return same_memory and torch._debug_has_internal_overlap(view) != 1


def _described(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"a {dtype_name(dtype)} tensor of shape {list(shape)}"
