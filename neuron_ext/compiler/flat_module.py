"""Func as a module from flat tensors to flat tensors: the one form that all compilers take."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neuron_ext import _structure
from neuron_ext._structure import Inputs, Node
from neuron_ext.compiler.args import CompilerOptions
from neuron_ext.compiler.naming import callable_name

_log = logging.getLogger("neuron_ext")

_MAX_SEARCH_DEPTH = 4
_MAX_SEARCH_ITEMS = 1000


@dataclass(frozen=True)
class Outputs:
    """What func returns: its structure, and the shape and dtype of each flat tensor."""

    node: Node
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]


class FlatModule(torch.nn.Module):
    """Calls func with flat tensors and returns its flat tensors as a tuple.

    The modules that func reaches are submodules, so that their parameters are found by whoever
    exports this one; nothing of them is copied or changed. With a cast asked for, func runs under
    autocast, and outputs go back to the dtypes of `outputs`, which `run_once` sets and which has to
    come first. Outputs in ``copied_outputs`` are fresh tensors in each call.

    Not thread-safe.
    """

    func: Callable[..., Any]

    def __init__(self, func: Callable[..., Any], inputs: Inputs, options: CompilerOptions) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs: Outputs | None = None
        self.copied_outputs: frozenset[int] = frozenset()
        # How many of the flat tensors, from the first, a cast of inputs reaches.
        self.castable: int | None = None
        self._cast_dtype = options.cast_dtype
        self._cast_inputs = options.auto_cast == "all"
        # Past nn.Module, which would register a module: the list below does.
        self.__dict__["func"] = func
        modules, tensors = reachable(func)
        self.parts = torch.nn.ModuleList(modules)
        # The tracer takes tensors that require grad only as parameters of the module that it
        # traces.
        self.loose = torch.nn.ParameterList(t for t in tensors if isinstance(t, torch.nn.Parameter))
        # Only this wrapper: eval() would reach into the caller's modules.
        self.training = False
        self.parts.training = self.loose.training = False

    @property
    def name(self) -> str:
        """What to call func in messages and types."""
        return callable_name(self.func)

    def forward(self, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.outputs is None:
            raise AssertionError("run_once has to come first")
        if self._cast_dtype is None:
            value = self.call(flat)
        else:
            if self._cast_inputs:
                flat = tuple(
                    t.to(self._cast_dtype) if t.dtype == torch.float32 else t
                    for t in flat[: self.castable]
                ) + (() if self.castable is None else flat[self.castable :])
            # The cache of casted weights would make a trace refer to tensors of an earlier run.
            with torch.autocast("cpu", self._cast_dtype, cache_enabled=False):
                value = self.call(flat)
        dtypes = self.outputs.dtypes
        tensors = _structure.pick_leaves(value, self.outputs.node, len(dtypes))
        tensors = [
            t if t.dtype == dtype else t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)
        ]
        # Not clone(): constant folding would make a constant of that again.
        return tuple(
            torch.empty_like(t).copy_(t) if i in self.copied_outputs else t
            for i, t in enumerate(tensors)
        )

    def call(self, flat: Sequence[torch.Tensor]) -> Any:
        """Call func, without any cast, and return what it returns."""
        arguments = [_structure.rebuild(node, flat) for node in self.inputs.nodes]
        return self.func(*arguments)

    def check_first_run(self) -> None:
        """Called after `run_once`; raises ValueError for what it showed to be impossible."""

    def check_program(self, program: torch.export.ExportedProgram) -> None:
        """Called with what was exported; raises ValueError if that is not what was wanted."""

    def check_before_script(self, tensors: Sequence[torch.Tensor]) -> None:
        """Called with example inputs before a TorchScript trace; raises as `check_program`."""


@dataclass(frozen=True)
class FirstRun:
    """What one run of func showed: its outputs, and the flat inputs that it changed in place."""

    outputs: Outputs
    mutated_inputs: tuple[int, ...]


def run_once(flat: FlatModule, tensors: Sequence[torch.Tensor]) -> FirstRun:
    """Run func once as it is, on copies of the inputs and buffers, to learn its outputs; sets
    ``flat.outputs``.

    Raises:
        ValueError: if func changes buffers or parameters, or returns what a trace cannot hold.
        RuntimeError: if func itself fails, with its error as the cause.
    """
    copies = fresh_inputs(tensors)
    # A changed buffer must not stay changed in the caller's model.
    buffers = {f"flat.{name}": buffer.detach().clone() for name, buffer in flat.named_buffers()}
    given = dict(buffers)
    before = [_version(t) for t in copies]
    parameter_versions = {name: _version(parameter) for name, parameter in flat.named_parameters()}
    try:
        value = torch.func.functional_call(_Caller(flat), buffers, copies)
    except Exception as error:
        raise RuntimeError(
            f"{flat.name} failed when it was run on the example inputs: {type(error).__name__}: "
            f"{error}. Check that it runs by itself with inputs of "
            f"{describe_inputs(flat.inputs, tensors)}"
        ) from error
    # functional_call puts a buffer that func replaced into the dict. Values are compared since
    # versions do not tell: batch normalisation changes its statistics without a new version.
    original = dict(flat.named_buffers())
    changed = [
        name
        for name in original
        if buffers[f"flat.{name}"] is not given[f"flat.{name}"]
        or not same_bytes(original[name], given[f"flat.{name}"])
    ]
    changed += [
        name for name, p in flat.named_parameters() if _version(p) != parameter_versions[name]
    ]
    if changed:
        raise mutated_state_error(flat, changed)
    node, leaves = _structure.read_outputs(value)
    for i, leaf in enumerate(leaves):
        if leaf.device.type != "cpu" or leaf.layout != torch.strided or leaf.is_quantized:
            raise ValueError(
                f"output tensor {i} of {flat.name} is on device {leaf.device} with layout "
                f"{leaf.layout}; expected a dense CPU tensor: convert it inside func"
            )
    flat.outputs = Outputs(
        node, tuple(tuple(t.shape) for t in leaves), tuple(t.dtype for t in leaves)
    )
    mutated = tuple(
        i
        for i, (t, version) in enumerate(zip(copies, before, strict=True))
        if _version(t) != version
    )
    return FirstRun(flat.outputs, mutated)


class _Caller(torch.nn.Module):
    """Calls `FlatModule.call`, which `torch.func.functional_call` cannot do by itself."""

    def __init__(self, flat: FlatModule) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.flat.call(tensors)


def mutated_state_error(flat: FlatModule, names: Sequence[str]) -> ValueError:
    """The error for a func that changes its state; ``names`` are those of `FlatModule`."""
    shown = ", ".join(repr(public_name(flat, name)) for name in names[:5]) + (
        ", ..." if len(names) > 5 else ""
    )
    kind = "parameter" if names[0] in dict(flat.named_parameters()) else "buffer"
    return ValueError(
        f"{flat.name} changes its {kind} {shown} in place, and a traced module keeps no state "
        "between calls; call model.eval() before tracing, or return the new state as an output "
        "and pass it in as an input"
    )


def public_name(flat: FlatModule, name: str) -> str:
    """The name of a parameter or buffer of ``flat``, as the caller of a module knows it."""
    return name.removeprefix("parts.0.") if isinstance(flat.func, torch.nn.Module) else name


def fresh_inputs(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Detached contiguous copies: compiled code is specialised on strides, and func may write to
    them.
    """
    return tuple(t.detach().clone(memory_format=torch.contiguous_format) for t in tensors)


def describe_inputs(inputs: Inputs, tensors: Sequence[torch.Tensor]) -> str:
    """Shapes and dtypes of the inputs, for messages."""
    return ", ".join(
        f"{path}: {dtype_name(t.dtype)}{list(t.shape)}"
        for path, t in zip(inputs.paths, tensors, strict=False)  # held tensors stand last
    )


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, so that NaN equals NaN."""
    return one.shape == other.shape and torch.equal(
        one.detach().reshape(-1).contiguous().view(torch.uint8),
        other.detach().reshape(-1).contiguous().view(torch.uint8),
    )


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def reachable(func: Callable[..., Any]) -> tuple[list[torch.nn.Module], list[torch.Tensor]]:
    """The modules that func can reach, none of them part of another, and the tensors outside of
    modules.

    Looks through partials, bound methods, closures, defaults, the globals that a function names,
    containers, and the attributes of other objects, a few levels deep. Nothing is listed twice.
    """
    modules: list[torch.nn.Module] = []
    tensors: list[torch.Tensor] = []
    _search(func, modules, tensors, set(), 0)
    inner = {id(part) for module in modules for part in module.modules() if part is not module}
    owned = {id(parameter) for module in modules for parameter in module.parameters()}
    return (
        [module for module in modules if id(module) not in inner],
        [tensor for tensor in tensors if id(tensor) not in owned],
    )


def _search(
    value: Any,
    modules: list[torch.nn.Module],
    tensors: list[torch.Tensor],
    seen: set[int],
    depth: int,
) -> None:
    if depth > _MAX_SEARCH_DEPTH or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.nn.Module):
        modules.append(value)
    elif isinstance(value, torch.Tensor):
        tensors.append(value)
    else:
        for inner in _contents(value):
            _search(inner, modules, tensors, seen, depth + 1)


def _contents(value: Any) -> Iterator[Any]:
    if isinstance(value, functools.partial):
        yield value.func
        yield from value.args
        yield from value.keywords.values()
    elif isinstance(value, types.MethodType):
        yield value.__self__
        yield value.__func__
    elif isinstance(value, types.FunctionType):
        yield from _reached_by(value)
    elif isinstance(value, (list, tuple, set, frozenset, dict)):
        if len(value) <= _MAX_SEARCH_ITEMS:
            yield from value.values() if isinstance(value, dict) else value
    elif not isinstance(value, (type, types.ModuleType, str, bytes)):
        yield from getattr(value, "__dict__", {}).values()
        call = type(value).__dict__.get("__call__")
        if isinstance(call, types.FunctionType):
            yield call


def _reached_by(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that is not set yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        yield wrapped
    for name in sorted(_global_names(function.__code__)):
        if name in function.__globals__:
            yield function.__globals__[name]


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):  # a lambda or comprehension inside
            names |= _global_names(constant)
    return names


def warn_of_training(func: Callable[..., Any], modules: Sequence[torch.nn.Module]) -> None:
    """One log line if func contains layers that behave differently in training, and is in training
    mode.
    """
    layers = (torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._NormBase)
    active = sorted(
        {
            type(part).__name__
            for module in modules
            for part in module.modules()
            if isinstance(part, layers) and part.training
        }
    )
    if active:
        _log.warning(
            "%s is traced in training mode, with %s active; call model.eval() before tracing for "
            "inference",
            callable_name(func),
            ", ".join(active),
        )


def nesting_refused(name: str) -> ValueError:
    """An inference inside another one would wait for a core while it holds one."""
    return ValueError(
        f"{name} calls a module that is traced already: trace the model as a whole, or call the "
        "traced modules one after the other from a torch.jit.script module"
    )
