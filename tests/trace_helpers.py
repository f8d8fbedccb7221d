"""Comparing containers of tensors, and looking into saved files. Holds no tests."""

import functools
import io
import zipfile
from pathlib import Path

import torch
from helpers import EXAMPLE, SmallNet

import neuron_ext

COMPILERS = ("torchscript", "inductor")


def assert_same(got, want, path="output"):
    """Equal in containers, dtypes, shapes and every value."""
    if isinstance(want, torch.Tensor):
        assert isinstance(got, torch.Tensor), f"{path}: {got!r}"
        assert (got.dtype, got.shape) == (want.dtype, want.shape), path
        assert torch.equal(got, want), f"{path}: {got} is not {want}"
    elif isinstance(want, dict):
        assert type(got) is dict, f"{path}: {got!r}"
        assert list(got) == list(want), path
        for key, item in want.items():
            assert_same(got[key], item, f"{path}[{key!r}]")
    elif isinstance(want, (tuple, list)):
        assert isinstance(got, list if isinstance(want, list) else tuple), f"{path}: {got!r}"
        assert getattr(got, "_fields", ()) == getattr(want, "_fields", ()), path
        assert len(got) == len(want), path
        for i, item in enumerate(want):
            assert_same(got[i], item, f"{path}[{i}]")
    else:
        assert (type(got), got) == (type(want), want), path


def mapped(function, value):
    """The same containers with ``function`` of every tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return type(value)((key, mapped(function, item)) for key, item in value.items())
    items = [mapped(function, item) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def copied(value):
    """The same containers with a contiguous clone of every tensor."""
    return mapped(lambda t: t.clone(memory_format=torch.contiguous_format), value)


def saved_bytes(module):
    """What torch.jit.save writes."""
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return buffer.getvalue()


def loaded(data):
    """The module in bytes of a file."""
    return torch.jit.load(io.BytesIO(data))


@functools.cache
def native_with_graph():
    """The bytes of a file of a native `SmallNet` with a portable graph beside it. Compiles once."""
    module = neuron_ext.trace(
        SmallNet().eval(), EXAMPLE, compiler="inductor", compiler_args="--portable-graph"
    )
    return saved_bytes(module)


def state_of(module):
    """(version, ints, strings, int lists, string lists, tensors) of the subgraph of ``module``."""
    (subgraph,) = neuron_ext._subgraphs.find_subgraphs(module)
    return subgraph.__getstate__()[0]


def member_ranges(path):
    """The name of each member of a saved file, and the range of the bytes of its data."""
    raw = Path(path).read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    ranges = {}
    for one in members:
        lengths = raw[one.header_offset + 26 : one.header_offset + 30]
        start = (
            one.header_offset
            + 30
            + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
        )
        ranges[one.filename] = range(start, start + one.compress_size)
    return ranges


def pickle_range(path):
    """The range of the bytes in a saved file that hold the module's attributes, tensors aside."""
    (found,) = [part for name, part in member_ranges(path).items() if name.endswith("/data.pkl")]
    return found
