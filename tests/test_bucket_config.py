"""What `BucketModelConfig` and `bucket_model_trace` refuse, before anything is compiled."""

import re

import pytest
import torch
from bucket_helpers import config, examples, get_kernel, make_pooled, trace_buckets

import neuron_ext


def kernel_of(*, takes="tensors: List[Tensor]", returns="tensors, torch.tensor([0])"):
    """A factory of a kernel of this source."""
    unit = torch.jit.CompilationUnit(f"def kernel({takes}):\n  return {returns}\n")
    return lambda *_: unit.kernel


def test_the_configuration_of_the_guide():
    def state_preprocessor(
        shapes_collection: list[list[list[int]]],
        states: list[torch.Tensor],
        bucket_idx_tensor: torch.Tensor,
    ) -> list[torch.Tensor]:
        bucket_idx = torch.ops.aten.Int(bucket_idx_tensor)
        shapes = shapes_collection[bucket_idx]
        sliced_state_tensors = []

        for i in range(len(shapes)):
            expected_shape = shapes[i]
            state_tensor = states[i]
            state_tensor_shape = state_tensor.shape
            for j, npos in enumerate(expected_shape):
                state_tensor_dim_length = state_tensor_shape[j]
                state_tensor = torch.ops.aten.slice(
                    state_tensor,
                    dim=j,
                    start=state_tensor_dim_length - npos,
                    end=state_tensor_dim_length,
                )
            sliced_state_tensors.append(state_tensor)

        return sliced_state_tensors

    def get_state_preprocessor():
        return torch.jit.script(state_preprocessor)

    made = neuron_ext.BucketModelConfig(
        get_kernel, shared_state_buffer_preprocessor=get_state_preprocessor
    )
    states = [torch.arange(6.0).reshape(1, 6)]
    for index, kept in enumerate((2, 6)):
        (state,) = made.scripted_preprocessor([[[1, 2]], [[1, 6]]], states, torch.tensor([index]))
        assert torch.equal(state, states[0][:, 6 - kept :])


def test_a_good_configuration():
    made = config(func_kwargs=[{"a": 1}, {}], shared_state_buffer=[torch.zeros(2)])
    assert made.kwargs_of_buckets(2) == [{"a": 1}, {}]
    assert made.bucket_kernel is get_kernel
    assert config(func_kwargs={"a": 1}).kwargs_of_buckets(3) == [{"a": 1}] * 3
    assert config().kwargs_of_buckets(1) == [{}]


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        (None, "bucket_kernel must be a function .*, got None"),
        (
            lambda: 3,
            "bucket_kernel must return what torch.jit.script .* returned 3 of type int",
        ),
        (lambda: lambda tensors: tensors, "bucket_kernel must return what torch.jit.script makes"),
        (get_kernel(), "bucket_kernel is a TorchScript function itself"),
        (kernel_of(takes="tensors"), r"but it is \(Tensor\) -> .*annotate it"),
        (kernel_of(takes="tensors: List[Tensor], i: int"), r"is \(List\[Tensor\], int\)"),
        (kernel_of(returns="tensors"), r"-> List\[Tensor\]\. "),
        (kernel_of(returns="tensors, 0"), r"-> Tuple\[List\[Tensor\], int\]\. "),
        (kernel_of(takes="", returns="[torch.ones(1)], torch.ones(1)"), r"is \(\) -> "),
    ],
)
def test_kernels_that_are_none(kernel, text):
    with pytest.raises(ValueError, match=text):
        neuron_ext.BucketModelConfig(kernel)


def test_what_a_kernel_s_factory_raises_comes_through():
    def factory():
        raise LookupError("no kernel today")

    with pytest.raises(LookupError, match="no kernel today"):
        neuron_ext.BucketModelConfig(factory)


def test_more_arguments_with_defaults_are_fine():
    def kernel(tensors: list[torch.Tensor], index: int = 0):
        return tensors, torch.tensor([index])

    assert (
        neuron_ext.BucketModelConfig(lambda: torch.jit.script(kernel)).scripted_kernel([])[0] == []
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"func_kwargs": 3}, "func_kwargs must be a dict, a list of dicts or None, got 3"),
        ({"func_kwargs": [{}, 3]}, r"func_kwargs\[1\] must be a dict .*, got 3"),
        ({"func_kwargs": {3: 4}}, "func_kwargs has the key 3 of type int"),
        ({"func_kwargs": [{}, {3: 4}]}, r"func_kwargs\[1\] has the key 3 of type int"),
        ({"shared_state_buffer": torch.zeros(2)}, "shared_state_buffer must be a list of at least"),
        ({"shared_state_buffer": []}, "shared_state_buffer must be a list of at least"),
        ({"shared_state_buffer": [1]}, r"shared_state_buffer\[0\] must be a CPU tensor, got 1"),
        (
            {"shared_state_buffer": [torch.zeros(1, device="meta")]},
            r"shared_state_buffer\[0\] must be a CPU tensor, got a tensor on device meta",
        ),
        ({"shared_state_buffer_preprocessor": 3}, "preprocessor must be a function .*, got 3"),
        (
            {"shared_state_buffer_preprocessor": get_kernel},
            r"of shared_state_buffer_preprocessor must be \(List\[List\[List\[int\]\]\]",
        ),
    ],
)
def test_bad_values(options, text):
    with pytest.raises(ValueError, match=text):
        config(**options)


def test_unknown_arguments():
    with pytest.raises(TypeError, match="func_args"):
        neuron_ext.BucketModelConfig(get_kernel, func_args={})
    with pytest.raises(TypeError, match="positional"):
        neuron_ext.BucketModelConfig(get_kernel, [torch.zeros(1)])
    with pytest.raises(TypeError, match="partitioner_config"):
        trace_buckets(partitioner_config=None)


# ------------------------------------------------------------------------------------- the trace


def untouched():
    raise AssertionError("func is not called where arguments are bad")


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "example_inputs must be a list .*, got an empty list"),
        (tuple(examples()), "example_inputs must be a list .*, got <class 'tuple'>"),
        (X, "example_inputs must be a list .*, got <class 'torch.Tensor'>"),
        ([X, ()], r"example_inputs\[1\] is empty"),
        (
            [X, (X, X)],
            r"example_inputs\[1\] has the structure \(Tensor, Tensor\), and .*\(Tensor\)",
        ),
        ([{"a": X}, {"b": X}], r"example_inputs\[1\] has the structure \(\{'b': Tensor\}\)"),
        ([(X, 3), (X, 4)], r"example input example_inputs\[0\]\[1\] is 3 of type int"),
        ([X, torch.zeros(1, device="meta")], r"example_inputs\[1\]\[0\] is on device meta"),
    ],
)
def test_bad_example_inputs(given, text):
    with pytest.raises(ValueError, match=text):
        neuron_ext.bucket_model_trace(untouched, given, config())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"func": 3}, TypeError, "func must be a function .*, got 3"),
        ({"func": torch.nn.Linear(2, 2)}, ValueError, "func is a Linear, a model itself"),
        ({"bucket_config": get_kernel}, ValueError, "bucket_config must be a BucketModelConfig"),
        (
            {"bucket_config": config(func_kwargs=[{}])},
            ValueError,
            r"func_kwargs has 1 dict\(s\), and example_inputs has 2 bucket\(s\)",
        ),
        ({"compiler": "gcc"}, ValueError, "compiler='gcc' is unknown"),
        ({"compiler_args": "--fast"}, ValueError, "--fast"),
        ({"compiler_workdir": ""}, ValueError, "compiler_workdir must be the path"),
    ],
)
def test_bad_arguments(options, error, text):
    given = {
        "func": untouched,
        "example_inputs": examples(),
        "bucket_config": config(),
        **options,
    }
    with pytest.raises(error, match=text):
        neuron_ext.bucket_model_trace(**given)


@pytest.mark.parametrize(
    ("returned", "error", "text"),
    [
        (torch.nn.Linear(3, 3), ValueError, "returned an object of type Linear"),
        ((torch.nn.Linear(3, 3),), ValueError, "returned a tuple of 1"),
        ((3, {}), ValueError, "a model, or another callable, .* of type int"),
        ((torch.nn.Linear(3, 3), [1]), ValueError, "input_output_aliases, a dict, .* of type list"),
        (
            (torch.nn.Linear(3, 3), {X: 0}),
            ValueError,
            "input_output_aliases has the example input 'input'; expected parameters and buffers",
        ),
    ],
)
def test_what_func_returns(monkeypatch, returned, error, text):
    monkeypatch.setattr("neuron_ext.buckets.trace.usable_cpus", lambda: 1)
    with pytest.raises(error, match=f"^{re.escape('bucket 0 of 2: ')}.*{text}"):
        trace_buckets(lambda: returned, [X, X])


def test_the_work_folder_has_one_for_each_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr("neuron_ext.buckets.trace.usable_cpus", lambda: 1)
    trace_buckets(make_pooled, compiler_workdir=tmp_path / "work")
    for i in range(2):
        assert (tmp_path / "work" / f"bucket_{i}" / "graph.pt").stat().st_size > 0
