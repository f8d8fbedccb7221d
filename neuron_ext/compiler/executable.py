"""What a compiler hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from neuron_ext.compiler.flat_module import Outputs


class UnsupportedOperatorsError(Exception):
    """Native code was made, but would need operators that it cannot call without Python."""

    def __init__(self, operators: list[str]) -> None:
        super().__init__(", ".join(operators))
        self.operators = operators


class CompilerUnusableError(Exception):
    """Code of this format cannot be made here, or not of this func; the text says why."""


@dataclass(frozen=True)
class Constant:
    """One weight of native code.

    Attributes:
        name: under which the code takes it.
        fqn: as the caller knows it, where it is a parameter or buffer as it was.
        dtype: as in ``float32``.
        layout: ``strided`` or ``mkldnn`` (packed by oneDNN, opaque to everybody else).
        offset: of its first element in the weights blob, in bytes; equal weights share one place.
        size: bytes that belong to it from there on.
        shape, stride: in elements.
        opaque: metadata of a packed layout, empty for a strided one.
    """

    name: str
    fqn: str
    dtype: str
    layout: str
    offset: int
    size: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    opaque: bytes = b""


@dataclass
class NativeCode:
    """What AOTInductor made of a program.

    Attributes:
        code: uint8 bytes of a shared library.
        weights: uint8 blob of all constants, where there are any.
        constants: where each constant stands in the blob, with the name in the program as ``fqn``.
        digests: the SHA-256, in hex, of ``"code"`` and ``"weights"``, where it is known already.
    """

    code: torch.Tensor
    weights: torch.Tensor | None
    constants: list[Constant]
    digests: dict[str, str] = field(default_factory=dict)


@dataclass
class CompiledExecutable:
    """An executable in memory.

    Attributes:
        format: ``inductor`` or ``torchscript``.
        outputs: what it returns.
        code: uint8 bytes of a shared library, for inductor.
        weights: uint8 blob of all constants, for inductor where there are any.
        constants: where each constant stands in the blob.
        graph: uint8 bytes of a saved ScriptModule from flat tensors to a tuple of flat tensors.
        mutated_inputs: flat inputs that it changes in place.
        digests: the SHA-256, in hex, of ``"code"`` and ``"weights"``, where it is known already.
        details: what the compiler was told, for the curious.
    """

    format: str
    outputs: Outputs
    code: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    constants: list[Constant] = field(default_factory=list)
    graph: torch.Tensor | None = None
    mutated_inputs: tuple[int, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
