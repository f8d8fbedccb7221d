"""Runs AOTInductor on an exported program, and reads back what it wrote.

That is a shared library, whose weights stand beside it in one blob. Both are kept as tensors.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from neuron_ext.compiler import constants as constants_reader
from neuron_ext.compiler import toolchain
from neuron_ext.compiler.executable import (
    CompilerUnusableError,
    NativeCode,
    UnsupportedOperatorsError,
)
from neuron_ext.compiler.flat_module import FlatModule
from neuron_ext.compiler.scratch import scratch_folder
from neuron_ext.compiler.toolchain import head, tail

_KEPT_NAMES = {
    ".wrapper.cpp": "wrapper.cpp",
    ".kernel.cpp": "kernel.cpp",
    ".wrapper.so": "model.so",
    "_weights.blob": "weights.blob",
}


def require_cpp_compiler() -> None:
    """Raises CompilerUnusableError if there is no C++ compiler that works."""
    problem = toolchain.cpp_compiler_problem()
    if problem is not None:
        raise CompilerUnusableError(problem)


def compile_native(
    flat: FlatModule,
    program: torch.export.ExportedProgram,
    settings: dict[str, Any],
    workdir: Path | None,
    *,
    few_rows: bool,
    tiled: bool,
) -> NativeCode:
    """Code and weights of ``program``, for this machine's CPUs.

    Args:
        flat: what the program was exported from, for its name in errors.
        program: not changed.
        settings: of TorchInductor, over those in force.
        workdir: where to leave the generated files, or None.
        few_rows: whether products of few rows may be this package's own, see `products`.
        tiled: whether convolutions of many pixels may be, too, see `convolutions`.

    Raises:
        UnsupportedOperatorsError: if the code would call operators that have no C interface.
        CompilerUnusableError: if there is no C++ compiler that works.
        RuntimeError: if the compile fails, with that error as the cause.
    """
    require_cpp_compiler()
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
