"""From a callable and example inputs to an executable.

`compile_executable` is the entry. Each compiler is a module of its own (`inductor`, `torchscript`)
with a function of ``(flat, tensors, options, workdir)`` that returns a `CompiledExecutable`;
another compiler is one more module and one more branch of `_run`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from neuron_ext._structure import Inputs
from neuron_ext._subgraphs import find_subgraphs
from neuron_ext.compiler.args import CompilerOptions
from neuron_ext.compiler.executable import (
    CompiledExecutable,
    CompilerUnusableError,
    UnsupportedOperatorsError,
)
from neuron_ext.compiler.flat_module import (
    FlatModule,
    fresh_inputs,
    nesting_refused,
    run_once,
    warn_of_training,
)
from neuron_ext.compiler.held import HeldPlan
from neuron_ext.compiler.held_module import HeldModule
from neuron_ext.compiler.progress import Progress

__all__ = ["COMPILERS", "CompiledExecutable", "check_compiler", "compile_executable", "quiet"]

COMPILERS = ("inductor", "torchscript", "neuronx-cc")

_log = logging.getLogger("neuron_ext")

# TorchInductor, torch.jit and warning filters keep process-global state: one compile at a time.
_compile_lock = threading.RLock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold the compile lock with warnings off; what PyTorch warns of in our own calls is no news to
    a user.
    """
    thread = threading.get_ident()

    def wanted(record: logging.LogRecord) -> bool:
        ours = (
            record.thread == thread
            and record.name.startswith("torch")
            and record.levelno == logging.WARNING
        )
        return not ours

    with _compile_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Loggers below "torch" have handlers of their own.
        loggers = [
            logger
            for name, logger in list(logging.root.manager.loggerDict.items())
            if isinstance(logger, logging.Logger) and name.partition(".")[0] == "torch"
        ]
        handlers = {handler for logger in (logging.root, *loggers) for handler in logger.handlers}
        for handler in handlers:
            handler.addFilter(wanted)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(wanted)


def check_compiler(compiler: str | None) -> None:
    """Raise for a ``compiler`` that does not exist (ValueError) or is not there (RuntimeError)."""
    if compiler is not None and compiler not in COMPILERS:
        raise ValueError(
            f"compiler={compiler!r} is unknown; expected one of {', '.join(map(repr, COMPILERS))}, "
            "or None to let the machine decide"
        )
    if compiler == "neuronx-cc":
        raise RuntimeError(
            "compiler='neuronx-cc' is not available in this version; use 'inductor' or "
            "'torchscript'"
        )


def compile_executable(
    func: Callable[..., Any],
    inputs: Inputs,
    tensors: Sequence[torch.Tensor],
    *,
    compiler: str | None,
    options: CompilerOptions,
    workdir: Path | None,
    held: HeldPlan | None = None,
) -> CompiledExecutable:
    """Compile func for flat inputs of exactly these shapes and dtypes.

    Args:
        func: what to compile; not changed.
        inputs: how func's arguments are made of the flat tensors.
        tensors: flat example inputs, dense CPU tensors; not changed.
        compiler: one of `COMPILERS`, or None for inductor where it works and torchscript elsewhere.
        options: parsed compiler flags.
        workdir: an existing directory for what a compiler leaves to look at, or None to keep
            nothing.
        held: the tensors that the module will hold, if any; they stand last among ``tensors``.

    Raises:
        ValueError: if func changes its own state, or returns what TorchScript cannot hold.
        RuntimeError: if func fails, cannot be traced, or the compiler cannot do it.

    Safe from any thread; compiles run one after another.
    """
    check_compiler(compiler)
    with _compile_lock, _verbosity(options.verbose):
        for level, note in options.notes:
            _log.log(level, "%s", note)
        if held is None:
            flat = FlatModule(func, inputs, options)
        else:
            flat = HeldModule(func, inputs, options, held)
        warn_of_training(func, list(flat.parts))
        with _isolated(), _own_random_state(), quiet():
            first = run_once(flat, tensors)
            flat.check_first_run()
        executable = None
        if compiler != "torchscript":
            try:
                executable = _run_inductor(flat, tensors, options, workdir)
            except (CompilerUnusableError, UnsupportedOperatorsError) as error:
                if compiler is not None:
                    raise _refusal(flat, error) from error
                _log.warning(
                    "%s is compiled with compiler='torchscript': %s", flat.name, _reason(error)
                )
        if executable is None:
            executable = _run("torchscript", flat, tensors, options, workdir)
        executable.mutated_inputs = tuple(
            sorted({*executable.mutated_inputs, *first.mutated_inputs})
        )
        if workdir is not None:
            _write_options(workdir, flat, executable, options)
        return executable


def _run_inductor(
    flat: FlatModule,
    tensors: Sequence[torch.Tensor],
    options: CompilerOptions,
    workdir: Path | None,
) -> CompiledExecutable:
    problem = _script_problem(flat)
    if problem is not None:
        raise CompilerUnusableError(problem)
    return _run("inductor", flat, tensors, options, workdir)


def _reason(error: CompilerUnusableError | UnsupportedOperatorsError) -> str:
    if isinstance(error, UnsupportedOperatorsError):
        return f"natively compiled code cannot call the operators {', '.join(error.operators)}"
    return str(error)


def _refusal(
    flat: FlatModule, error: CompilerUnusableError | UnsupportedOperatorsError
) -> RuntimeError | ValueError:
    """What to raise where the caller wants inductor and nothing else."""
    if find_subgraphs(flat):
        return nesting_refused(flat.name)  # no other compiler would do either
    if isinstance(error, UnsupportedOperatorsError):
        return RuntimeError(
            f"compiler='inductor' cannot compile {flat.name}: these operators have no native entry "
            f"point: {', '.join(error.operators)}. Use compiler='torchscript' for it"
        )
    return RuntimeError(
        f"compiler='inductor' cannot be used for {flat.name}: {error}. compiler='torchscript' "
        "works without a C++ compiler and takes scripted code"
    )


def _script_problem(flat: FlatModule) -> str | None:
    scripted = (torch.jit.ScriptModule, torch.jit.ScriptFunction)
    if isinstance(flat.func, scripted) or any(
        isinstance(part, scripted) for part in flat.modules()
    ):
        return "it is or holds a ScriptModule, which TorchInductor cannot read"
    return None


def _run(
    compiler: str,
    flat: FlatModule,
    tensors: Sequence[torch.Tensor],
    options: CompilerOptions,
    workdir: Path | None,
) -> CompiledExecutable:
    # A compiler that is not asked for is not imported: TorchInductor takes seconds to import.
    compile_with: Callable[..., CompiledExecutable]
    if compiler == "inductor":
        from neuron_ext.compiler.inductor import compile_inductor as compile_with
    else:
        from neuron_ext.compiler.torchscript import compile_torchscript as compile_with
    with _isolated(), _own_random_state(), quiet(), Progress(f"{flat.name} ({compiler})"):
        return compile_with(flat, fresh_inputs(tensors), options, workdir)


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """No gradients and no inference mode inside; the caller's modes and thread count are back
    afterwards.
    """
    threads = torch.get_num_threads()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def _own_random_state() -> Iterator[None]:
    """What func draws while it is traced does not change what the caller draws next."""
    with torch.random.fork_rng(devices=[]):
        yield


@contextlib.contextmanager
def _verbosity(verbose: str | None) -> Iterator[None]:
    """The log level that ``--verbose`` asks for, shown on stderr where no handler is set up."""
    if verbose is None:
        yield
        return
    level = _log.level
    handler = None
    if not _log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
        _log.addHandler(handler)
    _log.setLevel(verbose.upper())
    try:
        yield
    finally:
        _log.setLevel(level)
        if handler is not None:
            _log.removeHandler(handler)


def _write_options(
    workdir: Path, flat: FlatModule, executable: CompiledExecutable, options: CompilerOptions
) -> None:
    record = {
        "func": flat.name,
        "format": executable.format,
        "torch_version": torch.__version__,
        "compiler_args": list(options.raw),
        "auto_cast": options.auto_cast,
        "cast_dtype": None if options.cast_dtype is None else str(options.cast_dtype),
        "optlevel": options.optlevel,
        **executable.details,
    }
    Path(workdir, "options.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
