"""A model cut by ``PartitionerConfig``: what runs where, and whether it is what the model does."""

import collections
import typing

import pytest
import torch
from partition_helpers import OTHER, Model, Sorter, X, check, partition, parts, state
from trace_helpers import assert_same, saved_bytes, state_of

import neuron_ext
import neuron_ext as torch_neuronx
from neuron_ext import PartitionerConfig
from neuron_ext._subgraphs import find_subgraphs


@pytest.fixture(scope="module")
def sorter():
    return Sorter().eval()


# ------------------------------------------------------------------------------- the cut


def test_named_operators_run_on_the_cpu_between_subgraphs(sorter):
    before = {name: tensor.clone() for name, tensor in sorter.state_dict().items()}
    traced = partition(sorter, X)
    assert isinstance(traced, torch.jit.ScriptModule)
    assert not traced.training
    assert parts(traced) == ["neuron_0", "cpu_1", "neuron_2"]
    assert "sort" in str(traced.cpu_1.graph)
    assert [one.name for one in neuron_ext.status(traced)] == ["Sorter_neuron_0", "Sorter_neuron_2"]
    check(sorter, (X,), traced, [(OTHER,)])
    assert_same(dict(sorter.state_dict()), before)
    assert all(parameter.requires_grad for parameter in sorter.parameters())


def test_a_model_that_is_supported_whole_is_one_subgraph_as_without_a_configuration(sorter):
    traced = neuron_ext.trace(
        sorter, X, compiler="torchscript", partitioner_config=PartitionerConfig()
    )
    plain = neuron_ext.trace(sorter, X, compiler="torchscript")
    assert parts(traced) == parts(plain) == []
    assert state_of(traced)[2]["name"] == "Sorter"
    check(sorter, (X,), traced, [(OTHER,)])


def test_a_weight_stands_in_the_part_that_uses_it_and_nowhere_else():
    def body(model, x):
        return torch.sort(model.scaled(x))[0] + model.shift

    data = torch.randn(100, 100)
    model = Model(lambda m, x: torch.sort(m.big(x))[0] * 2).eval()
    model.big = torch.nn.Linear(100, 100)
    model.big.weight.data.copy_(data)
    traced = partition(model, data[:3])
    graphs = [len(state[5]["graph"]) for state in map(state, find_subgraphs(traced))]
    assert graphs[0] > 40000 > 20000 > graphs[1]
    assert len(saved_bytes(traced)) < 80000
    assert parts(partition(Model(body).eval(), X)) == ["neuron_0", "cpu_1", "neuron_2"]


def _mutated(model, x, y):
    x[0] = 5
    x[:, 1:3] += y[:, 1:3]
    values = torch.sort(x)[0]
    values.mul_(2)
    y.copy_(values)
    flat = x.view(-1)
    flat[3] = 7
    return x, y[0], flat, model.scaled(y)


def _nonzero(model, x):
    h = model.scaled(x)
    places = torch.nonzero(h > 0)
    many = places.shape[0]
    chosen = h[places[:, 0], places[:, 1]]
    return (
        *(places, chosen.sum(), torch.full((many + 3,), 2.0), h.reshape(-1)[:many]),
        *(torch.masked_select(h, h > 1), torch.unique(x), h[h > 0].cumsum(0)),
        h.reshape(-1)[:many].view(-1, 1).expand(many, 2),
        torch.arange(many * 2),
        torch.zeros(torch.sym_max(many, 3) // 2),
        torch.full((2,), many / 2),
    )


def _item(model, x):
    largest = x.max().item()
    return model.scaled(x) * largest + x[0, 0].item() ** 2, torch.zeros(2).fill_(largest)


Both = collections.namedtuple("Both", ["low", "high"])


BODIES = {
    "used twice": lambda m, x: (
        lambda h: (torch.sort(h)[0] + h, torch.sort(h, 0)[0] * h, h, [h, h])
    )(m.scaled(x)),
    "both results": lambda m, x: tuple(torch.sort(m.scaled(x), descending=True)),
    "outputs that are inputs": lambda m, x: (x, torch.sort(m.scaled(x))[0], {"x": x}),
    "constants": lambda m, x: (
        *(torch.ones(3), m.weight, m.shift[1:], torch.sort(m.scaled(x))[0]),
        *(torch.sort(m.weight)[0], torch.sort(torch.arange(3) * 2)[0]),
    ),
    "no tensors": lambda m, x: (torch.sort(m.scaled(x))[0], x.shape[0], None, "text"),
    "named tuple": lambda m, x: Both(torch.sort(m.scaled(x))[0], {"a": [x + 1]}),
    "views across": lambda m, x: (
        lambda h: (torch.sort(h.t())[0].t() + 1, torch.sort(h)[0].reshape(2, -1) * 2, h.view(-1))
    )(m.scaled(x)),
    "weights on the CPU": lambda m, x: torch.sort(m.scaled(x) * m.shift + m.weight[0])[0],
    "dtypes": lambda m, x: (
        torch.sort(m.scaled(x).half())[0],
        torch.sort(x.to(torch.int32))[0] * 3,
        torch.sort(x > 0)[0],
    ),
    "item": _item,
    "infinite": lambda m, x: torch.sort(m.scaled(x).masked_fill(x > 0, -float("inf")))[0].exp(),
    "in place on a temporary": lambda m, x: torch.sort(m.scaled(x).add_(1).relu_())[0].mul_(2),
    "other modes": lambda m, x: torch.sort(_with_modes(m, x))[0],
}


def _with_modes(model, x):
    with torch.enable_grad():
        h = model.scaled(x)
    with torch.autocast("cpu", torch.bfloat16):
        return torch.matmul(h, model.weight)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_cut_model_computes_what_the_model_does(body):
    model = Model(body).eval()
    traced = partition(model, X, {"aten::sort", "aten::add", "aten::masked_fill"})
    assert any(name.startswith("cpu_") for name in parts(traced))
    check(model, (X,), traced, [(OTHER,)])


def test_inputs_that_change_in_place_change():
    model = Model(_mutated).eval()
    traced = partition(model, (X.clone(), X + 1))
    assert parts(traced) == ["neuron_0", "cpu_1", "neuron_2"]
    check(model, (X, X + 1), traced, [(OTHER, X)])


def test_shapes_that_depend_on_data_are_those_of_the_data():
    model = Model(_nonzero).eval()
    traced = partition(model, X, (), model_support_percentage_threshold=0.1)
    assert {name.partition("_")[0] for name in parts(traced)} == {"neuron", "cpu"}
    check(model, (X,), traced, [(OTHER,), (torch.ones(3, 4),), (torch.zeros(3, 4),)])
    assert traced(torch.zeros(3, 4))[0].shape != traced(X)[0].shape


def test_what_a_caller_writes_into_an_output_stays_out_of_the_model():
    model = Model(BODIES["constants"]).eval()
    traced = partition(model, X)
    for output in traced(X):
        output.zero_()
    check(model, (X,), traced)


def test_gradients_stay_out():
    model = Model(lambda m, x: torch.sort(m.scaled(x))[0] * 2).eval()
    traced = partition(model, X)
    got = traced(X.clone().requires_grad_())
    assert not got.requires_grad


def test_input_and_output_structure():
    class Pair(typing.NamedTuple):
        low: torch.Tensor
        high: torch.Tensor

    def func(pair, named):
        ordered = torch.sort(pair[0] + named["y"] * 2)[0]
        return {"out": Pair(ordered, pair[1] * 3)}

    inputs = ((X, OTHER), {"y": X + 1})
    check(func, inputs, partition(func, inputs), [((OTHER, X), {"y": X})])


# ------------------------------------------------------------------------------- custom operators


def _add(x, n):
    x.add_(n)


@pytest.fixture(scope="module")
def custom():
    """``partition_test::twice``, and ``add_``, which changes its argument."""
    library = torch.library.Library("partition_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    torch.library.register_fake("partition_test::twice", torch.empty_like, lib=library)
    library.define("add_(Tensor(a!) x, int n) -> ()")
    library.impl("add_", _add, "CPU")
    torch.library.register_fake("partition_test::add_", lambda x, n: None, lib=library)
    yield torch.ops.partition_test
    library._destroy()


def test_custom_operators_that_change_their_arguments(custom):
    def body(model, x):
        h = model.scaled(x)
        g = h.relu()
        custom.add_(h[0:1], 3)
        return h.relu() * 2 + g, custom.twice(h), g

    model = Model(body).eval()
    traced = partition(model, X, {"partition_test::add_", "partition_test::twice"})
    assert parts(traced) == ["neuron_0", "cpu_1", "neuron_2"]
    check(model, (X,), traced, [(OTHER,)])


# ------------------------------------------------------------------------------- native code


@pytest.fixture(scope="module")
def native(custom):
    """A model whose ``twice`` native code cannot call, and its partition."""
    model = Model(lambda m, x: custom.twice(m.scaled(x) * m.scale).relu() + m.shift).eval()
    model.scale = torch.nn.Parameter(torch.tensor([[1.0], [2.0], [-1.0]]))
    config = PartitionerConfig()
    return model, neuron_ext.trace(model, X, compiler="inductor", partitioner_config=config)


def test_what_native_code_cannot_call_is_cut_out(native):
    model, traced = native
    assert parts(traced) == ["neuron_0", "cpu_1", "neuron_2"]
    formats = [state(one)[2]["format"] for one in find_subgraphs(traced)]
    assert formats == ["inductor", "inductor"]
    check(model, (X,), traced, [(OTHER,)])


def test_weights_keep_the_names_that_they_have_in_the_model(native):
    _model, traced = native
    first, second = map(state, find_subgraphs(traced))
    assert "scale" in first[4]["constant_fqns"]
    assert "scale" not in second[4]["constant_fqns"]
    assert not any("parts" in name for name in first[4]["constant_fqns"])


def test_what_was_taken_for_supported_is_cut_out_when_the_compiler_says_no(native):
    model, _traced = native
    config = PartitionerConfig(
        analyze_parameters={"additional_ignored_ops": {"partition_test::twice"}}
    )
    traced = neuron_ext.trace(model, X, compiler="inductor", partitioner_config=config)
    assert parts(traced) == ["neuron_0", "cpu_1", "neuron_2"]
    check(model, (X,), traced)


# ------------------------------------------------------------------------------- documentation


class MLP(torch.nn.Module):
    """Of the documentation, with smaller layers."""

    def __init__(self, input_size=28 * 28, output_size=10, layers=(16, 8)):
        super().__init__()
        self.fc1 = torch.nn.Linear(input_size, layers[0])
        self.fc2 = torch.nn.Linear(layers[0], layers[1])
        self.fc3 = torch.nn.Linear(layers[1], output_size)
        self.relu = torch.nn.ReLU()

    def forward(self, x):
        f1 = self.fc1(x)
        r1 = self.relu(f1)
        f2 = self.fc2(r1)
        r2 = self.relu(f2)
        f3 = self.fc3(r2)
        out = torch.log_softmax(f3, dim=1)
        sort_out, _ = torch.sort(out)
        return sort_out


@pytest.mark.parametrize("operators", [None, {"aten::sort"}], ids=["default", "sort"])
def test_the_example_of_the_documentation(operators, tmp_path):
    n = MLP()
    n.eval()
    inputs = torch.rand(32, 784)
    partitioner_config = torch_neuronx.PartitionerConfig(ops_to_partition=operators)
    neuron_net = torch_neuronx.trace(n, inputs, partitioner_config=partitioner_config)
    output = neuron_net(inputs)
    torch.testing.assert_close(output, n(inputs).detach())
    # Here sort is an operator like others: it is cut out where that is asked for.
    assert parts(neuron_net) == ([] if operators is None else ["neuron_0", "cpu_1"])
    torch.jit.save(neuron_net, str(tmp_path / "net.pt"))
    assert torch.equal(torch.jit.load(str(tmp_path / "net.pt"))(inputs), output)
