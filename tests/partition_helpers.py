"""Models to cut, and the comparison of what was cut with the model. Holds no tests."""

import copy

import torch
from trace_helpers import assert_same, copied, loaded, saved_bytes

import neuron_ext
from neuron_ext import PartitionerConfig

X = torch.arange(12.0).reshape(3, 4) % 5 - 2
OTHER = 1 - X.flip(0) * 2


class Scale(torch.nn.Module):
    """Whole numbers, exact in any order."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(16.0).reshape(4, 4) % 7 - 3)
        self.bias = torch.nn.Parameter(torch.arange(4.0))
        self.register_buffer("shift", torch.tensor([1.0, -1.0, 2.0, 0.0]))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


class Model(Scale):
    """A `Scale` and whatever ``body(model, *inputs)`` does."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, *inputs):
        return self.body(self, *inputs)

    def scaled(self, x):
        return Scale.forward(self, x)


class Sorter(Scale):
    def forward(self, x):
        h = torch.relu(super().forward(x))
        return torch.sort(h)[0] * 2 + self.shift


def partition(func, inputs, ops=("aten::sort",), *, compiler="torchscript", traced=None, **config):
    config = PartitionerConfig(ops_to_partition=set(ops), **config)
    return neuron_ext.trace(
        func, inputs, compiler=compiler, partitioner_config=config, **(traced or {})
    )


def parts(module):
    return [name for name, _ in module.named_children()]


def check(func, inputs, traced, others=()):
    """Equal results and equal changes of the inputs, before and after a file, in a copy."""
    for module in (traced, loaded(saved_bytes(traced)), copy.deepcopy(traced)):
        for arguments in (inputs, *others):
            mine, theirs = copied(arguments), copied(arguments)
            with torch.no_grad():
                want = func(*theirs)
            assert_same(module(*mine), want)
            assert_same(mine, theirs)


def state(subgraph):
    """(version, ints, strings, int lists, string lists, tensors) of a subgraph."""
    return subgraph.__getstate__()[0]
