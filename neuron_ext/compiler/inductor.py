"""The inductor compiler: native code for this machine's CPUs, made by AOTInductor.

The program is exported, compiled to a shared library whose weights stand beside it in one blob, and
read back as tensors. Nothing stays on disk but TorchInductor's own cache and what a
``compiler_workdir`` keeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from neuron_ext.compiler import constants as constants_reader
from neuron_ext.compiler.args import CompilerOptions
from neuron_ext.compiler.executable import (
    CompiledExecutable,
    UnsupportedOperatorsError,
)
from neuron_ext.compiler.flat_module import FlatModule, mutated_state_error, public_name
from neuron_ext.compiler.toolchain import head, strip_library, tail
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
        RuntimeError: if func cannot be exported, or the compile fails, with that error as the
            cause.
    """
    if flat.outputs is None:
        raise AssertionError("run_once has to come first")
    program = _export(flat, tensors)
    if workdir is not None:
        Path(workdir, "program.txt").write_text(str(program) + "\n")
    settings = {**_SETTINGS, **_BY_OPTLEVEL[options.optlevel]}
    with tempfile.TemporaryDirectory(prefix="neuron_ext-compile-") as folder:
        try:
            files = _compile(flat, program, settings, folder)
        finally:
            if workdir is not None:
                _keep(Path(folder), workdir)
        executable = _read(flat, files)
        if workdir is not None:
            shutil.copyfile(_only(files, ".so"), Path(workdir, "model.so"))
    executable.mutated_inputs = _mutated_inputs(program)
    executable.details = {"inductor_settings": settings}
    if options.portable_graph:
        executable.graph = trace_graph(flat, tensors)
        if workdir is not None:
            Path(workdir, "graph.pt").write_bytes(executable.graph.numpy().tobytes())
    return executable


def _export(flat: FlatModule, tensors: Sequence[torch.Tensor]) -> torch.export.ExportedProgram:
    try:
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


def _mutated_inputs(program: torch.export.ExportedProgram) -> tuple[int, ...]:
    names = list(program.graph_signature.user_inputs)
    return tuple(
        sorted(
            {names.index(name) for name in program.graph_signature.user_inputs_to_mutate.values()}
        )
    )


def _compile(
    flat: FlatModule, program: torch.export.ExportedProgram, settings: dict[str, Any], folder: str
) -> list[Path]:
    """Run AOTInductor with its output in ``folder``; the files that belong to the result."""
    from torch import _inductor as inductor
    from torch._inductor import config

    module = program.module(check_guards=False)
    example_args, example_kwargs = program.example_inputs or ((), {})
    everything = {**settings, "aot_inductor.metadata": {}, "aot_inductor.output_path": folder}
    try:
        with config.patch(everything), _silent_autotuning():
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


def _only(files: Sequence[Path], ending: str) -> Path:
    matching = [path for path in files if path.name.endswith(ending)]
    if len(matching) != 1:
        raise RuntimeError(
            f"AOTInductor of torch {torch.__version__} left {len(matching)} files that end in "
            f"{ending!r}, expected one; use compiler='torchscript', or the torch version that "
            "this package was made for"
        )
    return matching[0]


def _read(flat: FlatModule, files: Sequence[Path]) -> CompiledExecutable:
    """Read code and weights out of the files that AOTInductor wrote."""
    wrapper = _only(files, ".wrapper.cpp")
    nodes = wrapper.with_suffix(".json")
    if nodes in files:
        raise UnsupportedOperatorsError(_operators(nodes))
    library = _only(files, ".so")
    strip_library(library)
    blobs = [path for path in files if path.name.endswith("_weights.blob")]
    blob = _read_bytes(blobs[0]) if blobs else torch.empty(0, dtype=torch.uint8)
    constants, weights = constants_reader.read_constants(wrapper.read_text(), blob)
    constants = [dataclasses.replace(one, fqn=public_name(flat, one.fqn)) for one in constants]
    if flat.outputs is None:
        raise AssertionError("run_once has to come first")
    return CompiledExecutable(
        "inductor",
        flat.outputs,
        code=_read_bytes(library),
        weights=weights if constants else None,
        constants=constants,
    )


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
