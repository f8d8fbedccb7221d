"""The inductor compiler: native code for this machine's CPUs, made by AOTInductor.

The program is exported and compiled, or its native code is taken from the compile cache. Nothing
else stays on disk but TorchInductor's own cache and what a ``compiler_workdir`` keeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from neuron_ext._library import ops
from neuron_ext.compiler import toolchain
from neuron_ext.compiler.aot_compile import compile_native, require_cpp_compiler
from neuron_ext.compiler.args import CompilerOptions
from neuron_ext.compiler.cache import open_store
from neuron_ext.compiler.cached_compile import cached_compile
from neuron_ext.compiler.executable import CompiledExecutable
from neuron_ext.compiler.flat_module import FlatModule, mutated_state_error, public_name
from neuron_ext.compiler.toolchain import head
from neuron_ext.compiler.torchscript import trace_graph

_SETTINGS: dict[str, Any] = {
    # Folds and packs the weights: 1.2 to 1.4 times as fast on convolutions and large matrix
    # products.
    "freezing": True,
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "binary_blob",
    # A core decides at run time how many threads it has; code for a fixed number would ignore that.
    "cpp.dynamic_threads": True,
    # Stripped off in the end, and slow to make.
    "aot_inductor.enable_line_tables": False,
    "max_autotune_report_choices_stats": False,
    # TorchInductor writes into this dict; a fresh one keeps the caller's configuration clean.
    "aot_inductor.metadata": {},
    # The caller's settings for these would change the format that is read back here.
    "aot_inductor.package_cpp_only": False,
    "aot_inductor.use_runtime_constant_folding": False,
    "aot_inductor.dump_aoti_minifier": False,
}
_BY_OPTLEVEL: dict[int, dict[str, Any]] = {
    # The code around the kernels is most of what the C++ compiler reads, and little of what runs.
    1: {"aot_inductor.compile_wrapper_opt_level": "O0"},
    2: {},
    3: {
        "max_autotune": True,
        "max_autotune_gemm_backends": "CPP,ATEN",
        "aot_inductor.compile_wrapper_opt_level": "O2",
        # TorchInductor would take the headers that it precompiled for O1, on which g++ crashes.
        "aot_inductor.precompile_headers": False,
    },
}


def compile_inductor(
    flat: FlatModule,
    tensors: Sequence[torch.Tensor],
    options: CompilerOptions,
    workdir: Path | None,
) -> CompiledExecutable:
    """Export and compile func to native code.

    ``tensors`` are contiguous example inputs that func may write to.

    Raises:
        ValueError: if func changes its buffers.
        UnsupportedOperatorsError: if the code would call operators that have no C interface.
        CompilerUnusableError: if there is no C++ compiler that works, and code to be compiled.
        RuntimeError: if func cannot be exported, or the compile fails, with that error as the
            cause.
    """
    if flat.outputs is None:
        raise AssertionError("run_once has to come first")
    store = open_store()
    with _no_collections():
        importlib.import_module("torch.export._trace")
    # The generated files that a workdir is to keep are not in the store.
    reuse = workdir is None
    if store is None or not reuse or toolchain.identity(toolchain.wanted_compiler()) is None:
        require_cpp_compiler()
    try:
        program = _export(flat, tensors, with_lines=workdir is not None)
    except RuntimeError:
        # Where nothing can be compiled, that is what matters; else it is looked at when needed.
        require_cpp_compiler()
        raise
    flat.check_program(program)
    if workdir is not None:
        Path(workdir, "program.txt").write_text(str(program) + "\n")
    settings = {
        **_SETTINGS,
        **_BY_OPTLEVEL[options.optlevel],
        # Products of one input with several weights, as in attention, become one. Transformers gain
        # by that in float32; cast to bfloat16 they gain with few rows and lose with many.
        "cpp.enable_concat_linear": options.cast_dtype is None,
    }
    # They pack weights in ways of their own, which depend on the number of rows.
    few_rows = not options.shared_weights
    tiled = options.optlevel > 1
    with _threads_of_a_core():
        native = cached_compile(
            program,
            {**settings, "neuron_ext.few_rows_products": few_rows, "neuron_ext.tiled": tiled},
            lambda: compile_native(
                flat, program, settings, workdir, few_rows=few_rows, tiled=tiled
            ),
            store=store,
            reuse=reuse,
            level=logging.DEBUG if options.verbose is None else logging.INFO,
        )
    executable = CompiledExecutable(
        "inductor",
        flat.outputs,
        code=native.code,
        weights=native.weights,
        constants=[
            dataclasses.replace(one, fqn=public_name(flat, one.fqn)) for one in native.constants
        ],
        mutated_inputs=_mutated_inputs(program),
        digests=native.digests,
        details={"inductor_settings": settings},
    )
    if options.portable_graph:
        executable.graph = trace_graph(flat, tensors)
        if workdir is not None:
            Path(workdir, "graph.pt").write_bytes(executable.graph.numpy().tobytes())
    return executable


@contextlib.contextmanager
def _threads_of_a_core() -> Iterator[None]:
    """As many intra-op threads as a core of this machine has, for what the compiler fits to them:
    oneDNN would pack weights anew at each call if they were packed for another number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(ops.host_threads_per_core())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _export(
    flat: FlatModule, tensors: Sequence[torch.Tensor], *, with_lines: bool
) -> torch.export.ExportedProgram:
    """``with_lines`` to have func's lines of code in the program, and in code generated from it."""
    try:
        with _no_collections(), _lines_of_code(with_lines):
            program = torch.export.export(flat, tuple(tensors))
    except Exception as error:
        raise RuntimeError(
            f"{flat.name} cannot be exported for compiler='inductor': {head(str(error))}. Control "
            "flow or shapes that depend on the values of tensors cannot be compiled; "
            "compiler='torchscript' could work, and keeps the path that the example inputs take"
        ) from error
    mutated = sorted(program.graph_signature.buffers_to_mutate.values())
    if mutated:
        raise mutated_state_error(flat, mutated)
    return program


@contextlib.contextmanager
def _lines_of_code(wanted: bool) -> Iterator[None]:
    """To find them for each node takes a fifth of the time of an export."""
    import torch.fx.config as config

    before = config.do_not_emit_stack_traces
    config.do_not_emit_stack_traces = before or not wanted
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """The import of torch.export and the trace make a million objects that stay. Python would look
    through them again and again for garbage, for a third of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _mutated_inputs(program: torch.export.ExportedProgram) -> tuple[int, ...]:
    names = list(program.graph_signature.user_inputs)
    return tuple(
        sorted(
            {names.index(name) for name in program.graph_signature.user_inputs_to_mutate.values()}
        )
    )
