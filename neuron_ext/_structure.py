"""Structure of inputs and outputs: from Python containers to flat tensors, and TorchScript that
does the same.

A structure is a tree of immutable nodes. `read_inputs` and `read_outputs` make it from example
values, `rebuild` and `pick_leaves` apply it in Python, and `compiler/script_module.py` writes it
down as the ``forward`` of a traced module. TorchScript holds one type per list and per dict, and so
do the trees.
"""

from __future__ import annotations

import collections
import dataclasses
import keyword
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Leaf:
    """A tensor: number ``index`` of the flat tensors."""

    index: int


@dataclass(frozen=True)
class Const:
    """An output that is no tensor: bool, int, float, str or None, always the same."""

    value: bool | int | float | str | None


@dataclass(frozen=True)
class Seq:
    """A list, or a tuple; ``fields`` and ``name`` are set for a tuple with named fields."""

    items: tuple[Node, ...]
    is_list: bool = False
    name: str = ""
    fields: tuple[str, ...] = ()
    # How Python makes the container from its items; not part of what the structure is.
    make: Callable[[list[Any]], Any] = dataclasses.field(default=list, compare=False, repr=False)


@dataclass(frozen=True)
class Map:
    """A dict with keys of one type, str or int."""

    keys: tuple[str | int, ...]
    items: tuple[Node, ...]
    make: Callable[[dict[Any, Any]], Any] = dataclasses.field(
        default=dict, compare=False, repr=False
    )


Node = Leaf | Const | Seq | Map


@dataclass(frozen=True)
class Inputs:
    """The structure of a call: one name and one node for each argument, one path for each flat
    tensor.
    """

    names: tuple[str, ...]
    nodes: tuple[Node, ...]
    paths: tuple[str, ...]


# ----------------------------------------------------------------------------------------------
# inputs


def read_inputs(
    names: Sequence[str], arguments: Sequence[Any]
) -> tuple[Inputs, list[torch.Tensor]]:
    """Read example arguments, each with a name that is usable in TorchScript.

    Returns the structure and the flat tensors, which are the caller's own.

    Raises:
        ValueError: naming the position, for anything that is no dense CPU tensor or container of
            them, for empty containers and for containers of several types.
    """
    tensors: list[torch.Tensor] = []
    paths: list[str] = []
    nodes = tuple(
        _read_input(value, name, tensors, paths)
        for value, name in zip(arguments, names, strict=True)
    )
    return Inputs(tuple(names), nodes, tuple(paths)), tensors


def _read_input(value: Any, path: str, tensors: list[torch.Tensor], paths: list[str]) -> Node:
    if isinstance(value, torch.Tensor):
        _check_input_tensor(value, path)
        tensors.append(value)
        paths.append(path)
        return Leaf(len(tensors) - 1)
    if isinstance(value, (tuple, list, Mapping)) and not value:
        raise ValueError(
            f"example input {path} is an empty {type(value).__name__}; expected at least one "
            "tensor in it"
        )
    if isinstance(value, (tuple, list)):
        items = tuple(
            _read_input(item, f"{path}[{i}]", tensors, paths) for i, item in enumerate(value)
        )
        node: Node = Seq(items, isinstance(value, list), make=_sequence_maker(value))
    elif isinstance(value, Mapping):
        keys = _read_keys(value, f"example input {path}")
        items = tuple(_read_input(value[key], f"{path}[{key!r}]", tensors, paths) for key in keys)
        node = Map(keys, items, make=_mapping_maker(value))
    else:
        raise ValueError(
            f"example input {path} is {_describe(value)}; expected a tensor, or a tuple, list or "
            "dict of tensors. Fix values that are no tensors before tracing, for example with a "
            "lambda or functools.partial"
        )
    _check_one_type(node, f"example input {path}")
    return node


def _check_input_tensor(tensor: torch.Tensor, path: str) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(
            f"example input {path} is on device {tensor.device}; expected a CPU tensor: call "
            ".cpu() on it"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout)
        raise ValueError(
            f"example input {path} is a {kind} tensor; expected a dense tensor: convert it first"
        )


def _sequence_maker(value: tuple[Any, ...] | list[Any]) -> Callable[[list[Any]], Any]:
    if isinstance(value, list):
        return list
    if hasattr(value, "_fields"):
        kind = type(value)
        return lambda items: kind(*items)
    return tuple


def _mapping_maker(value: Mapping[Any, Any]) -> Callable[[dict[Any, Any]], Any]:
    """Func gets the kind of mapping it was given, since it may read its keys as attributes."""
    kind: Any = type(value)
    if kind in (dict, collections.OrderedDict):
        return kind  # type: ignore[no-any-return]
    try:
        probe = kind(dict(value))
        return kind if isinstance(probe, Mapping) and list(probe) == list(value) else dict
    except Exception:  # any constructor at all may stand here
        return dict


# Names that mean something in the TorchScript that is written for a structure.
_RESERVED_NAMES = frozenset(
    [
        *("self", "torch", "Tensor", "List", "Dict", "Tuple", "Optional", "NoneType"),
        *("len", "list", "str", "float", "ValueError", "annotate", "inf", "nan"),
    ]
)


def usable(name: str) -> bool:
    """Whether ``name`` can name an argument or a field in TorchScript."""
    fine = name.isidentifier() and name.isascii() and not keyword.iskeyword(name)
    return fine and name not in _RESERVED_NAMES and not name.startswith("_")


# ---------------------------------------------------------------------------------------------
# outputs


def read_outputs(value: Any) -> tuple[Node, list[torch.Tensor]]:
    """Read what func returned. A tensor that is returned twice is one flat tensor, with two leaves.

    None entries of a dict-like output (as of a transformers ``ModelOutput``) or of a dataclass are
    dropped.

    Raises:
        ValueError: naming the place, for types that TorchScript cannot return, and if there is no
            tensor.
    """
    tensors: list[torch.Tensor] = []
    node = _read_output(value, "", tensors)
    if not tensors:
        raise ValueError(
            f"the output of func is {_describe(value)}, without any tensor in it; expected at "
            "least one tensor"
        )
    return node, tensors


def _read_output(value: Any, path: str, tensors: list[torch.Tensor]) -> Node:
    if isinstance(value, torch.Tensor):
        for i, known in enumerate(tensors):
            if known is value:
                return Leaf(i)
        tensors.append(value)
        return Leaf(len(tensors) - 1)
    if value is None or isinstance(value, (bool, int, float, str)):
        return Const(value)
    container = contents(value)
    if container is None:
        raise ValueError(
            f"output{path} of func is {_describe(value)}, which TorchScript cannot return; "
            "expected tensors, numbers, strings, or tuples, lists, dicts and dataclasses of "
            "them. Wrap func in one that returns only those"
        )
    node: Node
    if isinstance(container, dict):
        keys = _read_keys(container, f"output{path}")
        node = Map(
            keys, tuple(_read_output(container[key], f"{path}[{key!r}]", tensors) for key in keys)
        )
    else:
        fields = tuple(getattr(type(value), "_fields", ())) if isinstance(value, tuple) else ()
        if not all(usable(field) for field in fields):
            fields = ()
        items = tuple(
            _read_output(item, f"{path}[{i}]", tensors) for i, item in enumerate(container)
        )
        node = Seq(
            items,
            isinstance(value, list),
            identifier(type(value).__name__) if fields else "",
            fields,
        )
    _check_one_type(node, f"output{path}")
    return node


def contents(value: Any) -> dict[Any, Any] | Sequence[Any] | None:
    """The direct contents of a container, None for anything else."""
    if isinstance(value, Mapping):
        without_none = isinstance(value, collections.OrderedDict) or dataclasses.is_dataclass(value)
        return {key: item for key, item in value.items() if item is not None or not without_none}
    if isinstance(value, (tuple, list)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: item for name, item in pairs if item is not None}
    return None


def pick_leaves(value: Any, node: Node, count: int) -> list[torch.Tensor]:
    """Take the ``count`` flat tensors out of another output of the same func.

    Raises:
        RuntimeError: if the output has another structure than ``node``, which means that func is
            not deterministic in what it returns.
    """
    flat: list[torch.Tensor | None] = [None] * count
    _pick(value, node, flat)
    return [tensor for tensor in flat if tensor is not None]


def _pick(value: Any, node: Node, flat: list[torch.Tensor | None]) -> None:
    if isinstance(node, Leaf):
        if isinstance(value, torch.Tensor):
            if flat[node.index] is None:
                flat[node.index] = value
            return
    elif isinstance(node, Const):
        if not isinstance(value, torch.Tensor):
            return
    else:
        container = contents(value)
        if isinstance(node, Map) and isinstance(container, dict) and tuple(container) == node.keys:
            for key, item in zip(node.keys, node.items, strict=True):
                _pick(container[key], item, flat)
            return
        if (
            isinstance(node, Seq)
            and isinstance(container, (tuple, list))
            and len(container) == len(node.items)
        ):
            for element, item in zip(container, node.items, strict=True):
                _pick(element, item, flat)
            return
    raise RuntimeError(
        f"func returned another structure when it was traced ({_describe(value)}) than when it "
        "was run on the example inputs; make what it returns depend on its inputs only"
    )


# ----------------------------------------------------------------------------------------------
# shared


def rebuild(node: Node, flat: Sequence[torch.Tensor]) -> Any:
    """Make the Python containers of ``node`` again, with tensors out of ``flat``."""
    if isinstance(node, Leaf):
        return flat[node.index]
    if isinstance(node, Const):
        return node.value
    items = [rebuild(item, flat) for item in node.items]
    if isinstance(node, Map):
        return node.make(dict(zip(node.keys, items, strict=True)))
    return node.make(items)


def _describe(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return f"{value!r} of type {type(value).__name__}"
    return f"of type {type(value).__module__}.{type(value).__qualname__}"


def _read_keys(value: Mapping[Any, Any], where: str) -> tuple[str | int, ...]:
    keys = tuple(value)
    for kind in (str, int):
        if all(type(key) is kind for key in keys):
            return keys
    raise ValueError(
        f"{where} is a dict with the keys {list(keys)!r}; TorchScript takes keys of one type, all "
        "str or all int: rename them, or use a tuple"
    )


def _check_one_type(node: Node, where: str) -> None:
    if isinstance(node, Map) or (isinstance(node, Seq) and node.is_list):
        kinds = sorted({script_type(item, named_type_key) for item in node.items})
        if len(kinds) > 1:
            what = "dict has values" if isinstance(node, Map) else "list has elements"
            raise ValueError(
                f"{where}: the {what} of several types ({', '.join(kinds)}), and TorchScript "
                "holds one type per container; use a tuple instead"
            )


def identifier(name: str) -> str:
    """``name`` made into a plain ASCII identifier that can stand as a TorchScript type name."""
    cleaned = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name).strip(
        "_"
    )
    if not cleaned or cleaned[0].isdigit() or keyword.iskeyword(cleaned):
        cleaned = f"Traced_{cleaned}".rstrip("_")
    return cleaned


def script_type(node: Node, name_of: Callable[[Seq], str]) -> str:
    """The TorchScript type of a node; ``name_of`` gives the type of a tuple with named fields."""
    if isinstance(node, Leaf):
        return "Tensor"
    if isinstance(node, Const):
        return "None" if node.value is None else type(node.value).__name__
    if isinstance(node, Map):
        key = type(node.keys[0]).__name__ if node.keys else "str"
        return f"Dict[{key}, {script_type(node.items[0], name_of) if node.items else 'Tensor'}]"
    if node.is_list:
        return f"List[{script_type(node.items[0], name_of) if node.items else 'Tensor'}]"
    if node.fields:
        return name_of(node)
    return f"Tuple[{', '.join(script_type(item, name_of) for item in node.items) or '()'}]"


def named_type_key(node: Seq) -> str:
    """What makes two tuples with named fields the same type: name, fields and the types of the
    fields.
    """
    parts = (
        f"{field}: {script_type(item, named_type_key)}"
        for field, item in zip(node.fields, node.items, strict=True)
    )
    return f"{node.name}({', '.join(parts)})"


def walk(node: Node) -> Iterator[Node]:
    """The node and all below it, parents first."""
    yield node
    if isinstance(node, (Seq, Map)):
        for item in node.items:
            yield from walk(item)
