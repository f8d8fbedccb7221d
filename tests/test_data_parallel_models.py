"""`DataParallel` over modules with weights of their own, state, buckets and CPU parts."""

import threading

import pytest
import torch
from helpers import run_threads

import neuron_ext
from neuron_ext import DataParallel


class Linear(torch.nn.Module):
    """Whole numbers, so that sums are exact."""

    def __init__(self, value):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((2, 3), float(value)), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.full((2,), float(value)), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


def numbers(rows):
    return torch.arange(rows * 3.0).reshape(rows, 3)


@pytest.fixture
def separated():
    return neuron_ext.trace(
        Linear(1), torch.zeros(2, 3), compiler="torchscript", inline_weights_to_neff=False
    )


@pytest.mark.parametrize("ids", [[0, 1], [0, 2, 3]])
def test_replaced_weights_are_those_of_every_core(separated, ids):
    parallel = DataParallel(separated, ids)
    x = numbers(24)
    assert torch.equal(parallel(x), Linear(1)(x))
    neuron_ext.replace_weights(parallel, Linear(3))
    assert torch.equal(parallel(x), Linear(3)(x))
    assert torch.equal(separated(x[:2]), Linear(3)(x[:2]))
    neuron_ext.replace_weights(separated, Linear(5).state_dict())
    assert torch.equal(parallel(x), Linear(5)(x))
    with pytest.raises(ValueError, match="bias"):
        neuron_ext.replace_weights(parallel, {"weight": torch.zeros(2, 3)})
    assert torch.equal(parallel(x), Linear(5)(x))


def test_a_call_sees_one_set_of_weights_in_all_its_chunks(separated):
    parallel = DataParallel(separated, [0, 2])
    parallel.split_size = 2
    x = numbers(16)
    wanted = [Linear(1)(x), Linear(2)(x)]
    stop = threading.Event()

    def replace():
        try:
            for i in range(300):
                neuron_ext.replace_weights(parallel, Linear(1 + i % 2))
        finally:
            stop.set()

    def call():
        calls = 0
        while not stop.is_set() or calls < 10:
            got = parallel(x)
            assert any(torch.equal(got, one) for one in wanted)
            calls += 1

    run_threads([replace, call, call, call])


def test_a_module_that_keeps_state_is_refused():
    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(3))

        def forward(self, x):
            total = self.total + x
            return total * 2, total

    model = Counter()
    traced = neuron_ext.trace(
        model, torch.zeros(3), compiler="torchscript", input_output_aliases={model.total: 1}
    )
    with pytest.raises(ValueError, match="subgraph 'Counter' keeps state between calls"):
        DataParallel(traced)
    assert neuron_ext.status(traced)[0].cores == []


def test_buckets(monkeypatch):
    def kernel(tensors: list[torch.Tensor]):
        x = tensors[0]
        size = 4 if x.shape[1] <= 4 else 8
        padding = torch.zeros([x.shape[0], size - x.shape[1]], dtype=x.dtype)
        return [torch.cat([x, padding], dim=1)], torch.tensor([0 if size == 4 else 1])

    monkeypatch.setattr("neuron_ext.buckets.trace.usable_cpus", lambda: 1)
    module = neuron_ext.bucket_model_trace(
        lambda: (lambda x: x.sum(1, keepdim=True) + x, {}),
        [torch.zeros(1, 4), torch.zeros(1, 8)],
        neuron_ext.BucketModelConfig(lambda: torch.jit.script(kernel)),
        compiler="torchscript",
    )
    parallel = DataParallel(module, [0, 1, 3])
    for rows in (1, 5, 12):
        for columns in (3, 4, 6):
            x = torch.arange(float(rows * columns)).reshape(rows, columns)
            got = parallel(x)
            assert torch.equal(got[:, :columns], x.sum(1, keepdim=True) + x)


def test_cpu_parts_between_subgraphs():
    def func(x):
        return torch.sort(x * 2, dim=1).values + 1

    config = neuron_ext.PartitionerConfig(
        ops_to_partition={"aten::sort"}, model_support_percentage_threshold=0.3
    )
    module = neuron_ext.trace(func, numbers(2), compiler="torchscript", partitioner_config=config)
    assert len(neuron_ext.status(module)) == 2
    parallel = DataParallel(module, [1, 3])
    assert len(neuron_ext.status(parallel)) == 4
    for rows in (2, 4):
        x = numbers(rows).flip(1)
        assert torch.equal(parallel(x), func(x))
