"""Reads where AOTInductor put the weights of a program.

The facts stand in the generated C++ wrapper, one assignment a line, as in::

    constants_info_[5].name = "_frozen_param2";
    constants_info_[5].shape = {16, 3, 3, 3};

and the weights stand in a blob, one after another in the order of their index, each padded to 64
bytes.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import re

import torch

from neuron_ext.compiler.executable import Constant

_ALIGNMENT = 64
_ASSIGNMENT = re.compile(r"^\s*constants_info_\[(\d+)\]\.(\w+) = (.*);\s*$")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"$')
_NUMBER = re.compile(r"-?\d+$")
_LIST = re.compile(r"\{([^{}]*)\}$")
_CAST = re.compile(r"static_cast<int32_t>\((.*)\)$")
_DTYPE_PREFIX = "cached_torch_dtype_"
_LAYOUTS = {"cached_torch_layout_strided": "strided", "cached_torch_layout__mkldnn": "mkldnn"}


def read_constants(wrapper: str, blob: torch.Tensor) -> tuple[list[Constant], torch.Tensor]:
    """The constants that the source text of a wrapper names, and the blob that holds each distinct
    one once.

    The blob returned is the one given, unless some constants were equal and it could shrink.

    ``blob`` is uint8 and 1-D.

    Raises:
        RuntimeError: if text and blob do not agree, or hold what this version does not know.
    """
    found = _assignments(wrapper)
    constants: list[Constant] = []
    position = 0
    for index, fields in enumerate(found):
        constant, size = _constant(index, fields, position)
        constants.append(constant)
        position += size
    if position != blob.numel():
        raise _unreadable(
            f"the constants take {position} bytes, but the weights file has {blob.numel()}"
        )
    return _share_equal(constants, blob)


def _unreadable(why: str) -> RuntimeError:
    return RuntimeError(
        f"the code that AOTInductor of torch {torch.__version__} made cannot be read: {why}. Use "
        "compiler='torchscript', or the torch version that this package was made for"
    )


def _assignments(wrapper: str) -> list[dict[str, str]]:
    """The right-hand sides by index and field, from the constructor of the model only."""
    start = wrapper.find("AOTInductorModel::AOTInductorModel(")
    end = wrapper.find("update_constants_map(", start)
    if start < 0 or end < 0:
        raise _unreadable("its constructor was not found")
    found: dict[int, dict[str, str]] = {}
    for line in wrapper[start:end].splitlines():
        match = _ASSIGNMENT.match(line)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = match[3]
    if sorted(found) != list(range(len(found))):
        raise _unreadable(f"it numbers its constants {sorted(found)}")
    return [found[index] for index in range(len(found))]


def _constant(index: int, fields: dict[str, str], position: int) -> tuple[Constant, int]:
    """The constant, and the bytes that it takes in the blob from ``position`` on."""

    def field(name: str, pattern: re.Pattern[str]) -> str:
        match = pattern.match(fields.get(name, ""))
        if match is None:
            raise _unreadable(f"constant {index} has {name} = {fields.get(name)!r}")
        return match[1] if match.groups() else match[0]

    def numbers(name: str) -> tuple[int, ...]:
        return tuple(
            int(word.strip().rstrip("L")) for word in field(name, _LIST).split(",") if word.strip()
        )

    name = _unescape(field("name", _STRING))
    if fields.get("from_folded") != "false":
        raise _unreadable(f"constant {name} is computed when the code is loaded")
    dtype_name = fields.get("dtype", "").removeprefix(_DTYPE_PREFIX)
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype):
        raise _unreadable(f"constant {name} has the unknown dtype {fields.get('dtype')!r}")
    layout = _LAYOUTS.get(field("layout", _CAST))
    if layout is None:
        raise _unreadable(f"constant {name} has the unknown layout {fields.get('layout')!r}")
    shape, stride = numbers("shape"), numbers("stride")
    opaque = bytes(numbers("opaque_metadata")) if "opaque_metadata" in fields else b""
    if (layout == "mkldnn") != bool(opaque):
        raise _unreadable(
            f"constant {name} has layout {layout} and {len(opaque)} bytes of opaque metadata"
        )
    size = int(field("data_size", _NUMBER))
    if 0 in shape:
        size = 0  # the blob leaves these out, whatever storage is behind them
    # AOTInductor keeps a view as its whole storage; the bytes before its first element are not part
    # of it.
    skipped = 0 if size == 0 else int(field("offset", _NUMBER)) * dtype.itemsize
    fqn = _unescape(field("original_fqn", _STRING))
    return Constant(
        name, fqn, dtype_name, layout, position + skipped, size - skipped, shape, stride, opaque
    ), size


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def _share_equal(
    constants: list[Constant], blob: torch.Tensor
) -> tuple[list[Constant], torch.Tensor]:
    """Give constants with equal bytes one place in the blob."""
    sizes = collections.Counter(one.size for one in constants)
    places: dict[tuple[int, bytes | str], int] = {}
    kept: list[Constant] = []
    pieces: list[torch.Tensor] = []
    end = 0
    for one in constants:
        piece = blob[one.offset : one.offset + one.size]
        # Only what has a partner of its size is worth a look.
        alone = sizes[one.size] == 1
        key = (one.size, one.name if alone else hashlib.sha256(piece.numpy().data).digest())
        if key not in places:
            places[key] = end
            pieces.append(piece)
            end += _padded(one.size)
        kept.append(dataclasses.replace(one, offset=places[key]))
    if end >= blob.numel():
        return constants, blob
    smaller = torch.zeros(end, dtype=torch.uint8)
    position = 0
    for piece in pieces:
        smaller[position : position + piece.numel()] = piece
        position += _padded(piece.numel())
    return kept, smaller


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
