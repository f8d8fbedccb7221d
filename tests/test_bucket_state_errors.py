"""Shared state of buckets that the models do not fit, and preprocessors that make no views."""

import re

import pytest
import torch
from bucket_state_helpers import Sum, make_sum, shared_config, trace_cache


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    monkeypatch.setattr("neuron_ext.buckets.trace.usable_cpus", lambda: 1)


def returns(source):
    unit = torch.jit.CompilationUnit(
        "def f(shapes: List[List[List[int]]], states: List[Tensor], i: Tensor) -> List[Tensor]:\n"
        f"  return {source}\n"
    )
    return lambda: unit.f


WHOLE = [torch.zeros(3)]


@pytest.mark.parametrize(
    ("preprocessor", "buffers", "text"),
    [
        (None, WHOLE * 2, r"aliases of 1 state\(s\), and shared_state_buffer has 2 tensor\(s\)"),
        (
            None,
            [torch.zeros(3, dtype=torch.int64)],
            r"state 0 .* is a float32 tensor of shape \[3\], and shared_state_buffer\[0\] is a "
            r"int64 tensor .* the same shape and dtype, or a shared_state_buffer_preprocessor",
        ),
        (None, [torch.zeros(4)], r"shared_state_buffer\[0\] is a float32 tensor of shape \[4\]"),
        (
            returns("[states[0].to(torch.int32)]"),
            [torch.zeros(3, dtype=torch.int32)],
            r"is a int32 tensor of shape \[3\]; expected the same dtype$",
        ),
    ],
)
def test_states_that_do_not_fit_the_buffers(preprocessor, buffers, text):
    with pytest.raises(ValueError, match=f"^{re.escape('bucket 0 of 2: ')}.*{text}"):
        trace_cache(make_sum, shared_config(preprocessor, buffers))


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("states + states", r"bucket 0, returned 2 tensor\(s\); expected 1"),
        ("[states[0][1:]]", r"bucket 0, returned a float32 tensor of shape \[2\] for state 0; exp"),
        ("[states[0].to(torch.int32)]", "returned a int32 tensor .* for state 0; expected"),
        ("[states[0] + 0]", r"for state 0 that is no view of shared_state_buffer\[0\]"),
        ("[states[0][:1].expand(3)]", r"for state 0 that is no view of shared_state_buffer\[0\]"),
        ("[states[int(i)]]", "for bucket 1, failed: .*index out of range"),
    ],
)
def test_preprocessors_that_return_something_else(source, text):
    with pytest.raises(ValueError, match=f"(?s)preprocessor, called .*{text}"):
        trace_cache(make_sum, shared_config(returns(source), WHOLE))


def test_views_of_another_buffer():
    with pytest.raises(
        ValueError, match=r"for state 0 that is no view of shared_state_buffer\[0\]"
    ):
        trace_cache(make_two, shared_config(returns("[states[1], states[0]]"), WHOLE * 2))


def make_two(length):
    model = Sum(length)
    model.register_buffer("other", torch.zeros(3))
    model.forward = lambda x: (x, model.sum + 1, model.other + 1)
    return model, {model.sum: 1, model.other: 2}


def test_buffers_that_are_not_dense():
    with pytest.raises(ValueError, match=r"'shared_state_buffer\[1\]' .* layout torch.sparse_coo"):
        trace_cache(make_sum, shared_config(None, [torch.zeros(3), torch.zeros(3).to_sparse()]))
