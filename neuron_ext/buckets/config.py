"""``BucketModelConfig``: how inputs are mapped to buckets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

_KERNEL_TAKES = ("List[Tensor]",)
_KERNEL_RETURNS = "Tuple[List[Tensor], Tensor]"
_PREPROCESSOR_TAKES = ("List[List[List[int]]]", "List[Tensor]", "Tensor")
_PREPROCESSOR_RETURNS = "List[Tensor]"


class BucketModelConfig:
    """How a bucket is chosen for an input, for `bucket_model_trace`.

    Behaves as the "Autobucketing" part of the "Trace" API page of the Neuron documentation says.
    Immutable by convention; safe to use from several threads and for several traces.

    Args:
        bucket_kernel: a function without arguments that returns a TorchScript function, made by
            ``torch.jit.script``. That one takes the flat list of input tensors and returns the list
            of tensors for the bucket, padded to its shapes, and a tensor of one whole number: the
            index of the bucket. Where no bucket fits it returns an empty list. ``bucket_kernel`` is
            called here, once.
        shared_state_buffer: initial values of tensors that all buckets share and update in place:
            dense CPU tensors, one for each state in the ``input_output_aliases`` of the models, in
            their order and of their dtypes. None where each bucket has a state of its own, or none.
            The module has copies, as its buffers ``state_0``, ``state_1``, ...
        shared_state_buffer_preprocessor: a function without arguments that returns a TorchScript
            function. That one takes the shapes of the states of each bucket
            (``List[List[List[int]]]``: of bucket, state, dimension), the shared buffers and the
            index tensor of ``bucket_kernel``, and returns what the bucket takes: for each buffer a
            view of it (slices, reshapes), of the shape that the state has in the model. What it
            takes depends on the shapes and the index alone. Without it each bucket takes the whole
            buffers. It has no effect without ``shared_state_buffer``.
        func_kwargs: keyword arguments for ``func`` of `bucket_model_trace`: one dict for all
            buckets, or a list with one dict per bucket. None means none.

    Raises:
        ValueError: for an argument of another kind. What ``bucket_kernel`` itself raises, and
            what ``torch.jit.script`` raises in it, comes through as it is.
    """

    def __init__(
        self,
        bucket_kernel: Callable[..., Any],
        *,
        shared_state_buffer: Sequence[torch.Tensor] | None = None,
        shared_state_buffer_preprocessor: Callable[..., Any] | None = None,
        func_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.shared_state_buffer = _check_buffers(shared_state_buffer)
        self.func_kwargs = _check_kwargs(func_kwargs)
        self.bucket_kernel = bucket_kernel
        self.scripted_kernel = _make_scripted(
            bucket_kernel, "bucket_kernel", _KERNEL_TAKES, _KERNEL_RETURNS
        )
        self.shared_state_buffer_preprocessor = shared_state_buffer_preprocessor
        self.scripted_preprocessor = (
            None
            if shared_state_buffer_preprocessor is None
            else _make_scripted(
                shared_state_buffer_preprocessor,
                "shared_state_buffer_preprocessor",
                _PREPROCESSOR_TAKES,
                _PREPROCESSOR_RETURNS,
            )
        )

    def kwargs_of_buckets(self, count: int) -> list[dict[str, Any]]:
        """The keyword arguments of ``func`` for each of ``count`` buckets.

        Raises:
            ValueError: ``func_kwargs`` is a list of another length.
        """
        if not isinstance(self.func_kwargs, list):
            return [dict(self.func_kwargs) for _ in range(count)]
        if len(self.func_kwargs) != count:
            raise ValueError(
                f"func_kwargs has {len(self.func_kwargs)} dict(s), and example_inputs has {count} "
                "bucket(s); give one dict per bucket, or one dict for all"
            )
        return [dict(one) for one in self.func_kwargs]


def _check_buffers(buffers: Any) -> list[torch.Tensor] | None:
    if buffers is None:
        return None
    if not isinstance(buffers, (list, tuple)) or not buffers:
        raise ValueError(
            f"shared_state_buffer must be a list of at least one tensor, got {buffers!r} of type "
            f"{type(buffers).__name__}"
        )
    for i, one in enumerate(buffers):
        if not isinstance(one, torch.Tensor) or one.device.type != "cpu":
            what = (
                f"a tensor on device {one.device}"
                if isinstance(one, torch.Tensor)
                else f"{one!r} of type {type(one).__name__}"
            )
            raise ValueError(f"shared_state_buffer[{i}] must be a CPU tensor, got {what}")
    return list(buffers)


def _check_kwargs(kwargs: Any) -> dict[str, Any] | list[dict[str, Any]]:
    if kwargs is None:
        return {}
    if isinstance(kwargs, Mapping):
        return _check_one_kwargs(kwargs, "func_kwargs")
    if isinstance(kwargs, (list, tuple)):
        return [_check_one_kwargs(one, f"func_kwargs[{i}]") for i, one in enumerate(kwargs)]
    raise ValueError(
        f"func_kwargs must be a dict, a list of dicts or None, got {kwargs!r} of type "
        f"{type(kwargs).__name__}"
    )


def _check_one_kwargs(kwargs: Any, what: str) -> dict[str, Any]:
    if not isinstance(kwargs, Mapping):
        raise ValueError(
            f"{what} must be a dict of keyword arguments, got {kwargs!r} of type "
            f"{type(kwargs).__name__}"
        )
    for key in kwargs:
        if not isinstance(key, str):
            raise ValueError(
                f"{what} has the key {key!r} of type {type(key).__name__}; expected the names of "
                "keyword arguments, as str"
            )
    return dict(kwargs)


def _make_scripted(factory: Any, what: str, takes: tuple[str, ...], returns: str) -> Any:
    """What ``factory`` returns: a TorchScript function, or ScriptModule, of the wanted types."""
    if isinstance(factory, (torch.jit.ScriptFunction, torch.jit.ScriptModule)):
        raise ValueError(
            f"{what} is a TorchScript function itself; expected a function without arguments that "
            "returns it, for example: lambda *_: kernel"
        )
    if not callable(factory):
        raise ValueError(
            f"{what} must be a function that returns a TorchScript function, got {factory!r} of "
            f"type {type(factory).__name__}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script warns of its own age
        scripted = factory()
    if not isinstance(scripted, (torch.jit.ScriptFunction, torch.jit.ScriptModule)):
        raise ValueError(
            f"{what} must return what torch.jit.script makes of a function, but it returned "
            f"{scripted!r} of type {type(scripted).__name__}"
        )
    function: Any = scripted.forward if isinstance(scripted, torch.nn.Module) else scripted
    schema = function.schema
    arguments = [one for one in schema.arguments if one.name != "self"]
    needed = [one for one in arguments if not one.has_default_value()]
    found = tuple(one.type.annotation_str for one in arguments[: max(len(takes), len(needed))])
    found_return = ", ".join(one.type.annotation_str for one in schema.returns)
    if found != takes or found_return != returns:
        raise ValueError(
            f"the TorchScript function of {what} must be ({', '.join(takes)}) -> {returns}, but "
            f"it is ({', '.join(found)}) -> {found_return}. TorchScript takes an argument "
            "without a type annotation for a Tensor: annotate it"
        )
    return scripted
