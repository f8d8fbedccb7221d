"""A process keeps equal weights, code and graphs once, whichever way they came in."""

import copy
import gc

import pytest
import torch
from helpers import EXAMPLE, SmallNet, bytes_of, damaged, expected, flagged, save

import neuron_ext

NATIVE = ("code", "weights")


def addresses(module, names=NATIVE):
    return [bytes_of(module, name).data_ptr() for name in names]


def load(path):
    return torch.jit.load(str(path))


def test_two_loads_of_a_file_share_code_and_weights(native_file):
    one, other = load(native_file), load(native_file)
    assert addresses(one) == addresses(other)
    assert torch.equal(one(EXAMPLE), expected())
    assert torch.equal(other(EXAMPLE), expected())


def test_the_shared_graph_of_portable_modules(torchscript_file):
    one, other = load(torchscript_file), load(torchscript_file)
    assert addresses(one, ["graph"]) == addresses(other, ["graph"])
    assert torch.equal(one(EXAMPLE), expected())
    del one
    gc.collect()
    assert torch.equal(other(EXAMPLE), expected())


def test_a_deep_copy_shares(native_net):
    twin = copy.deepcopy(native_net)
    assert addresses(twin) == addresses(native_net)
    assert torch.equal(twin(EXAMPLE), expected())


@pytest.mark.parametrize("traced_first", [True, False])
def test_a_trace_and_its_own_file_share(tmp_path, traced_first):
    traced = neuron_ext.trace(SmallNet().eval(), EXAMPLE)
    path = save(traced, tmp_path / "m.pt")
    if traced_first:
        assert torch.equal(traced(EXAMPLE), expected())
    loaded = load(path)
    assert torch.equal(traced(EXAMPLE), expected())
    assert addresses(loaded) == addresses(traced)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_lazy_load_shares_once_it_is_loaded(native_net, tmp_path, asynchronous):
    path = save(flagged(native_net, lazy=True, asynchronous=asynchronous), tmp_path / "m.pt")
    lazy = load(path)
    assert neuron_ext.status(lazy)[0].state == "unloaded"
    neuron_ext.wait(lazy)
    assert addresses(lazy) == addresses(native_net)
    assert torch.equal(lazy(EXAMPLE), expected())


def test_what_is_shared_outlives_the_one_that_brought_it(native_file, tmp_path):
    first, second = load(native_file), load(native_file)
    del first
    gc.collect()
    assert torch.equal(second(EXAMPLE), expected())
    again = load(save(second, tmp_path / "again.pt"))
    assert torch.equal(again(EXAMPLE), expected())
    assert addresses(again) == addresses(second)


def test_the_last_user_frees(native_file, fork_server):
    """In a process of its own: other tests may have the file loaded still."""
    code = """
        import gc, weakref
        from helpers import EXAMPLE, bytes_of, expected
        modules = [torch.jit.load(args[0]) for _ in range(3)]
        weights = weakref.ref(bytes_of(modules[0], "weights"))
        result = []
        while modules:
            # A tensor that C++ code still holds keeps its Python object.
            result.append(weights() is not None)
            assert torch.equal(modules.pop()(EXAMPLE), expected())
            gc.collect()
        result.append(weights() is not None)
    """
    assert fork_server.run(code, str(native_file)) == [True, True, True, False]


@pytest.mark.parametrize("name", NATIVE)
def test_damage_is_found_though_the_good_bytes_are_in_memory(native_net, name):
    assert torch.equal(native_net(EXAMPLE), expected())
    with pytest.raises(RuntimeError, match=r"of subgraph 'SmallNet' is damaged"):
        damaged(native_net, name)(EXAMPLE)
    assert torch.equal(native_net(EXAMPLE), expected())
