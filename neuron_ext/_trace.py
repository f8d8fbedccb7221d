"""``trace``: from a callable to a ScriptModule with one compiled subgraph in it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuron_ext import _structure
from neuron_ext._version import __version__
from neuron_ext.compiler import CompiledExecutable, check_compiler, compile_executable, quiet
from neuron_ext.compiler.args import parse_compiler_args
from neuron_ext.compiler.flat_module import dtype_name
from neuron_ext.compiler.held import HeldTensor, add_held_fields, plan_held
from neuron_ext.compiler.naming import argument_names, callable_name
from neuron_ext.compiler.script_module import build_script_module

_STATE_VERSION = 1

State = tuple[
    int,
    dict[str, int],
    dict[str, str],
    dict[str, list[int]],
    dict[str, list[str]],
    dict[str, torch.Tensor],
]


def trace(
    func: Callable[..., Any],
    example_inputs: Any,
    *,
    input_output_aliases: Mapping[Any, Any] = {},  # read only
    compiler_workdir: str | os.PathLike[str] | None = None,
    compiler_args: str | Sequence[str] | None = None,
    partitioner_config: Any = None,
    inline_weights_to_neff: bool = True,
    cpu_backend: bool = False,
    compiler: str | None = None,
) -> torch.jit.ScriptModule:
    """Compile ``func`` for inputs like ``example_inputs`` and return it as a ScriptModule, ready to
    run and save.

    The traced module takes CPU tensors of exactly the shapes and dtypes of the example inputs, in
    the same containers, and returns what ``func`` returns, as far as TorchScript has types for it:
    tensors, numbers and strings, tuples, named tuples, and lists and dicts of one type. Dataclasses
    and dict-like outputs become dicts. Control flow is fixed at what the example inputs take. No
    core is taken before the first use, and ``func``, its modules and the example inputs are left as
    they were.

    Args:
        func: a module, function, bound method, ``functools.partial`` or lambda. Modules that it
            reaches become part of the result. A ScriptModule is taken by
            ``compiler="torchscript"``.
        example_inputs: a tensor or a dict, which is the one argument of ``func``, or a tuple or
            list with one item per argument; an argument is a tensor or a nested tuple, list or dict
            of tensors.
        input_output_aliases: from state tensors to the index of the flat output that is their next
            value. A state is a parameter or buffer of ``func``, or one of the example input
            tensors, told by identity; it has the shape and dtype of its output. The traced module
            holds it, each successful call updates it, and neither it nor its output is an argument
            or result any more. ``docs/weights_and_state.md`` has the rules.
        compiler_workdir: a directory, made if missing, that keeps what the compiler wrote: the
            exported program, generated code, weights and options. Files of an earlier trace in it
            are overwritten. Such a trace always compiles, whatever the compile cache holds.
        compiler_args: flags in the spelling of ``neuronx-cc``, as one string or a list. Honoured
            are ``--auto-cast``, ``--auto-cast-type bf16|fp16``, ``-O``/``--optlevel`` and
            ``--verbose``, and this package's own ``--portable-graph``, which embeds a TorchScript
            graph beside native code. ``-O1`` is quick to compile, and multiplies every window of a
            convolution; ``-O2``, the default, may compute 3x3 windows by tiles of 4x4 pixels, where
            a pixel that is infinite reaches results beside its windows; ``-O3`` tunes products on
            this machine. Any other documented flag is accepted and has no effect, which one log
            line says.
        partitioner_config: a ``PartitionerConfig``: operators that cannot be in a subgraph, and
            those that it names, run on the CPU between several subgraphs. ``docs/partitioner.md``
            says what is cut where.
        inline_weights_to_neff: False to leave parameters and persistent buffers as tensors in the
            traced module, under their names in the state dict, for `replace_weights`. Weights
            cannot be folded and packed into the code then, which makes it slower.
        cpu_backend: accepted; tracing always runs on the CPU.
        compiler: ``"inductor"`` for native code, ``"torchscript"`` for a portable graph, or None:
            inductor where a C++ compiler works and ``func`` allows it, else torchscript, which a
            log line says.

    Returns:
        A ScriptModule in eval mode, whose attribute ``subgraph`` is the ``NeuronSubgraph``. With a
        ``partitioner_config``, and where the model was cut, its submodules ``neuron_0``, ``cpu_1``,
        ... are the parts in the order in which they run; each ``neuron_`` one has a ``subgraph``.

    Raises:
        ValueError: for example inputs, flags or options that cannot be used, a ``func`` that
            changes buffers that are no aliased state, aliases and names of held tensors that cannot
            be, and outputs that TorchScript has no type for.
        TypeError: if ``func`` is not callable.
        RuntimeError: if ``func`` fails, cannot be traced or compiled here, or a variable of the
            compile cache has a value that means nothing.

    Native code is kept in the compile cache: tracing the same model again, with the same weights,
    shapes, flags and settings, takes it from there, in any process of the user. The environment
    variables ``NEURON_EXT_CACHE``, ``NEURON_EXT_CACHE_DIR`` and ``NEURON_EXT_CACHE_MAX_GB`` say
    whether, where and how much; ``docs/compile_cache.md`` has the details.

    Thread-safety: may be called from any thread; compiles run one after another.
    """
    _check_options(
        func, input_output_aliases, partitioner_config, inline_weights_to_neff, cpu_backend
    )
    if partitioner_config is not None:
        from neuron_ext.partition.stitch import trace_partitioned

        check_compiler(compiler)
        inputs, tensors = _read_arguments(func, example_inputs)
        return trace_partitioned(
            func,
            inputs,
            tensors,
            partitioner_config,
            compiler=compiler,
            compiler_args=compiler_args,
            compiler_workdir=compiler_workdir,
            cpu_backend=cpu_backend,
        )
    parts = trace_parts(
        func,
        example_inputs,
        compiler_workdir=compiler_workdir,
        compiler_args=compiler_args,
        compiler=compiler,
        input_output_aliases=input_output_aliases,
        inline_weights_to_neff=inline_weights_to_neff,
    )
    subgraph = _make_subgraph(parts.state)
    with quiet():
        return build_script_module(parts.name, subgraph, parts.inputs, parts.output, parts.held)


@dataclass(frozen=True)
class TraceParts:
    """What a traced module is made of: the name of its type, the state of its subgraph, the
    structures of its inputs and output, and the tensors that it holds.
    """

    name: str
    state: State
    inputs: _structure.Inputs
    output: _structure.Node
    held: tuple[HeldTensor, ...] = ()


def trace_parts(
    func: Callable[..., Any],
    example_inputs: Any,
    *,
    compiler_workdir: str | os.PathLike[str] | None,
    compiler_args: str | Sequence[str] | None,
    compiler: str | None,
    input_output_aliases: Mapping[Any, Any] | None = None,
    inline_weights_to_neff: bool = True,
    shared_weights: bool = False,
) -> TraceParts:
    """Compile a callable as `trace` does, with what that raises, up to the state of the subgraph.

    No ``NeuronSubgraph`` and no ScriptModule is made. With ``shared_weights`` they are packed alike
    whatever the shapes of the inputs.
    """
    check_compiler(compiler)
    options = dataclasses.replace(parse_compiler_args(compiler_args), shared_weights=shared_weights)
    inputs, tensors = _read_arguments(func, example_inputs)
    held = plan_held(
        func,
        inputs,
        tensors,
        input_output_aliases or {},
        separate_weights=not inline_weights_to_neff,
    )
    workdir = _make_workdir(compiler_workdir)
    name = callable_name(func)
    if held is None:
        executable = compile_executable(
            func, inputs, tensors, compiler=compiler, options=options, workdir=workdir
        )
        state = _encode(name, inputs.paths, tensors, executable)
        return TraceParts(name, state, inputs, executable.outputs.node)
    executable = compile_executable(
        func, inputs, held.tensors, compiler=compiler, options=options, workdir=workdir, held=held
    )
    state = _encode(name, held.paths, held.tensors, executable)
    add_held_fields(held, executable.outputs.node, state)
    output = held.visible_output(executable.outputs.node)
    return TraceParts(name, state, held.inputs, output, held.held)


def _read_arguments(
    func: Callable[..., Any], example_inputs: Any
) -> tuple[_structure.Inputs, list[torch.Tensor]]:
    """The structure of the arguments, and their flat tensors."""
    arguments = (
        list(example_inputs) if isinstance(example_inputs, (tuple, list)) else [example_inputs]
    )
    return _structure.read_inputs(argument_names(func, len(arguments)), arguments)


def _check_options(
    func: Any,
    input_output_aliases: Any,
    partitioner_config: Any,
    inline_weights_to_neff: Any,
    cpu_backend: Any,
) -> None:
    if not callable(func):
        raise TypeError(
            f"func must be a module or another callable, got {func!r} of type {type(func).__name__}"
        )
    for name, value in (
        ("inline_weights_to_neff", inline_weights_to_neff),
        ("cpu_backend", cpu_backend),
    ):
        if not isinstance(value, bool):
            raise ValueError(
                f"{name} must be True or False, got {value!r} of type {type(value).__name__}"
            )
    if input_output_aliases is not None and not isinstance(input_output_aliases, Mapping):
        raise ValueError(
            "input_output_aliases must be a dict from state tensors to output indices, got "
            f"{input_output_aliases!r} of type {type(input_output_aliases).__name__}"
        )
    if partitioner_config is not None:
        _check_partitioner(partitioner_config, input_output_aliases, inline_weights_to_neff)


def _check_partitioner(config: Any, aliases: Any, inline_weights: bool) -> None:
    from neuron_ext.partition import PartitionerConfig

    if not isinstance(config, PartitionerConfig):
        raise ValueError(
            f"partitioner_config must be a PartitionerConfig or None, got {config!r} of type "
            f"{type(config).__name__}"
        )
    for name, given in (
        ("input_output_aliases", bool(aliases)),
        ("inline_weights_to_neff=False", not inline_weights),
    ):
        if given:
            raise ValueError(
                f"{name} cannot be used together with a partitioner_config; leave one of them out"
            )


def _make_workdir(compiler_workdir: Any) -> Path | None:
    if compiler_workdir is None:
        return None
    if not isinstance(compiler_workdir, (str, os.PathLike)) or not os.fspath(compiler_workdir):
        raise ValueError(
            f"compiler_workdir must be the path of a directory, got {compiler_workdir!r}"
        )
    workdir = Path(os.fsdecode(compiler_workdir))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(
            f"compiler_workdir {str(workdir)!r} is a file; expected a directory"
        ) from error
    except OSError as error:
        raise RuntimeError(
            f"compiler_workdir {str(workdir)!r} cannot be made: {error}; choose another"
        ) from error
    return workdir


def _encode(
    name: str,
    paths: Sequence[str],
    tensors: Sequence[torch.Tensor],
    executable: CompiledExecutable,
) -> State:
    """The state of a new subgraph, as its constructor takes it."""
    outputs, constants = executable.outputs, executable.constants
    blobs = {"code": executable.code, "weights": executable.weights, "graph": executable.graph}
    held = {key: tensor for key, tensor in blobs.items() if tensor is not None}
    strings = {
        "name": name,
        "format": executable.format,
        "producer": f"neuron_ext {__version__}",
        "runtime": "host",
        "torch_version": torch.__version__.split("+")[0],
        **{
            f"sha256_{key}": executable.digests.get(key) or _sha256(tensor)
            for key, tensor in held.items()
        },
    }
    ints = {"lazy_load": 0, "async_load": 0, "dynamic_batch": 0, "start_nc": -1, "nc_count": -1}
    int_lists = {
        "input_ranks": [t.dim() for t in tensors],
        "input_shapes": [size for t in tensors for size in t.shape],
        "output_ranks": [len(shape) for shape in outputs.shapes],
        "output_shapes": [size for shape in outputs.shapes for size in shape],
        "mutated_inputs": list(executable.mutated_inputs),
    }
    string_lists = {
        "input_names": list(paths),
        "input_dtypes": [dtype_name(t.dtype) for t in tensors],
        "output_dtypes": [dtype_name(dtype) for dtype in outputs.dtypes],
    }
    if executable.format == "inductor":
        from neuron_ext.compiler.toolchain import cpu_features

        strings["arch"] = platform.machine()
        string_lists["cpu_features"] = list(cpu_features())
    if executable.weights is not None:
        int_lists |= {
            "constant_offsets": [c.offset for c in constants],
            "constant_sizes": [c.size for c in constants],
            "constant_ranks": [len(c.shape) for c in constants],
            "constant_shapes": [size for c in constants for size in c.shape],
            "constant_strides": [step for c in constants for step in c.stride],
            "constant_opaque_sizes": [len(c.opaque) for c in constants],
        }
        string_lists |= {
            "constant_names": [c.name for c in constants],
            "constant_dtypes": [c.dtype for c in constants],
            "constant_layouts": [c.layout for c in constants],
            "constant_fqns": [c.fqn for c in constants],
        }
        opaque = bytearray(b"".join(c.opaque for c in constants))
        if opaque:
            held["constants_opaque"] = torch.frombuffer(opaque, dtype=torch.uint8)
    return _STATE_VERSION, ints, strings, int_lists, string_lists, held


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().data).hexdigest()


def _make_subgraph(state: State) -> Any:
    """A new ``NeuronSubgraph``; it checks the state again, and takes the placement of the current
    context.
    """
    return torch.classes.neuron_ext.NeuronSubgraph(*state)
