"""`dynamic_batch`: batches of any size through a module that was traced for one."""

import copy
from functools import partial

import pytest
import torch
from helpers import only_status, save
from helpers_threads import run_threads

import neuron_ext


class TwoInputs(torch.nn.Module):
    """Every row's result depends on that row alone, exactly."""

    def forward(self, x, y):
        return {"sum": x + y.unsqueeze(1), "double": y * 2}


ROWS = 3


def example(rows, start=0):
    x = torch.arange(start, start + rows * 4, dtype=torch.float32).reshape(rows, 4)
    return x, torch.arange(start, start + rows)


@pytest.fixture(scope="module", params=["torchscript", "inductor"])
def file(request, tmp_path_factory):
    traced = neuron_ext.trace(TwoInputs(), example(ROWS), compiler=request.param)
    assert neuron_ext.dynamic_batch(traced) is traced
    return save(traced, tmp_path_factory.mktemp("batch") / "m.pt")


def assert_right(module, rows, start=0):
    x, y = example(rows, start)
    got = module(x, y)
    want = TwoInputs()(x, y)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
        assert got[name].dtype == tensor.dtype


@pytest.mark.parametrize("cores", [1, 2, 4])
def test_every_row_comes_back_in_order(file, cores):
    with neuron_ext.neuron_cores_context(0, cores):
        module = torch.jit.load(str(file))
    for rows in [*range(14), 100]:
        assert_right(module, rows)


def test_the_flag_is_saved_shown_and_taken_back(file):
    module = torch.jit.load(str(file))
    assert only_status(module).dynamic_batch
    assert_right(copy.deepcopy(module), 5)
    neuron_ext.dynamic_batch(module, False)
    assert not only_status(module).dynamic_batch
    assert_right(module, ROWS)
    with pytest.raises(RuntimeError, match=r"shape \[3, 4\] on cpu, got .* shape \[5, 4\]"):
        module(*example(5))


def test_wrong_batches_are_named(file):
    module = torch.jit.load(str(file))
    x, y = example(5)
    with pytest.raises(RuntimeError, match=r"input 'x'.*expected .* \[5, 4\].*got .* \[5, 7\]"):
        module(torch.zeros(5, 7), y)
    with pytest.raises(RuntimeError, match=r"input 'y'.*expected .* \[5\].*got .* \[4\]"):
        module(x, y[:4])


def test_what_has_no_batch_is_a_value_error():
    traced = neuron_ext.trace(lambda x: x.sum(), torch.rand(2), compiler="torchscript")
    with pytest.raises(ValueError, match=r"its output 0 has shape \[\], and its inputs 2 rows"):
        neuron_ext.dynamic_batch(traced)
    assert not only_status(traced).dynamic_batch


def test_the_example_of_the_documentation():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 1, 3)

        def forward(self, x):
            return self.conv(x) + 1

    n = Net()
    n.eval()
    inputs_batch_8 = torch.rand(8, 1, 3, 3)
    neuron_net = neuron_ext.trace(n, torch.rand(1, 1, 3, 3))
    neuron_net_dynamic_batch = neuron_ext.dynamic_batch(neuron_net)
    torch.testing.assert_close(neuron_net_dynamic_batch(inputs_batch_8), n(inputs_batch_8))


def test_threads_share_the_replicas(file):
    with neuron_ext.multicore_context():
        module = torch.jit.load(str(file))

    def work(index):
        for rows in range(20):
            assert_right(module, rows + index % 3, start=1000 * index)

    run_threads([partial(work, index) for index in range(16)])


def test_a_module_without_subgraphs_is_left_alone():
    module = torch.jit.script(torch.nn.ReLU())
    assert neuron_ext.dynamic_batch(module) is module
