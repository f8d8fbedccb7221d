"""Compiler flags in the spelling of the ``neuronx-cc`` command line.

`parse_compiler_args` turns what a caller gave as ``compiler_args`` into `CompilerOptions`. It only
reads and checks; nothing is logged here: the lines to log stand in `CompilerOptions.notes`, so that
the caller can log them once, at the verbosity the flags themselves ask for.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_AUTO_CAST_DTYPES: dict[str, torch.dtype | None] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": None,
    "fp8_e4m3": None,
}
_DOWNCAST_OPS = frozenset({"dot", "scatter", "all_reduce", "reduce_scatter", "pow"})


@dataclass(frozen=True)
class CompilerOptions:
    """What the flags ask of a compiler. Immutable, so free to share between threads.

    Attributes:
        auto_cast: ``"none"``, ``"matmult"`` or ``"all"``.
        cast_dtype: dtype that float32 operations are cast to, or None for no cast at all.
        optlevel: 1 (quick to compile), 2 (default) or 3 (slow to compile, tuned on this machine).
        verbose: None, or one of ``debug``, ``info``, ``warning``, ``error``, ``critical``.
        portable_graph: embed a TorchScript graph beside native code.
        notes: ``(logging level, message)``, one for each flag that has no effect here.
        raw: the flags as given, split into words.
        shared_weights: not a flag: whether weights are packed alike for every number of rows, which
            lets subgraphs for other shapes share them.
    """

    auto_cast: str = "none"
    cast_dtype: torch.dtype | None = None
    optlevel: int = 2
    verbose: str | None = None
    portable_graph: bool = False
    notes: tuple[tuple[int, str], ...] = ()
    raw: tuple[str, ...] = ()
    shared_weights: bool = False


@dataclass(frozen=True)
class _Flag:
    """One known flag: its values (None: takes no value; empty: any text) and why it may be without
    effect.
    """

    name: str
    values: tuple[str, ...] | None = ()
    ignored: str | None = None
    level: Callable[[str], int] = lambda _value: logging.INFO


def _warn_unless(harmless: str) -> Callable[[str], int]:
    return lambda value: logging.INFO if value == harmless else logging.WARNING


def _always_warn(_value: str) -> int:
    return logging.WARNING


_HARDWARE = (
    "it chooses among Neuron hardware, and code for this machine's CPUs needs no such choice"
)
_HEURISTIC = "it steers heuristics of neuronx-cc that the embedded compiler does not have"
_FILES = "the result stands in the traced module and its messages go to the 'neuron_ext' logger"

_FLAGS = {
    flag.name: flag
    for flag in (
        _Flag("--auto-cast", ("none", "matmult", "all")),
        _Flag("--auto-cast-type", tuple(_AUTO_CAST_DTYPES)),
        _Flag("--optlevel", ("1", "2", "3")),
        _Flag("--verbose", ("info", "warning", "error", "critical", "debug")),
        _Flag("--portable-graph", None),
        _Flag(
            "--framework", ("XLA",), "the embedded compiler always reads the PyTorch program itself"
        ),
        _Flag("--target", ("inf2", "trn1", "trn1n", "trn2"), _HARDWARE),
        _Flag("--model-type", ("generic", "transformer", "unet-inference"), _HEURISTIC),
        _Flag("--distribution-strategy", ("generic", "llm-training", "NEMO"), _HEURISTIC),
        _Flag("--logical-nc-config", ("1", "2"), _HARDWARE),
        _Flag(
            "--native-int64",
            ("default", "enabled", "disabled"),
            "int64 operations always run in 64 bits on the host",
            _warn_unless("enabled"),
        ),
        _Flag(
            "--implicit-integer-downcast",
            (),
            "integer operations are never downcast on the host",
            _warn_unless("none"),
        ),
        _Flag(
            "--enable-mixed-precision-accumulation",
            None,
            "accumulation in float32 is what the host does anyway",
        ),
        _Flag(
            "--disable-mixed-precision-accumulation",
            None,
            "the host always accumulates in float32",
            _always_warn,
        ),
        _Flag(
            "--enable-saturate-infinity",
            None,
            "infinities are never changed on the host",
            _always_warn,
        ),
        _Flag("--enable-fast-context-switch", None, _HEURISTIC),
        _Flag("--enable-fast-loading-neuron-binaries", None, "the result is never compressed"),
        _Flag("--enable-experimental-O1", None, "it is deprecated; use -O1"),
        _Flag("--logfile", (), _FILES),
        _Flag("--output", (), _FILES),
    )
}
_SHORT = {"-O": "--optlevel", "-lnc": "--logical-nc-config"}


def parse_compiler_args(compiler_args: str | Sequence[str] | None) -> CompilerOptions:
    """Read ``compiler_args``: a string as on a command line, or a list of strings.

    Accepted forms are ``--flag value``, ``--flag=value``, ``-O1``, ``-O 1``, ``-O=1`` and the same
    for ``-lnc``. Of a flag given twice, the right-most wins.

    Raises:
        ValueError: for another type, an unknown flag, a value that is missing, not allowed or not
            wanted.
    """
    words = _split(compiler_args)
    given: dict[str, str] = {}
    position = 0
    while position < len(words):
        spelled, flag, value = _read_flag(words[position])
        position += 1
        if flag.values is None:
            if value is not None:
                raise ValueError(
                    f"compiler_args: {spelled} takes no value, got {value!r}; write just {spelled}"
                )
            value = ""
        elif value is None:
            if position == len(words) or words[position].startswith("-"):
                raise ValueError(f"compiler_args: {spelled} needs a value{_allowed(flag)}")
            value = words[position]
            position += 1
        _check_value(spelled, flag, value)
        given.pop(flag.name, None)  # keeps the dict in the order of the winning words
        given[flag.name] = value
    return _options(given, tuple(words))


def _split(compiler_args: str | Sequence[str] | None) -> list[str]:
    if compiler_args is None:
        return []
    if isinstance(compiler_args, str):
        return _shell_words(compiler_args)
    if isinstance(compiler_args, (list, tuple)) and all(
        isinstance(word, str) for word in compiler_args
    ):
        words: list[str] = []
        for word in compiler_args:
            # One item may hold a flag together with its value; a bare value is never cut.
            words.extend(_shell_words(word) if word.lstrip().startswith("-") else [word])
        return words
    raise ValueError(
        f"compiler_args must be a string or a list of strings, got {compiler_args!r} "
        f"of type {type(compiler_args).__name__}; pass for example '--auto-cast matmult -O2'"
    )


def _shell_words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(
            f"compiler_args: cannot split {text!r} into words ({error}); check its quotes"
        ) from error


def _read_flag(word: str) -> tuple[str, _Flag, str | None]:
    """Split one word into the flag as spelled, the flag it means and the value inside the word, if
    any.
    """
    if not word.startswith("-"):
        raise ValueError(
            f"compiler_args: {word!r} is not a flag; expected a word that begins with '-', such "
            "as --auto-cast"
        )
    spelled, equals, inside = word.partition("=")
    value = inside if equals else None
    if spelled in _FLAGS:
        return spelled, _FLAGS[spelled], value
    for short, name in _SHORT.items():
        if spelled == short:
            return spelled, _FLAGS[name], value
        if spelled.startswith(short) and spelled[len(short) :].isdigit() and not equals:
            return short, _FLAGS[name], spelled[len(short) :]
    known = ", ".join(sorted([*_FLAGS, *_SHORT]))
    raise ValueError(f"compiler_args: unknown flag {spelled!r}; known flags are {known}")


def _allowed(flag: _Flag) -> str:
    return f"; allowed values are {', '.join(flag.values)}" if flag.values else ""


def _check_value(spelled: str, flag: _Flag, value: str) -> None:
    if flag.values and value not in flag.values:
        raise ValueError(f"compiler_args: {spelled} cannot be {value!r}{_allowed(flag)}")
    if flag.values == () and not value:
        raise ValueError(f"compiler_args: {spelled} needs a value that is not empty")
    if flag.name == "--implicit-integer-downcast" and value not in ("default", "all", "none"):
        unknown = [name for name in value.split(",") if name not in _DOWNCAST_OPS]
        if unknown:
            raise ValueError(
                f"compiler_args: {spelled} cannot be {value!r}; allowed values are default, all, "
                f"none or a comma-separated list of {', '.join(sorted(_DOWNCAST_OPS))}"
            )


def _options(given: dict[str, str], raw: tuple[str, ...]) -> CompilerOptions:
    notes: list[tuple[int, str]] = []
    for name, value in given.items():
        flag = _FLAGS[name]
        if flag.ignored is not None:
            shown = f"{name} {value}".strip()
            notes.append(
                (flag.level(value), f"compiler flag {shown} has no effect: {flag.ignored}")
            )
    auto_cast = given.get("--auto-cast", "none")
    cast_type = given.get("--auto-cast-type")
    cast_dtype = None if auto_cast == "none" else _AUTO_CAST_DTYPES[cast_type or "bf16"]
    if cast_type is not None and auto_cast == "none":
        notes.append(
            (
                logging.WARNING,
                f"compiler flag --auto-cast-type {cast_type} has no effect: casting is off; "
                "add --auto-cast matmult or --auto-cast all",
            )
        )
    elif auto_cast != "none" and cast_dtype is None:
        notes.append(
            (
                logging.WARNING,
                f"compiler flag --auto-cast-type {cast_type} has no effect: the host has no "
                f"{cast_type} arithmetic and computes in float32; use bf16 or fp16",
            )
        )
    return CompilerOptions(
        auto_cast=auto_cast,
        cast_dtype=cast_dtype,
        optlevel=int(given.get("--optlevel", "2")),
        verbose=given.get("--verbose"),
        portable_graph="--portable-graph" in given,
        notes=tuple(notes),
        raw=raw,
    )
