"""`DataParallel`: the same results as the module itself."""

import collections
import copy

import pytest
import torch
from data_parallel_helpers import affine, cores_of, numbers, traced_affine
from helpers import Pair, expected, save
from hypothesis import given, settings
from hypothesis import strategies as st

import neuron_ext as torch_neuronx
from neuron_ext import DataParallel

CORES = 4


# ------------------------------------------------------------------------------------------------
# the examples of the documentation, with a smaller model


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return self.conv(x) + 1


@pytest.fixture(scope="module")
def conv():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def model_neuron(conv):
    return torch_neuronx.trace(conv, torch.rand([1, 3, 8, 8]))


def test_default_takes_all_cores_and_batches_of_any_size(conv, model_neuron):
    model_parallel = torch_neuronx.DataParallel(model_neuron)
    assert model_parallel.device_ids == [0, 1, 2, 3]
    assert model_parallel.num_workers == 8
    for batch_size in [2, 3, 4, 5, 6, 11]:
        image_batched = torch.rand([batch_size, 3, 8, 8])
        torch.testing.assert_close(model_parallel(image_batched), conv(image_batched))
        assert model_parallel.split_size == max(1, batch_size // 4)


def test_chosen_cores(conv, model_neuron):
    model_parallel = torch_neuronx.DataParallel(model_neuron, device_ids=["nc:0", "nc:3"], dim=0)
    image_batched = torch.rand([4, 3, 8, 8])
    torch.testing.assert_close(model_parallel(image_batched), conv(image_batched))
    assert cores_of(model_parallel) == [[0], [3]]


def test_another_dimension(conv, model_neuron):
    model_parallel = torch_neuronx.DataParallel(model_neuron, device_ids=[0, 1], dim=2)
    image_batched = torch.rand([1, 3, 2 * 8, 8])
    want = torch.cat([conv(half) for half in image_batched.chunk(2, dim=2)], dim=2)
    torch.testing.assert_close(model_parallel(image_batched), want)
    with pytest.raises(ValueError, match=r"chunk 1 of \d.*expected a float32 tensor of shape"):
        model_parallel(torch.rand([1, 3, 15, 8]))


def test_disabled_dynamic_batching(conv, model_neuron):
    model_parallel = torch_neuronx.DataParallel(model_neuron, device_ids=[0, 1], dim=0)
    model_parallel.disable_dynamic_batching()
    with pytest.raises(ValueError, match=r"shape \[1, 3, 8, 8\].*shape \[2, 3, 8, 8\]"):
        model_parallel(torch.rand([4, 3, 8, 8]))
    image_batched = torch.rand([2, 3, 8, 8])
    torch.testing.assert_close(model_parallel(image_batched), conv(image_batched))
    never = torch_neuronx.DataParallel(model_neuron, [0, 1], set_dynamic_batching=False)
    with pytest.raises(ValueError, match=r"shape \[1, 3, 8, 8\]"):
        never(torch.rand([4, 3, 8, 8]))


# ------------------------------------------------------------------------------------------------
# every row, in order


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(0, 23),
    traced=st.integers(1, 5),
    dim=st.integers(-3, 2),
    ids=st.sets(st.integers(0, CORES - 1), min_size=1).map(sorted),
    split=st.none() | st.integers(1, 9),
)
def test_every_row_comes_back_in_order(rows, traced, dim, ids, split):
    def shape(size):
        return [size if at == dim % 3 else 2 + at for at in range(3)]

    parallel = DataParallel(traced_affine(*shape(traced)), ids, dim)
    if split is not None:
        parallel.split_size = split
    x = numbers(*shape(rows))
    got = parallel(x)
    assert got.shape == x.shape
    assert torch.equal(got, affine(x))


Named = collections.namedtuple("Named", ["left", "right"])


class Nested(torch.nn.Module):
    def forward(self, pair, table, items):
        x, y = pair
        return Named(x + y, table["a"] * 2), [items[0] - 1, items[1]], {"sum": x + table["a"]}


def nested_inputs(rows):
    x = numbers(rows, 2)
    return (x, x + 1), {"a": x * 3}, [x - 5, x * 7]


def test_containers_are_cut_and_joined_item_by_item():
    parallel = DataParallel(torch_neuronx.trace(Nested(), nested_inputs(2), compiler="torchscript"))
    for rows in (1, 2, 7, 16):
        pair, table, items = nested_inputs(rows)
        named, listed, mapped = parallel(pair, items=items, table=table)
        want_named, want_listed, want_mapped = Nested()(pair, table, items)
        assert torch.equal(named.left, want_named.left)
        assert torch.equal(named.right, want_named.right)
        assert all(torch.equal(a, b) for a, b in zip(listed, want_listed, strict=True))
        assert mapped.keys() == want_mapped.keys()
        assert torch.equal(mapped["sum"], want_mapped["sum"])


class Scaled(torch.nn.Module):
    """Traced submodules with arguments around them that are no tensors."""

    def __init__(self):
        super().__init__()
        self.first = traced_affine(1, 3)
        self.second = torch_neuronx.trace(torch.neg, torch.zeros(1, 3), compiler="torchscript")

    def forward(self, x, offset: torch.Tensor, scale: int = 1, name: str = "first"):
        y = self.first(x) if name == "first" else self.second(x)
        return y * scale + offset, y.sum(), scale


def test_what_is_no_tensor_goes_to_every_chunk():
    parallel = DataParallel(Scaled(), [0, 1])
    x = numbers(5, 3)
    rows, sums, scale = parallel(x, torch.tensor(0.5), scale=3)
    assert torch.equal(rows, affine(x) * 3 + 0.5)
    assert torch.equal(sums, torch.stack([affine(part).sum() for part in x.split(2)]))
    assert scale == 3
    rows, sums, scale = parallel(x, torch.tensor(0.0), name="second")
    assert torch.equal(rows, -x)
    assert scale == 1
    assert len(cores_of(parallel)) == 2


def test_values_that_differ_between_chunks_are_refused():
    class Size(torch.nn.Module):
        def forward(self, x):
            return x, x.shape[0]

    parallel = DataParallel(Size(), [0, 1])
    with pytest.raises(RuntimeError, match="one gives 2 and another 1; call the module itself"):
        parallel(torch.zeros(5, 1))


# ------------------------------------------------------------------------------------------------
# what the caller said


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([], "device_ids is empty"),
        ([0, 1, 0], "device_ids holds 0 more than once"),
        ([0, CORES], rf"device_ids holds {CORES}; this process sees {CORES} cores"),
        ([-1], "device_ids holds -1"),
        ([2**70], "device_ids holds 1180591620717411303424"),
        (["nc:9"], "device_ids holds 9"),
        (["0"], "device_ids holds '0'; expected the number of a core"),
        ([True], "device_ids holds True"),
        ("nc:0", "device_ids must be a list"),
        (0, "device_ids must be a list"),
    ],
)
def test_ids_that_cannot_be_are_named(ids, text):
    with pytest.raises(ValueError, match=text):
        DataParallel(traced_affine(1, 2), ids)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dim": "0"}, "dim must be of type int"),
        ({"dim": True}, "dim must be of type int"),
        ({"set_dynamic_batching": 1}, "set_dynamic_batching must be of type bool"),
    ],
)
def test_options_of_another_type_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        DataParallel(traced_affine(1, 2), **arguments)


def test_only_modules_that_can_be_scripted():
    class Unscriptable(torch.nn.Module):
        def forward(self, *x):
            return x

    with pytest.raises(ValueError, match="got function"):
        DataParallel(affine)
    with pytest.raises(ValueError, match="Unscriptable cannot be scripted"):
        DataParallel(Unscriptable())


def test_inputs_that_do_not_fit_are_named():
    parallel = DataParallel(
        torch_neuronx.trace(
            lambda x, y: x + y["b"],
            (torch.zeros(1, 2), {"b": torch.zeros(1, 2)}),
            compiler="torchscript",
        )
    )
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"inputs 'x' and 'y\['b'\]' have 4 and 3 rows in dim"):
        parallel(x, {"b": x[:3]})
    with pytest.raises(ValueError, match=r"chunk 1 of 4: input 'x'.*float32.*float64"):
        parallel(x.double(), {"b": x})
    with pytest.raises(ValueError, match="y"):
        parallel(x)
    with pytest.raises(ValueError, match="x"):
        parallel("x", {"b": x})
    deeper = DataParallel(traced_affine(1, 2), dim=2)
    with pytest.raises(ValueError, match=r"input 'x' has shape \[4, 2\] and no dimension 2"):
        deeper(x)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_split_size_and_num_workers_are_positive(value):
    parallel = DataParallel(traced_affine(1, 2))
    for name in ("split_size", "num_workers"):
        with pytest.raises(ValueError, match=name):
            setattr(parallel, name, value)


# ------------------------------------------------------------------------------------------------
# loading


@pytest.mark.usefixtures("idle_cores")
@pytest.mark.parametrize("ids", [[1, 2], [0, 2, 3]])
def test_a_lazy_module_loads_once_straight_onto_its_cores(tmp_path, ids):
    traced = torch_neuronx.trace(affine, torch.zeros(1, 2), compiler="torchscript")
    torch_neuronx.lazy_load(traced)
    loaded = torch.jit.load(str(save(traced, tmp_path / "m.pt")))
    assert cores_of(loaded) == [[]]
    parallel = DataParallel(loaded, ids)
    assert sorted(core for cores in cores_of(parallel) for core in cores) == ids
    models = [core.models for core in torch_neuronx.core_stats()]
    assert models == [int(core in ids) for core in range(CORES)]
    assert torch.equal(parallel(numbers(5, 2)), affine(numbers(5, 2)))
    del parallel, loaded
    assert [core.models for core in torch_neuronx.core_stats()] == [0] * CORES


def test_an_async_module_loads_in_the_background(tmp_path):
    traced = torch_neuronx.trace(affine, torch.zeros(1, 2), compiler="torchscript")
    torch_neuronx.async_load(traced)
    torch_neuronx.lazy_load(traced)
    parallel = DataParallel(torch.jit.load(str(save(traced, tmp_path / "m.pt"))), [0, 2])
    assert torch.equal(parallel(numbers(5, 2)), affine(numbers(5, 2)))
    torch_neuronx.wait(parallel, timeout=60)
    assert cores_of(parallel) == [[0], [2]]


def test_a_module_of_two_subgraphs_is_on_all_cores(small_net):
    parallel = DataParallel(Pair(small_net, copy.deepcopy(small_net)), [1, 2])
    x = numbers(6, 3)
    assert torch.equal(parallel(x), 2 * expected(x))
    assert cores_of(parallel) == [[1, 2], [1, 2]]


def test_a_frozen_module_needs_consecutive_cores(small_net):
    frozen = torch.jit.freeze(torch.jit.script(Pair(small_net, small_net)).eval())
    x = numbers(6, 3)
    assert torch.equal(DataParallel(frozen, [2, 3])(x), 2 * expected(x))
    with pytest.raises(ValueError, match="frozen"):
        DataParallel(frozen, [0, 2])
    assert cores_of(frozen) == [[2, 3]]


@pytest.mark.parametrize("ids", [None, [0, 2]])
def test_it_is_saved_as_a_script_module(tmp_path, ids):
    parallel = DataParallel(traced_affine(2, 2), ids)
    x = numbers(9, 2)
    scripted = torch.jit.script(torch.nn.Sequential(parallel.script_module, torch.nn.Identity()))
    assert torch.equal(scripted(x), affine(x))
    torch.jit.save(parallel, str(tmp_path / "m.pt"))
    loaded = torch.jit.load(str(tmp_path / "m.pt"))
    assert torch.equal(loaded(x), affine(x))
    assert cores_of(loaded) == cores_of(parallel)
    assert torch.equal(copy.deepcopy(parallel)(x), affine(x))
    wrapped = torch.nn.Sequential(parallel, torch.nn.Identity())
    assert torch.equal(wrapped(x), affine(x))
