"""`replace_weights`: new weights for a traced module, in place."""

import copy
import warnings

import pytest
import torch
from helpers import only_status, run_threads, save
from trace_helpers import loaded, saved_bytes, state_of
from weights_helpers import X, assert_runs, network, separated

import neuron_ext
import neuron_ext as torch_neuronx


@pytest.fixture(scope="module", params=["torchscript", "inductor"])
def pair(request):
    """The network that was traced, and the bytes of the file."""
    net = network()
    before = copy.deepcopy(net.state_dict())
    traced = separated(net, X, compiler=request.param)
    assert_runs(traced, net)
    neuron_ext.replace_weights(traced, network(net))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    neuron_ext.replace_weights(traced, net)
    return net, saved_bytes(traced)


def test_the_state_dict_is_the_models(pair):
    net, data = pair
    module = loaded(data)
    assert list(module.state_dict()) == list(net.state_dict())
    for name, tensor in net.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
        assert module.state_dict()[name].dtype == tensor.dtype
    assert {name for name, _ in module.named_parameters()} == {
        name for name, _ in net.named_parameters()
    }
    assert module.head.weight.data_ptr() == module.embed.weight.data_ptr()


@pytest.mark.parametrize("as_dict", [True, False])
def test_replaced_by_a_module_or_its_state_dict(pair, as_dict):
    net, data = pair
    module, other = loaded(data), network(net)
    neuron_ext.replace_weights(module, other.state_dict() if as_dict else other)
    assert_runs(module, other)
    assert list(module.state_dict()) == list(other.state_dict())
    assert_runs(loaded(saved_bytes(module)), other)


def test_a_copy_has_its_own_weights_and_shares_the_code(pair):
    net, data = pair
    module, other = loaded(data), network(net)
    twin = copy.deepcopy(module)
    neuron_ext.replace_weights(module, other)
    assert_runs(module, other)
    assert_runs(twin, net)
    (name,) = {"code", "graph"} & state_of(module)[5].keys()
    assert state_of(module)[5][name].data_ptr() == state_of(twin)[5][name].data_ptr()


def test_all_that_does_not_fit_is_listed_and_nothing_replaced(pair):
    net, data = pair
    module = loaded(data)
    weights = network(net).state_dict()
    del weights["layers.0.bias"], weights["norm.running_var"]
    weights |= {"extra": torch.ones(1), "layers.2.weight": torch.ones(3, 4)}
    weights |= {"more.extra": torch.ones(1), "layers.1.weight": torch.ones(4, 4).double()}
    with pytest.raises(ValueError, match="none was replaced") as caught:
        neuron_ext.replace_weights(module, weights)
    text = str(caught.value)
    assert "missing: layers.0.bias, norm.running_var" in text
    assert "unexpected: extra, more.extra" in text
    assert "'layers.2.weight': expected a float32 tensor of shape [4, 4]" in text
    assert "'layers.1.weight': expected a float32" in text
    assert "got a float64 tensor" in text
    assert_runs(module, net)


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        (3, "of type int; expected a torch.nn.Module"),
        ({"layers.0.bias": 3}, "'layers.0.bias': an object of type int"),
        ({0: torch.ones(1)}, "weights has 0"),
    ],
)
def test_what_is_no_state_dict(pair, weights, why):
    with pytest.raises(ValueError, match=why):
        neuron_ext.replace_weights(loaded(pair[1]), weights)


def test_tied_weights_need_one_name_and_must_agree(pair):
    net, data = pair
    module, other = loaded(data), network(net)
    weights = other.state_dict()
    del weights["embed.weight"]
    neuron_ext.replace_weights(module, weights)
    assert_runs(module, other)
    weights["embed.weight"] = weights["head.weight"].clone()
    neuron_ext.replace_weights(module, weights)
    weights["embed.weight"] = weights["head.weight"] + 1
    with pytest.raises(ValueError, match=r"'head.weight' and 'embed.weight' are one tensor"):
        neuron_ext.replace_weights(module, weights)
    assert_runs(module, other)


def test_a_module_without_separated_weights_is_warned_of_and_left_alone(small_net):
    before = small_net(X[:, :3])
    with pytest.warns(UserWarning, match="no separated weights"):
        neuron_ext.replace_weights(small_net, {"any": torch.ones(1)})
    assert torch.equal(small_net(X[:, :3]), before)
    with pytest.warns(UserWarning, match="no separated weights"):
        neuron_ext.replace_weights(torch.nn.Linear(1, 1), {})
    with pytest.raises(ValueError, match="got int"):
        neuron_ext.replace_weights(3, {})


class Two(torch.nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first = first
        self.blocks = torch.nn.ModuleList([second])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.first(x)


def scripted(module):
    return torch.jit.script(module)


def frozen(module):
    return torch.jit.freeze(torch.jit.script(module).eval())


def through_a_file(module):
    return loaded(saved_bytes(torch.jit.script(module)))


def traced_again(module):
    return torch.jit.trace(module, X)


WRAPPERS = [lambda module: module, scripted, frozen, through_a_file, traced_again]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_several_blocks_in_one_module(pair, wrap):
    net, data = pair
    new = Two(network(net), network(net)).eval()
    module = wrap(Two(loaded(data), loaded(data)).eval())
    torch.testing.assert_close(module(X), Two(net, net)(X))
    neuron_ext.replace_weights(module, new.state_dict())
    torch.testing.assert_close(module(X), new(X))
    weights = new.state_dict()
    del weights["blocks.0.layers.0.bias"]
    with pytest.raises(ValueError, match=r"missing: blocks\.0\.layers\.0\.bias\."):
        neuron_ext.replace_weights(module, weights)
    neuron_ext.unload(module)  # PyTorch never frees what it froze


def test_one_block_under_two_paths_goes_by_either(pair):
    net, data = pair
    block, new = loaded(data), network(net)
    module = Two(block, block)
    neuron_ext.replace_weights(module, {f"first.{k}": v for k, v in new.state_dict().items()})
    torch.testing.assert_close(module(X), Two(new, new)(X))
    neuron_ext.replace_weights(module, Two(net, net))
    torch.testing.assert_close(module(X), Two(net, net)(X))


class Opposites(torch.nn.Module):
    """x * a + x * b, which is 0 for b = -a whatever a is; and x * a."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.ones(50))
        self.b = torch.nn.Parameter(-torch.ones(50))

    def forward(self, x):
        return x * self.a + x * self.b, x * self.a


def test_requests_on_all_cores_see_old_weights_or_new():
    with neuron_ext.multicore_context():
        module = loaded(saved_bytes(separated(Opposites(), torch.ones(50))))
    x = torch.ones(50)

    def call():
        for _ in range(300):
            zero, value = module(x)
            assert torch.equal(zero, torch.zeros(50))
            assert torch.equal(value, value[:1].expand(50))

    def replace():
        for i in range(300):
            a = torch.full((50,), float(i))
            neuron_ext.replace_weights(module, {"a": a, "b": -a})

    run_threads([call, call, call, replace])
    assert torch.equal(module(x)[1], torch.full((50,), 299.0))
    assert all(count > 0 for count in only_status(module).executions)


def test_weights_may_be_views_of_the_weights_that_are_replaced():
    module = separated(Opposites(), torch.ones(50))
    now = module.state_dict()
    neuron_ext.replace_weights(module, {"a": now["b"], "b": now["a"]})
    assert torch.equal(module.a, -torch.ones(50))
    assert torch.equal(module.b, torch.ones(50))
    strided = torch.arange(100.0)[::2]
    neuron_ext.replace_weights(module, {"a": strided, "b": strided})
    assert torch.equal(module(torch.ones(50))[1], strided)


def test_dynamic_batching_cuts_inputs_and_not_weights(pair):
    net, data = pair
    module = neuron_ext.dynamic_batch(loaded(data))
    for rows in (1, 2, 5, 8):
        x = torch.rand(rows, 4)
        torch.testing.assert_close(module(x), net(x))
    with pytest.raises(RuntimeError, match="input 'tensor'"):
        module(torch.rand(3, 5))


def test_a_tensor_put_in_the_place_of_a_weight_is_checked(pair):
    net, data = pair
    module = loaded(data)
    getattr(module.layers, "0").weight = torch.nn.Parameter(torch.zeros(4, 3), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"held tensor 'layers.0.weight'.* shape \[4, 3\]"):
        module(X)
    with pytest.raises(ValueError, match=r"held tensor 'layers.0.weight'"):
        neuron_ext.replace_weights(module, net)
    getattr(module.layers, "0").weight = torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    other = copy.deepcopy(net)
    torch.nn.init.zeros_(other.layers[0].weight)
    assert_runs(module, other)
    with pytest.raises(RuntimeError, match="input 'tensor'"):
        module(torch.zeros(3))


def test_weights_that_are_returned_are_the_callers_own():
    net = torch.nn.Linear(2, 2)
    module = separated(lambda x: (net(x), net.weight), torch.ones(1, 2))
    _, weight = module(torch.ones(1, 2))
    kept = weight.clone()
    neuron_ext.replace_weights(module, torch.nn.Linear(2, 2))
    assert torch.equal(weight, kept)
    assert not torch.equal(module(torch.ones(1, 2))[1], kept)


def documented():
    class Network(torch.nn.Module):
        def __init__(self, hidden_size=4, layers=3) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(
                *(torch.nn.Linear(hidden_size, hidden_size) for _ in range(layers))
            )

        def forward(self, tensor):
            return self.layers(tensor)

    network, network2 = Network(), Network()
    network.eval()
    network2.eval()
    inp = torch.rand(2, 4)
    trace = torch_neuronx.trace(network, inp, inline_weights_to_neff=False)
    return trace, network2, inp


def test_the_example_with_a_model():
    weight_separated_trace, network2, inp = documented()
    torch_neuronx.replace_weights(weight_separated_trace, network2.state_dict())
    torch.testing.assert_close(weight_separated_trace(inp), network2(inp))


def test_the_example_with_safetensors(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_model

    weight_separated_trace, network2, inp = documented()
    safetensor_path = f"{tmp_path}/network2.safetensors"
    save_model(network2, safetensor_path)
    tensors = {}
    with safe_open(safetensor_path, framework="pt") as f:
        for k in f.keys():  # noqa: SIM118
            tensors[k] = f.get_tensor(k)
    torch_neuronx.replace_weights(weight_separated_trace, tensors)
    torch.testing.assert_close(weight_separated_trace(inp), network2(inp))


def test_the_example_of_a_weight_separated_module(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 1, 3)

        def forward(self, x):
            return self.conv(x) + 1

    model = Model()
    model.eval()
    example_inputs = torch.rand(1, 1, 3, 3)
    trace = torch_neuronx.trace(model, example_inputs, inline_weights_to_neff=False)
    path = save(trace, tmp_path / "model.pt")
    loaded = torch.jit.load(str(path))
    torch_neuronx.move_trace_to_device(loaded, 0)
    x = torch.rand(1, 1, 3, 3)
    torch.testing.assert_close(loaded(x), model(x))


def test_no_warning_comes_from_a_replacement(pair):
    net, data = pair
    module = loaded(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        neuron_ext.replace_weights(module, net)
