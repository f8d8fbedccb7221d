"""A cut model is one ScriptModule: placement, flags, files, threads and checks of its inputs."""

import pytest
import torch
from helpers import CoreCounter, run_threads
from partition_helpers import OTHER, Model, Sorter, X, partition
from trace_helpers import assert_same, loaded, saved_bytes

import neuron_ext


@pytest.fixture(scope="module")
def sorter():
    return Sorter().eval()


@pytest.fixture(scope="module")
def sorted_file(sorter):
    """The bytes of a `Sorter` cut at its sort."""
    return saved_bytes(partition(sorter, X))


@pytest.fixture
def cut_sorter(sorted_file):
    return loaded(sorted_file)


# ------------------------------------------------------------------------------- what it does


def test_inputs_of_any_strides(cut_sorter, sorter):
    transposed = X.t().contiguous().t()
    assert_same(cut_sorter(transposed), sorter(X).detach())
    model = Model(lambda m, x: torch.sort(x.view(2, 6))[0].sum() + m.scaled(x)).eval()
    traced = partition(model, X, {"aten::sort", "aten::view"})
    assert_same(traced(transposed), model(X).detach())


def test_placement_and_status_reach_every_subgraph(cut_sorter, sorter, idle_cores):
    neuron_ext.set_neuron_cores(cut_sorter, 1, 2)
    assert [one.cores for one in neuron_ext.status(cut_sorter)] == [[1, 2], [1, 2]]
    counter = CoreCounter()
    assert_same(cut_sorter(X), sorter(X).detach())
    assert counter.since() == [0, 2, 0, 0]
    neuron_ext.unload(cut_sorter)
    assert {one.state for one in neuron_ext.status(cut_sorter)} == {"unloaded"}


def test_a_context_and_the_flags_count_for_every_subgraph(sorted_file, sorter, idle_cores):
    module = loaded(sorted_file)
    neuron_ext.lazy_load(module)
    neuron_ext.async_load(module)
    with neuron_ext.neuron_cores_context(3):
        again = loaded(saved_bytes(module))
    assert [(one.state, one.lazy_load, one.async_load) for one in neuron_ext.status(again)] == [
        ("unloaded", True, True)
    ] * 2
    neuron_ext.wait(again)
    assert [one.cores for one in neuron_ext.status(again)] == [[3], [3]]
    assert_same(again(X), sorter(X).detach())


def test_frozen_nested_and_scripted(cut_sorter, sorter):
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 1

    scripted = torch.jit.script(Wrapper(cut_sorter).eval())
    frozen = torch.jit.freeze(scripted)
    for module in (scripted, frozen, torch.jit.trace(Wrapper(cut_sorter), X)):
        names = {one.name for one in neuron_ext.status(module)}
        assert names == {"Sorter_neuron_0", "Sorter_neuron_2"}
        assert_same(module(OTHER), sorter(OTHER).detach() + 1)
        assert_same(loaded(saved_bytes(module))(OTHER), sorter(OTHER).detach() + 1)


def test_a_frozen_module_outlives_what_it_was_made_of(sorted_file, sorter, fork_server, tmp_path):
    code = """
        import gc
        module = torch.jit.freeze(torch.jit.load(args[0]))
        gc.collect()
        x = torch.arange(12.0).reshape(3, 4).requires_grad_()
        assert not module(x).requires_grad
        result = module(x).tolist()
        del module
        gc.collect()
        assert [core.models for core in neuron_ext.core_stats()] == [0, 0]
    """
    path = tmp_path / "model.pt"
    path.write_bytes(sorted_file)
    found = fork_server.run(code, str(path), env={"NEURON_EXT_HOST_CORES": 2})
    assert found == sorter(torch.arange(12.0).reshape(3, 4)).tolist()


def test_threads(cut_sorter, sorter):
    neuron_ext.set_multicore(cut_sorter)

    def work(index):
        for i in range(20):
            value = X + index * 100 + i
            assert_same(cut_sorter(value), sorter(value).detach())

    run_threads([lambda index=index: work(index) for index in range(8)])


def test_dynamic_batching_where_the_parts_allow_it(sorter):
    model = Model(lambda m, x, y: torch.sort(m.scaled(x))[0] * 2 + torch.sort(y)[0]).eval()
    traced = partition(model, (X, OTHER))
    with pytest.raises(RuntimeError, match=r"input 'inputs?_?\d?'.*expected a float32 tensor"):
        traced(torch.cat([X, X]), torch.cat([X, X]))
    neuron_ext.dynamic_batch(traced)
    for rows in (1, 3, 7):
        value = torch.arange(4.0 * rows).reshape(rows, 4)
        assert_same(traced(value, -value), model(value, -value).detach())


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (torch.ones(3, 5), "a float32 tensor of shape [3, 5] on cpu"),
        (torch.ones(4, 4), "a float32 tensor of shape [4, 4] on cpu"),
        (torch.ones(3), "a float32 tensor of shape [3] on cpu"),
        (torch.ones(3, 4, dtype=torch.int64), "a int64 tensor of shape [3, 4] on cpu"),
        (torch.ones(3, 4, device="meta"), "a float32 tensor of shape [3, 4] on meta"),
    ],
    ids=["size", "batch", "rank", "dtype", "device"],
)
def test_an_input_that_no_subgraph_takes_is_checked_all_the_same(wrong, got):
    def func(x, only_cpu, unused):
        return torch.sort(only_cpu)[0] + torch.relu(x)

    traced = partition(func, (X, X, X))
    for inputs, name in (((X, wrong, X), "only_cpu"), ((X, X, wrong), "unused")):
        with pytest.raises(RuntimeError) as caught:
            traced(*inputs)
        assert (
            f"input '{name}' of 'func': expected a float32 tensor of shape [3, 4] on cpu, got {got}"
        ) in str(caught.value)


def test_a_subgraph_names_an_input_as_the_caller_knows_it(cut_sorter):
    with pytest.raises(RuntimeError, match=r"input 'x' of subgraph 'Sorter_neuron_0': expected a"):
        cut_sorter(torch.ones(3, 5))
