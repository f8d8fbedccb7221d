"""State that each bucket has for itself, and preprocessors that have nothing to do."""

import copy

import pytest
import torch
from bucket_helpers import config, get_kernel, inputs, seeded_pooled, trace_buckets
from bucket_state_helpers import (
    LENGTHS,
    STEPS,
    Sum,
    get_state_preprocessor,
    given,
    trace_cache,
)
from bucket_state_helpers import get_kernel as get_cache_kernel
from trace_helpers import assert_same, loaded, saved_bytes

import neuron_ext


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    monkeypatch.setattr("neuron_ext.buckets.trace.usable_cpus", lambda: 1)


def make_named(length):
    model = torch.nn.Sequential(Sum(length)).eval()
    return model, {model[0].sum: 1}


@pytest.mark.parametrize("preprocessor", [None, get_state_preprocessor])
def test_without_a_shared_buffer_each_bucket_has_its_own_state(preprocessor):
    made = config(
        get_cache_kernel,
        func_kwargs=[{"length": length} for length in LENGTHS],
        shared_state_buffer_preprocessor=preprocessor,  # without effect
    )
    module = loaded(saved_bytes(trace_cache(make_named, made)))
    module = copy.deepcopy(module)
    assert list(module.state_dict()) == ["bucket_0.0.sum", "bucket_1.0.sum"]
    for _ in range(2):
        want = {4: torch.full((3,), 9.0), 8: torch.full((3,), 9.0)}
        for x in STEPS:
            length = 4 if x.size(1) <= 4 else 8
            want[length] += x.sum((0, 1)) * length
            assert torch.equal(module(x), want[length] + 1)
            assert list(map(torch.Tensor.tolist, module.state_dict().values())) == [
                want[4].tolist(),
                want[8].tolist(),
            ]
        neuron_ext.reset_state(module)
        assert all(torch.equal(one, torch.full((3,), 9.0)) for one in module.state_dict().values())


class Maybe(Sum):
    """With a state that is a parameter under two names, or with none."""

    def __init__(self, length):
        super().__init__(length)
        if length == 4:
            del self.sum
            self.sum = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
            self.other = torch.nn.Module()
            self.other.sum = self.sum

    def forward(self, x):
        total = x.sum((0, 1))
        return (total + self.sum, total + self.other.sum) if self.length == 4 else total


def make_maybe(length):
    model = Maybe(length).eval()
    return model, {model.sum: 1} if length == 4 else None


def test_state_in_one_bucket_alone():
    module = trace_cache(
        make_maybe, config(get_cache_kernel, func_kwargs=[{"length": n} for n in LENGTHS])
    )
    assert sorted(module.state_dict()) == ["bucket_0.other.sum", "bucket_0.sum"]
    for i in (1, 2, 3):
        assert torch.equal(module(given(4)), given(4).sum((0, 1)) * i)
        assert torch.equal(module(given(5)), given(5).sum((0, 1)))
    (parameter,) = module.parameters()
    assert torch.equal(parameter, given(4).sum((0, 1)) * 3)


def test_the_configuration_of_the_guide():
    """A preprocessor for state that the model does not have."""
    made = neuron_ext.BucketModelConfig(
        get_kernel, shared_state_buffer_preprocessor=get_state_preprocessor
    )
    module = trace_buckets(configuration=made)
    for rows in range(1, 9):
        assert_same(module(*inputs(rows)), seeded_pooled()(*inputs(rows)))
