"""Saved files: versions, fields, sizes, and damage, which is an error and never wrong numbers."""

import json
import pickletools
import random

import pytest
import torch
from helpers import EXAMPLE, bytes_of, expected, rebuild, save, trace_small_net
from helpers_processes import run_python
from trace_helpers import (
    COMPILERS,
    assert_same,
    loaded,
    member_ranges,
    pickle_range,
    saved_bytes,
    state_of,
)

import neuron_ext


@pytest.fixture(params=COMPILERS)
def file(request):
    """A saved `SmallNet` of each compiler."""
    fixture = {"torchscript": "torchscript_file", "inductor": "native_file"}[request.param]
    return request.getfixturevalue(fixture)


# ------------------------------------------------------------------------------- version


def _version_byte(path):
    """Where in the file the version of the one subgraph stands, and its value."""
    part = pickle_range(path)
    data = path.read_bytes()[part.start : part.stop]
    inside = False
    for opcode, value, position in pickletools.genops(data):
        inside = inside or (isinstance(value, str) and "NeuronSubgraph" in value)
        if inside and opcode.name == "BININT1":
            return part.start + position + 1, value
    raise AssertionError("no version in the file")


def _patched(path, **bytes_at):
    data = bytearray(path.read_bytes())
    for position, value in bytes_at.items():
        data[int(position.removeprefix("at_"))] = value
    return bytes(data)


@pytest.mark.parametrize("version", [2, 3, 255])
def test_a_file_of_a_newer_version_says_so_before_anything_else_is_read(file, version):
    position, now = _version_byte(file)
    assert now == 1
    message = (
        f"this module was saved with subgraph state version {version}, and this neuron_ext reads "
        "versions up to 1: install a newer neuron_ext"
    )
    part = pickle_range(file)
    format_at = file.read_bytes().index(b"format", part.start, part.stop)
    for more in ({}, {f"at_{format_at}": ord("F")}):
        with pytest.raises(RuntimeError, match=message):
            loaded(_patched(file, **{f"at_{position}": version}, **more))
    # The other patch alone is an error of its own.
    with pytest.raises(RuntimeError, match=r"field 'format' is missing"):
        loaded(_patched(file, **{f"at_{format_at}": ord("F")}))


def test_a_version_that_never_was_is_refused(file):
    position, _ = _version_byte(file)
    with pytest.raises(RuntimeError, match=r"field 'version' is 0, expected 1 to 1"):
        loaded(_patched(file, **{f"at_{position}": 0}))


def test_the_version_is_judged_when_there_is_nothing_else():
    with pytest.raises(RuntimeError, match=r"state version 7, .* install a newer neuron_ext"):
        torch.classes.neuron_ext.NeuronSubgraph(7, {}, {}, {}, {}, {})


# ------------------------------------------------------------------------------- fields


def test_fields_of_later_releases_are_ignored(small_net):
    newer = rebuild(
        small_net,
        ints={"later": 1},
        strings={"later": "a"},
        int_lists={"later": [1]},
        string_lists={"later": ["a"]},
        tensors={"later": torch.zeros(2, 2)},
    )
    assert_same(newer(EXAMPLE), expected())
    assert_same(loaded(saved_bytes(newer))(EXAMPLE), expected())
    assert all("later" not in bag for bag in state_of(newer)[1:])


def test_fields_that_are_optional_may_be_absent(small_net):
    bare = rebuild(
        small_net,
        ints=dict.fromkeys(state_of(small_net)[1]),
        strings=dict.fromkeys(("producer", "runtime", "arch", "torch_version")),
        int_lists={"mutated_inputs": None},
        string_lists={"output_names": None, "cpu_features": None},
    )
    assert_same(loaded(saved_bytes(bare))(EXAMPLE), expected())
    (status,) = neuron_ext.status(bare)
    assert (status.lazy_load, status.async_load, status.dynamic_batch) == (False, False, False)
    assert (status.start_nc, status.nc_count) == (-1, -1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ints": {"lazy_load": 2}}, "field 'lazy_load' is 2, expected 0 to 1"),
        ({"ints": {"async_load": -1}}, "field 'async_load' is -1, expected 0 to 1"),
        ({"ints": {"start_nc": -2}}, "field 'start_nc' is -2, expected -1 to 2147483647"),
        (
            {"ints": {"nc_count": 2**31}},
            "field 'nc_count' is 2147483648, expected -1 to",
        ),
        ({"ints": {"nc_count": 0}}, "field 'nc_count' is 0"),
        ({"strings": {"name": None}}, "field 'name' is missing"),
        ({"strings": {"format": None}}, "field 'format' is missing"),
        ({"strings": {"format": "exe"}}, "field 'format' is 'exe', expected inductor, torch"),
        ({"tensors": {"graph": None}}, "field 'graph' is missing"),
        (
            {"tensors": {"graph": torch.zeros(9)}},
            "field 'graph' is a float32 tensor of 1 dim",
        ),
        ({"tensors": {"graph": torch.zeros(2, 2).byte()}}, "field 'graph' is a uint8 tensor of 2"),
        ({"string_lists": {"input_dtypes": ["float31"]}}, "field 'input_dtypes' names no dtype: "),
        ({"string_lists": {"input_names": []}}, "field 'input_names' has 0 entries, expected 1"),
        ({"int_lists": {"input_ranks": [2, 2]}}, "field 'input_ranks' has 2 entries, expected 1"),
        ({"int_lists": {"input_ranks": [3]}}, "field 'input_shapes' does not fit the ranks"),
        ({"int_lists": {"input_ranks": [-1]}}, "field 'input_shapes' does not fit the ranks"),
        (
            {"int_lists": {"output_shapes": [2, -4]}},
            "field 'output_shapes' holds -4, expected 0",
        ),
        ({"int_lists": {"output_shapes": [2**40, 2**40]}}, "field 'output_shapes' is too large"),
        ({"int_lists": {"mutated_inputs": [1]}}, "field 'mutated_inputs' names input 1 of 1"),
    ],
    ids=range(19),
)
def test_a_field_that_is_wrong_is_named(small_net, changes, message):
    with pytest.raises(RuntimeError) as caught:
        rebuild(small_net, **changes)
    assert message in str(caught.value)


def test_constants_that_lie_outside_the_weights_are_refused(native_net):
    size = bytes_of(native_net, "weights").numel()
    lists = state_of(native_net)[3]
    for field, value, message in (
        ("constant_offsets", size, "'constant_offsets' puts constant "),
        ("constant_offsets", -64, "'constant_offsets' puts constant "),
        ("constant_sizes", size + 1, "'constant_offsets' puts constant "),
        ("constant_opaque_sizes", 2**40, "'constant_opaque_sizes' does not fit the "),
        ("constant_shapes", -1, "'constant_shapes' holds -1, expected 0 or more"),
    ):
        changed = [*lists[field][:-1], value]
        with pytest.raises(RuntimeError) as caught:
            rebuild(native_net, int_lists={field: changed})
        assert message in str(caught.value)


# ------------------------------------------------------------------------------- size


def test_the_count_of_replicas_does_not_change_the_size_of_the_file(file):
    module = torch.jit.load(str(file))
    before = len(saved_bytes(module))
    neuron_ext.set_multicore(module)
    assert neuron_ext.status(module)[0].cores == [0, 1, 2, 3]
    assert abs(len(saved_bytes(module)) - before) <= 1024
    assert abs(file.stat().st_size - before) <= 1024


class Tied(torch.nn.Module):
    """8 MB of weights, 4 of them used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(1024, 1024, bias=False)
        self.second = torch.nn.Linear(1024, 1024)
        self.third = torch.nn.Linear(1024, 1024)
        self.third.weight = self.second.weight

    def forward(self, x):
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_each_weight_is_in_the_file_once(compiler, tmp_path):
    model = Tied().eval()
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(1))
    traced = neuron_ext.trace(model, x, compiler=compiler)
    path = save(traced, tmp_path / "model.pt")
    assert weights <= path.stat().st_size <= weights * 1.02 + 400_000
    reloaded = torch.jit.load(str(path))
    torch.testing.assert_close(reloaded(x), model(x), rtol=1e-4, atol=1e-5)
    neuron_ext.set_multicore(reloaded)
    assert abs(save(reloaded, tmp_path / "again.pt").stat().st_size - path.stat().st_size) <= 1024


# ------------------------------------------------------------------------------- damage

# Tries changes of one file in turn; prints the number of each before it is tried, and what came.
_TRY = """
import io, json, resource, sys
import torch, neuron_ext
from helpers import EXAMPLE, expected
path, kind = sys.argv[1:3]
raw, want = open(path, "rb").read(), expected()
torch.jit.load(path)(EXAMPLE)
# The unpickler believes any length, and would take seconds to clear gigabytes for one.
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, size + 2**28))
for change in json.loads(sys.argv[3]):
    print(change, end=" ", flush=True)
    data = bytearray(raw)
    if kind == "cut":
        del data[change:]
    else:
        data[change[0]] ^= change[1]
    try:
        got = torch.jit.load(io.BytesIO(bytes(data)))(EXAMPLE)
        right = isinstance(got, torch.Tensor) and got.dtype == want.dtype and torch.equal(got, want)
        print("right" if right else f"wrong: {got}")
    except Exception as error:
        # PyTorch quotes bytes of the file, which some versions of Python cannot take for a text.
        print("error" if str(error) or type(error) is RuntimeError else f"wrong: {error!r}")
"""


def _outcomes(path, kind, changes):
    """What came of each change: "right", "error", or else how it went wrong.

    A process that dies is started again behind the change that it died of.
    """
    outcomes = {}
    waiting = list(changes)
    while waiting:
        process = run_python(_TRY, path, kind, json.dumps(waiting), returncode=None)
        lines = process.stdout.splitlines()
        for change, line in zip(waiting, lines, strict=False):
            outcomes[change] = line.rsplit("] " if kind == "flip" else " ", 1)[-1]
        if process.returncode != 0:
            outcomes[waiting[len(lines) - 1]] = f"died of {process.returncode}"
        assert lines, process.stderr
        waiting = waiting[len(lines) :]
    assert list(outcomes) == list(changes)
    return outcomes


def test_a_file_that_is_cut_off_is_an_error(file):
    size = file.stat().st_size
    cuts = [0, 1, 30, 64, 100, *(size * part // 14 for part in range(1, 14)), size - 30, size - 1]
    assert len(cuts) == 20
    outcomes = _outcomes(file, "cut", cuts)
    assert {cut: outcome for cut, outcome in outcomes.items() if outcome != "error"} == {}


def _positions(path):
    """Every third byte of the pickled state, and seeded-random ones of everything else."""
    dice = random.Random(20)
    size = path.stat().st_size
    parts = [range(size), range(size - 1200, size), *filter(len, member_ranges(path).values())]
    chosen = {dice.choice(part) for part in parts for _ in range(20)}
    return sorted(chosen | set(pickle_range(path)[::3]))


@pytest.mark.parametrize("mask", [0xFF, 0x01])
def test_a_changed_byte_gives_an_error_or_right_numbers(file, mask):
    changes = [(position, mask) for position in _positions(file)]
    outcomes = _outcomes(file, "flip", changes)
    assert {
        change: text for change, text in outcomes.items() if text not in ("right", "error")
    } == {}
    assert set(outcomes.values()) == {"right", "error"}


def test_a_changed_byte_of_any_tensor_is_found(file):
    module = torch.jit.load(str(file))
    changes = {}
    for name, tensor in state_of(module)[5].items():
        data = tensor.numpy().tobytes()
        start = file.read_bytes().index(data)
        dice = random.Random(name)
        for _ in range(40):
            changes[start + dice.randrange(len(data)), 1 << dice.randrange(8)] = name
    outcomes = _outcomes(file, "flip", sorted(changes))
    assert {
        (changes[change], change): text for change, text in outcomes.items() if text != "error"
    } == {}


def test_a_file_of_something_else_is_an_error(tmp_path):
    for name, content in (("empty", b""), ("text", b"hello" * 100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RuntimeError):
            torch.jit.load(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"does not exist"):
        torch.jit.load(str(tmp_path / "missing"))


def test_a_portable_module_is_small(torchscript_file):
    assert torchscript_file.stat().st_size < 20_000
    assert len(saved_bytes(trace_small_net())) < 20_000
