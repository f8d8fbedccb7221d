"""What ``trace(..., inline_weights_to_neff=False)`` makes of models and functions."""

import copy
import functools
import logging

import pytest
import torch
from helpers import only_status
from trace_helpers import loaded, saved_bytes, state_of
from weights_helpers import X, assert_runs, network, separated

import neuron_ext


def test_there_is_one_copy_of_the_weights():
    net = torch.nn.Linear(500, 500).eval()
    size = len(saved_bytes(separated(net, torch.rand(1, 500))))
    assert 1_000_000 < size < 1_100_000
    native = separated(net, torch.rand(1, 500), compiler="inductor")
    assert "weights" not in state_of(native)[5]


def test_functions_have_their_modules_weights_under_sensible_names():
    encoder, decoder = torch.nn.Linear(4, 3).eval(), torch.nn.Linear(3, 2).eval()
    shift = torch.rand(2)

    def func(x):
        return decoder(encoder(x)) + shift

    traced = separated(func, X)
    assert set(traced.state_dict()) == {
        f"{name}.{kind}" for name in ("encoder", "decoder") for kind in ("weight", "bias")
    }
    assert torch.equal(traced(X), func(X))
    net = network()
    assert list(separated(net.forward, X).state_dict()) == list(net.state_dict())
    bound = separated(functools.partial(lambda module, x: module(x), net), X)
    assert list(bound.state_dict()) == list(net.state_dict())
    assert torch.equal(bound(X), net(X))


@pytest.mark.parametrize("compiler", ["torchscript", "inductor"])
def test_an_lstm_which_keeps_a_list_of_its_weights(compiler):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = torch.nn.LSTM(3, 2, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    net, other, x = Net().eval(), Net().eval(), torch.rand(1, 4, 3)
    module = separated(net, x, compiler=compiler)
    torch.testing.assert_close(module(x), net(x))
    neuron_ext.replace_weights(module, other)
    torch.testing.assert_close(module(x), other(x))
    assert net.rnn._flat_weights[0] is net.rnn.weight_ih_l0


def test_control_flow_inside():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((2,), 3.0))

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x, w: x * w, lambda x, w: x - w, (x, self.weight))

    net, x = Net(), torch.ones(2)
    module = separated(net, x, compiler="inductor")
    neuron_ext.replace_weights(module, {"weight": torch.full((2,), 5.0)})
    assert torch.equal(module(x), 5 * x)
    assert torch.equal(module(-x), -x - 5)


@pytest.mark.parametrize("compiler", ["torchscript", "inductor"])
def test_a_weight_that_is_reached_another_way_is_refused(compiler):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(2))
            self.register_buffer("two", torch.ones(2))
            self.all = [self.one, self.two]

        def forward(self, x):
            return x * self.all[0] + self.all[1]

    with pytest.raises(ValueError, match="reaches 'one', 'two' by another way"):
        separated(Net(), torch.ones(2), compiler=compiler)


@pytest.mark.parametrize(
    ("name", "why"),
    [("subgraph", "has 'subgraph' of its own"), ("in", "'in' is a keyword")],
)
def test_names_that_a_traced_module_cannot_have(name, why):
    net = torch.nn.Module()
    net.add_module(name, torch.nn.Linear(2, 2))
    net.forward = lambda x: getattr(net, name)(x)
    with pytest.raises(ValueError, match=f"'{name}.weight' cannot be held .*{why}"):
        separated(net, torch.ones(1, 2))


def test_names_that_are_no_identifiers_are_fine():
    net = torch.nn.ModuleDict({"a-b": torch.nn.Linear(2, 2), "graph": torch.nn.Linear(2, 2)})
    net.forward = lambda x: net["graph"](net["a-b"](x))
    x = torch.ones(1, 2)
    module = loaded(saved_bytes(separated(net, x)))
    assert list(module.state_dict()) == list(net.state_dict())
    assert torch.equal(module(x), net.forward(x))


def test_what_has_no_python_code_is_refused():
    scripted_net = torch.jit.script(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'weight' belongs to a ScriptModule"):
        separated(scripted_net, torch.ones(1, 2))


def test_a_func_that_changes_its_buffers_is_still_refused():
    with pytest.raises(ValueError, match=r"changes its buffer 'running_mean'"):
        separated(torch.nn.BatchNorm1d(4).train(), X)


def test_a_cast_leaves_the_weights_as_they_are():
    net = network()
    module, other = separated(net, X, compiler_args="--auto-cast all"), network(net)
    assert module.state_dict()["layers.0.weight"].dtype == torch.float32
    neuron_ext.replace_weights(module, other)
    torch.testing.assert_close(module(X), other(X), atol=0.05, rtol=0.05)
    assert not torch.equal(module(X), other(X))


def test_the_compile_cache_does_not_mind_the_values(caplog):
    caplog.set_level(logging.INFO, "neuron_ext")
    func = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh()).eval()
    other = copy.deepcopy(func)
    torch.nn.init.ones_(other[0].weight)
    x = torch.rand(1, 3)

    def traced(net, **options):
        caplog.clear()
        options = {"compiler": "inductor", "compiler_args": "--verbose info", **options}
        module = neuron_ext.trace(net, x, **options)
        torch.testing.assert_close(module(x), net(x))
        return "cache: hit" in caplog.text

    assert not traced(func, inline_weights_to_neff=False)
    assert traced(other, inline_weights_to_neff=False)
    assert not traced(other)
    assert not traced(func)


def test_move_moves_that_module_and_nothing_else(idle_cores):
    net = network()
    data = saved_bytes(separated(net, X))
    module, other = loaded(data), loaded(data)
    neuron_ext.move_trace_to_device(module, 3)
    assert only_status(module).cores == [3]
    assert only_status(other).cores == [1]
    assert_runs(module, net)
    for bad in (-1, 4, "0", 1.0, True, None):
        with pytest.raises(ValueError, match="4 cores"):
            neuron_ext.move_trace_to_device(module, bad)
    assert only_status(module).cores == [3]


# The examples of the documentation, with small files in the place of folders.
