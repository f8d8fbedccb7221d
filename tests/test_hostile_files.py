"""Hostile files: what is refused maps nothing executable, runs nothing and leaves others alone.

`tests/fuzz` does this at random and by the ten thousand; here are the real files of a real compile.
"""

import random
import re
import struct
import zipfile

import pytest
import torch
from helpers import EXAMPLE, bytes_of, expected, flip_byte, rebuild, save
from trace_helpers import (
    assert_same,
    loaded,
    member_ranges,
    native_with_graph,
    pickle_range,
    saved_bytes,
    state_of,
)

import neuron_ext

# Loads changed copies of the file args[0] in turn, each given as [position, replacement, length of
# what it replaces]: what came of each, and the executable mappings that came meanwhile.
_LOAD = """
import io, resource
import helpers

def executable():
    with open("/proc/self/maps") as maps:
        return {line.split()[0] + line[49:].strip() for line in maps if "x" in line.split()[1]}

def outcome(data):
    try:
        module = torch.jit.load(io.BytesIO(data))
        got = module(helpers.EXAMPLE) if run_it else helpers.expected()
        return "right" if torch.equal(got, helpers.expected()) else f"wrong: {got}"
    except Exception as error:
        # Without a text where PyTorch quotes bytes that this Python cannot take for one.
        return "error: " + (str(error).strip() or repr(error)).splitlines()[0]

path, changes, run_it, warm_up = args
if warm_up:  # whatever the first load of any file maps
    run_it, real = True, run_it
    assert outcome(open(warm_up, "rb").read()) == "right"
    run_it = real
raw = open(path, "rb").read()
# The unpickler believes any length, and would take seconds to clear gigabytes for one.
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, size + 2**28))
before = executable()
outcomes = []
for position, replacement, length in changes:
    outcomes.append(outcome(raw[:position] + bytes(replacement) + raw[position + length :]))
result = [outcomes, sorted(executable() - before)]
"""


@pytest.fixture
def load(fork_server):
    """Loads changed copies of a file in a new process: what came of each, what was mapped."""

    def call(path, changes, *, run_it=True, warm_up=None, **env):
        changes = [(position, list(new), length) for position, new, length in changes]
        arguments = (str(path), changes, run_it, warm_up and str(warm_up))
        return fork_server.run(_LOAD, *arguments, env=env)

    return call


def _unchanged(path):
    return [(path.stat().st_size, b"", 0)]


def _flips(path, part, count, seed):
    """``count`` flips of one bit, spread at random over ``part`` of the file."""
    raw, dice = path.read_bytes(), random.Random(seed)
    positions = sorted(dice.choice(part) for _ in range(count))
    return [(at, bytes([raw[at] ^ (1 << dice.randrange(8))]), 1) for at in positions]


def _tensor_range(path, name):
    data = state_of(torch.jit.load(str(path)))[5][name].numpy().tobytes()
    start = path.read_bytes().index(data)
    return range(start, start + len(data))


def _not_errors(changes, outcomes):
    return [
        (change[0], text)
        for change, text in zip(changes, outcomes, strict=True)
        if not text.startswith("error: ")
    ]


# ------------------------------------------------------------------------------- damage


def test_a_native_file_cut_off_anywhere_maps_nothing(native_file, torchscript_file, load):
    size = native_file.stat().st_size
    edges = {at for part in member_ranges(native_file).values() for at in (part.start, part.stop)}
    cuts = {edge + by for edge in edges for by in (-1, 0, 1)}
    cuts |= {size * part // 100 for part in range(100)} | {size - by for by in range(1, 60)}
    changes = [(cut, b"", size) for cut in sorted(cuts) if 0 <= cut < size]
    assert len(changes) > 150
    outcomes, mapped = load(native_file, changes, warm_up=torchscript_file)
    assert (_not_errors(changes, outcomes), mapped) == ([], [])


@pytest.mark.parametrize("name", ["code", "weights"])
def test_flipped_bits_of_code_and_weights_map_nothing(native_file, torchscript_file, load, name):
    changes = _flips(native_file, _tensor_range(native_file, name), 60, seed=name)
    outcomes, mapped = load(native_file, changes, warm_up=torchscript_file)
    assert (_not_errors(changes, outcomes), mapped) == ([], [])
    what = {"code": "native code", "weights": "weights"}[name]
    assert all(f"the {what} of subgraph 'SmallNet' is damaged" in text for text in outcomes)


def test_flipped_bits_of_a_portable_graph_are_found_where_it_would_run(
    torchscript_file, tmp_path, load
):
    both = tmp_path / "both.pt"
    both.write_bytes(native_with_graph())
    changes = _flips(both, _tensor_range(both, "graph"), 60, seed=3)
    outcomes, mapped = load(both, changes, warm_up=torchscript_file, NEURON_EXT_NATIVE_CODE="deny")
    assert (_not_errors(changes, outcomes), mapped) == ([], [])


def test_changed_fields_of_a_native_file_map_nothing_or_what_is_whole(
    native_file, torchscript_file, load
):
    """A flip that no reader looks at leaves the file as it was; any other is found."""
    part = pickle_range(native_file)
    raw = native_file.read_bytes()
    start = raw.index(b"async_load", part.start, part.stop)
    stop = raw.index(b"Dict[str, Tensor]", start, part.stop)
    changes = _flips(native_file, range(start, stop), 150, seed=4)
    outcomes, _ = load(native_file, changes, warm_up=torchscript_file)
    bad = [change for change in _not_errors(changes, outcomes) if change[1] != "right"]
    assert bad == []
    wrong = [c for c, text in zip(changes, outcomes, strict=True) if text.startswith("error: ")]
    assert len(wrong) > 100
    # Without those that leave it whole, nothing is mapped.
    outcomes, mapped = load(native_file, wrong, warm_up=torchscript_file)
    assert (_not_errors(wrong, outcomes), mapped) == ([], [])


# ------------------------------------------------------------------------------- what is mapped


def test_the_code_of_a_file_is_seen_where_it_is_mapped(native_file, torchscript_file, load):
    """So the tests above would see it."""
    outcomes, mapped = load(native_file, _unchanged(native_file), warm_up=torchscript_file)
    assert outcomes == ["right"]
    assert any("memfd:neuron_ext" in line for line in mapped)


def test_a_lazy_file_maps_nothing_when_it_is_read(native_net, tmp_path, torchscript_file, load):
    lazy = save(rebuild(native_net, ints={"lazy_load": 1}), tmp_path / "lazy.pt")
    read = load(lazy, _unchanged(lazy), run_it=False, warm_up=torchscript_file)
    assert read == [["right"], []]


def test_denied_native_code_is_not_mapped_in_any_way(native_file, torchscript_file, tmp_path, load):
    """Whatever the mapping is called: no executable mapping comes by loading and running."""
    both = tmp_path / "both.pt"
    both.write_bytes(native_with_graph())
    for path, result in ((native_file, "error: "), (both, "right")):
        outcomes, mapped = load(
            path, _unchanged(path) * 2, warm_up=torchscript_file, NEURON_EXT_NATIVE_CODE="deny"
        )
        assert [text.startswith(result) for text in outcomes] == [True, True], outcomes
        assert mapped == []


def test_a_native_file_of_a_newer_version_maps_nothing(native_file, torchscript_file, load):
    part = pickle_range(native_file)
    raw = native_file.read_bytes()
    # The version: the first number behind the name of the class.
    named = raw.index(b"NeuronSubgraph", part.start, part.stop)
    at = raw.index(b"K\x01", named, part.stop) + 1
    changes = [(at, bytes([version]), 1) for version in (2, 9, 200)]
    outcomes, mapped = load(native_file, changes, warm_up=torchscript_file)
    for (_, version, _), text in zip(changes, outcomes, strict=True):
        assert f"state version {version[0]}, and this neuron_ext reads versions up to 1" in text
        assert "install a newer neuron_ext" in text
    assert mapped == []


# ------------------------------------------------------------------------------- lies


def test_a_file_that_claims_the_digests_of_another_gets_nothing_of_it(native_file, native_net):
    """And the other, loaded before or after, computes what it always did."""
    code = bytes_of(native_net, "code").clone()
    weights = bytes_of(native_net, "weights").clone()
    flip_byte(code)
    flip_byte(weights)
    assert_same(native_net(EXAMPLE), expected())
    for name, tensor in (("code", code), ("weights", weights)):
        liar = rebuild(native_net, tensors={name: tensor})
        with pytest.raises(RuntimeError, match="is damaged"):
            liar(EXAMPLE)
        assert_same(torch.jit.load(str(native_file))(EXAMPLE), expected())
        assert_same(native_net(EXAMPLE), expected())


@pytest.mark.parametrize("validate", ["TRUE", "FALSE"])
def test_validate_hash_refuses_weights_whose_sum_is_right(
    native_net, torchscript_file, tmp_path, load, validate
):
    """Two words that change by as much in opposite directions leave the sum as it was."""
    weights = bytes_of(native_net, "weights").clone()
    words = weights[:16].view(torch.int64)
    words += torch.tensor([1, -1])
    file = save(rebuild(native_net, tensors={"weights": weights}), tmp_path / "weights.pt")
    outcomes, mapped = load(
        file,
        _unchanged(file),
        run_it=False,
        warm_up=torchscript_file,
        NEURON_RT_VALIDATE_HASH=validate,
    )
    if validate == "TRUE":
        assert "the weights of subgraph 'SmallNet' is damaged" in outcomes[0]
        assert mapped == []
    else:
        assert outcomes == ["right"]  # it was not run: the sum alone was looked at


def _claiming(path, name, size):
    """The change that makes the tensor ``name`` and its storage say that they have ``size`` bytes.

    As PyTorch pickles a tensor: ..., length) of the storage, offset 0, (length), (stride 1), ...
    """
    raw, part = path.read_bytes(), pickle_range(path)
    length = len(_tensor_range(path, name))
    assert 256 <= length < size < 65536  # so that all are numbers of two bytes
    old = re.escape(b"M" + struct.pack("<H", length))
    pattern = re.compile(old + rb"tQ(q.|r.{4})?K\x00\(" + old + rb"t\(K\x01t", re.DOTALL)
    (found,) = pattern.finditer(raw, part.start, part.stop)
    changed = found.group().replace(struct.pack("<H", length), struct.pack("<H", size))
    return [(found.start(), changed, len(changed))]


def test_a_tensor_longer_than_its_data_is_refused(torchscript_file, load):
    outcomes, _ = load(torchscript_file, _claiming(torchscript_file, "graph", 65535))
    assert "field 'graph' is longer than its data" in outcomes[0]
    # A few bytes more are there, since memory comes in blocks, but are not what was saved.
    length = len(_tensor_range(torchscript_file, "graph"))
    outcomes, _ = load(torchscript_file, _claiming(torchscript_file, "graph", length + 1))
    assert outcomes[0].startswith("error: ")


@pytest.mark.parametrize("kept", [0, 1, 1000])
def test_a_record_shorter_than_the_pickle_says_is_refused(torchscript_file, tmp_path, load, kept):
    """PyTorch's reader takes lengths from the pickle; what lies behind is not the file's."""
    short = tmp_path / "short.pt"
    with zipfile.ZipFile(torchscript_file) as old, zipfile.ZipFile(short, "w") as new:
        (graph,) = [name for name in old.namelist() if name.endswith("/data/0")]
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data[:kept] if name == graph else data)
    outcomes, _ = load(short, _unchanged(short))
    assert "field 'graph' is longer than its data" in outcomes[0]


def test_native_code_asks_for_no_executable_stack(native_net):
    """Mapping it would make the stacks of the whole process executable."""
    code = bytes_of(native_net, "code").numpy().tobytes()
    table, size, count = (*struct.unpack_from("<Q", code, 32), *struct.unpack_from("<HH", code, 54))
    flags = {}
    for i in range(count):
        kind, flag = struct.unpack_from("<II", code, table + i * size)
        flags[kind] = flag
    executable, stack = 1, 0x6474E551
    assert flags[stack] & executable == 0


def test_a_module_refused_leaves_the_process_as_it_was(native_net, native_file):
    data = bytearray(native_file.read_bytes())
    data[_tensor_range(native_file, "weights").start] ^= 1
    models = sum(core.models for core in neuron_ext.core_stats())
    for _ in range(3):
        with pytest.raises(RuntimeError, match="is damaged"):
            loaded(bytes(data))
    assert sum(core.models for core in neuron_ext.core_stats()) == models
    assert_same(loaded(saved_bytes(native_net))(EXAMPLE), expected())
