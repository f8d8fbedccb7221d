"""The inductor compiler: native code for this machine's CPUs, made by AOTInductor.

The program is exported, compiled to a shared library whose weights stand beside it in one blob, and
read back as tensors; or the same is taken from the compile cache. Nothing else stays on disk but
TorchInductor's own cache and what a ``compiler_workdir`` keeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import logging
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from neuron_ext._library import ops
from neuron_ext.compiler import constants as constants_reader
from neuron_ext.compiler import toolchain
from neuron_ext.compiler.args import CompilerOptions
from neuron_ext.compiler.cache import open_store
from neuron_ext.compiler.cached_compile import cached_compile
from neuron_ext.compiler.executable import (
    CompiledExecutable,
    CompilerUnusableError,
    NativeCode,
    UnsupportedOperatorsError,
)
from neuron_ext.compiler.flat_module import FlatModule, mutated_state_error, public_name
from neuron_ext.compiler.scratch import scratch_folder
from neuron_ext.compiler.toolchain import head, tail
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
_KEPT_NAMES = {
    ".wrapper.cpp": "wrapper.cpp",
    ".kernel.cpp": "kernel.cpp",
    ".wrapper.so": "model.so",
    "_weights.blob": "weights.blob",
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
        _require_cpp_compiler()
    try:
        program = _export(flat, tensors, with_lines=workdir is not None)
    except RuntimeError:
        # Where nothing can be compiled, that is what matters; else it is looked at when needed.
        _require_cpp_compiler()
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
            lambda: _compile_native(
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


def _require_cpp_compiler() -> None:
    problem = toolchain.cpp_compiler_problem()
    if problem is not None:
        raise CompilerUnusableError(problem)


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


def _compile_native(
    flat: FlatModule,
    program: torch.export.ExportedProgram,
    settings: dict[str, Any],
    workdir: Path | None,
    *,
    few_rows: bool,
    tiled: bool,
) -> NativeCode:
    _require_cpp_compiler()
    with scratch_folder("compile") as folder:
        try:
            files = _compile(flat, program, settings, folder, few_rows=few_rows, tiled=tiled)
        finally:
            if workdir is not None:
                _keep(Path(folder), workdir)
        native = _read(files)
        if workdir is not None:
            shutil.copyfile(_only(files, ".so"), Path(workdir, "model.so"))
    return native


def _compile(
    flat: FlatModule,
    program: torch.export.ExportedProgram,
    settings: dict[str, Any],
    folder: str,
    *,
    few_rows: bool,
    tiled: bool,
) -> list[Path]:
    """Run AOTInductor with its output in ``folder``; the files that belong to the result."""
    from torch import _inductor as inductor
    from torch._inductor import config

    module = program.module(check_guards=False)
    example_args, example_kwargs = program.example_inputs or ((), {})
    everything = {**settings, "aot_inductor.metadata": {}, "aot_inductor.output_path": folder}
    try:
        from neuron_ext.compiler.convolutions import convolutions_as_products
        from neuron_ext.compiler.products import few_rows_products

        with (
            config.patch(everything),
            _silent_autotuning(),
            _hidden_symbols(folder),
            few_rows_products() if few_rows else contextlib.nullcontext(),
            convolutions_as_products(tiled=tiled),
        ):
            files: Any = inductor.aot_compile(
                module, example_args, example_kwargs, options=everything
            )
    except Exception as error:
        raise RuntimeError(
            f"compiling {flat.name} with compiler='inductor' failed: "
            f"{_cause_of(error)}. compiler='torchscript' needs no C++ compiler; "
            "compiler_workdir keeps the generated code to look at"
        ) from error
    return [Path(name) for name in files if isinstance(name, str)]


def _cause_of(error: BaseException) -> str:
    """What the C++ compiler said, where that is the reason, else the error's own text."""
    seen: BaseException | None = error
    while seen is not None:
        output = getattr(seen, "output", None)
        if isinstance(output, str) and output.strip():
            return tail(output)
        seen = seen.__cause__ or seen.__context__
    return head(str(error))


@contextlib.contextmanager
def _silent_autotuning() -> Iterator[None]:
    """Autotuning reports on stderr whatever the log level; no configuration turns that off."""
    from torch._inductor import select_algorithm

    before = getattr(select_algorithm, "PRINT_AUTOTUNE", None)
    if before is None:
        yield
        return
    select_algorithm.PRINT_AUTOTUNE = False
    try:
        yield
    finally:
        select_algorithm.PRINT_AUTOTUNE = before


@contextlib.contextmanager
def _hidden_symbols(folder: str) -> Iterator[None]:
    """Link so that the library exports AOTInductor's C interface alone, and no stack can execute.

    Hundreds of instances of templates are exported otherwise, which is a quarter of the library and
    a third of the time to load it. No configuration reaches the linker.
    """
    codecache: Any = importlib.import_module("torch._inductor.codecache")
    builder = getattr(codecache, "CppBuilder", None)
    if builder is None:
        yield
        return
    script = Path(folder, "exports.map")
    script.write_text("{ global: AOTInductor*; local: *; };\n")

    def build(*args: Any, **kwargs: Any) -> Any:
        # Only where our objects are linked: other threads may be in here, too.
        if isinstance(kwargs.get("sources"), list) and kwargs.get("output_dir") == folder:
            arguments = getattr(kwargs.get("BuildOption"), "_passthrough_args", None)
            if isinstance(arguments, list):
                arguments.append(f"-Wl,--version-script={shlex.quote(str(script))}")
                # The object that holds constants does not say that it needs no executable stack;
                # mapping such a library would make every stack of the process executable, and
                # newer systems refuse to.
                arguments.append("-Wl,-z,noexecstack")
        return builder(*args, **kwargs)

    codecache.CppBuilder = build
    try:
        yield
    finally:
        codecache.CppBuilder = builder


def _only(files: Sequence[Path], ending: str) -> Path:
    matching = [path for path in files if path.name.endswith(ending)]
    if len(matching) != 1:
        raise RuntimeError(
            f"AOTInductor of torch {torch.__version__} left {len(matching)} files that end in "
            f"{ending!r}, expected one; use compiler='torchscript', or the torch version that "
            "this package was made for"
        )
    return matching[0]


def _read(files: Sequence[Path]) -> NativeCode:
    """Read code and weights out of the files that AOTInductor wrote."""
    wrapper = _only(files, ".wrapper.cpp")
    nodes = wrapper.with_suffix(".json")
    if nodes in files:
        raise UnsupportedOperatorsError(_operators(nodes))
    library = _only(files, ".so")
    toolchain.strip_library(library)
    blobs = [path for path in files if path.name.endswith("_weights.blob")]
    blob = _read_bytes(blobs[0]) if blobs else torch.empty(0, dtype=torch.uint8)
    constants, weights = constants_reader.read_constants(wrapper.read_text(), blob)
    return NativeCode(_read_bytes(library), weights if constants else None, constants)


def _read_bytes(path: Path) -> torch.Tensor:
    """The file as a uint8 tensor, whose memory is aligned as compiled code expects its weights."""
    data = torch.empty(path.stat().st_size, dtype=torch.uint8)
    with path.open("rb") as file:
        # A file object may read less than asked for when the file is large.
        view = memoryview(data.numpy().data)
        while len(view):
            count = file.readinto(view)
            if not count:
                raise RuntimeError(f"{path.name} became shorter while it was read; try again")
            view = view[count:]
    return data


def _operators(nodes: Path) -> list[str]:
    """The names in the list of operators that AOTInductor leaves to a "proxy executor"."""
    try:
        content = json.loads(nodes.read_text())
        return sorted({str(node["node"]["target"]) for node in content["nodes"]})
    except (ValueError, KeyError, TypeError):
        return ["(not named)"]


def _keep(folder: Path, workdir: Path) -> None:
    for path in sorted(folder.rglob("*")):
        for ending, name in _KEPT_NAMES.items():
            if path.name.endswith(ending):
                shutil.copyfile(path, os.path.join(workdir, name))
