"""State that a traced module keeps between calls: ``input_output_aliases``."""

import copy
import itertools

import pytest
import torch
from helpers import only_status, run_threads
from trace_helpers import loaded, saved_bytes, state_of

import neuron_ext


class Cache(torch.nn.Module):
    """A key-value cache of four places, written in place as decoders do."""

    def __init__(self, shape=(4, 2)):
        super().__init__()
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)
        self.project = torch.nn.Linear(2, 2)

    def forward(self, x, place):
        self.keys[place] = self.project(x)
        self.count += 1
        return self.keys.sum(0), self.keys, self.count


STEPS = [(torch.full((1, 2), float(i)), torch.tensor([i % 4])) for i in range(6)]


def trace(func, example, aliases, compiler="torchscript", **options):
    return neuron_ext.trace(
        func, example, input_output_aliases=aliases, compiler=compiler, **options
    )


@pytest.fixture(scope="module", params=["torchscript", "inductor"])
def cached(request):
    """The model that was traced, and the bytes of its file."""
    net = Cache().eval()
    module = trace(net, STEPS[1], {net.keys: 1, net.count: 2}, request.param)
    assert torch.equal(net.keys, torch.zeros(4, 2))
    assert net.count == 0
    return net, saved_bytes(module)


def run_steps(module, steps=STEPS):
    return [module(*step) for step in steps]


def test_each_call_sees_what_the_one_before_left(cached):
    net, data = cached
    module, reference = loaded(data), copy.deepcopy(net)
    assert set(module.state_dict()) == {"keys", "count"}
    for step in STEPS:
        want, keys, count = reference(*step)
        torch.testing.assert_close(module(*step), want)  # one output is left: no tuple
        torch.testing.assert_close(module.keys, keys)
        assert torch.equal(module.count, count)


def test_saved_with_the_module_and_copied_by_deepcopy(cached):
    net, data = cached
    module, reference = loaded(data), copy.deepcopy(net)
    want = [out[0] for out in run_steps(reference)]
    run_steps(module, STEPS[:3])
    twin = copy.deepcopy(module)
    again = loaded(saved_bytes(module))
    for one in (module, twin, again):  # each goes on by itself
        torch.testing.assert_close(run_steps(one, STEPS[3:]), want[3:])
        assert one.count == 6


def test_reset_puts_the_initial_values_back(cached):
    _, data = cached
    module = loaded(data)
    first = run_steps(module)
    module = loaded(saved_bytes(module))
    neuron_ext.reset_state(module)
    assert torch.equal(module.keys, torch.zeros(4, 2))
    assert torch.equal(module.count, torch.tensor(0))
    assert all(map(torch.equal, run_steps(module), first))


def test_initial_values_that_are_all_equal_take_one_element():
    start = torch.arange(1000.0)
    ones = torch.ones(1000, dtype=torch.float64)
    module = trace(
        lambda a, b, x: (a + x, b + x.double(), x),
        (start, ones, torch.ones(1000)),
        {start: 0, ones: 1},
    )
    assert state_of(module)[5]["state_initial"].numel() == 4000 + 8
    module(torch.ones(1000))
    start.zero_()  # the example was copied
    module = loaded(saved_bytes(module))
    assert torch.equal(module.a, torch.arange(1000.0) + 1)
    neuron_ext.reset_state(module)
    assert torch.equal(module.a, torch.arange(1000.0))
    assert torch.equal(module.b, torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("compiler", ["torchscript", "inductor"])
def test_an_example_input_that_is_a_state_is_no_argument_any_more(compiler):
    total = torch.full((2,), 10.0)

    def func(total, x):
        total = total + x
        return {"twice": total * 2, "total": total}

    module = trace(func, (total, torch.ones(2)), {total: 1}, compiler)
    assert [argument.name for argument in module.forward.schema.arguments] == ["self", "x"]
    for i in (1, 2):
        got = module(torch.ones(2))
        assert got.keys() == {"twice"}
        assert torch.equal(got["twice"], torch.full((2,), 20.0 + 2 * i))
        assert torch.equal(module.total, torch.full((2,), 10.0 + i))
    assert torch.equal(total, torch.full((2,), 10.0))


def test_states_inside_of_containers():
    past = [torch.zeros(2), torch.ones(2)]
    example = {"x": torch.ones(2), "past": past, "only": (torch.zeros(3),)}

    def func(batch):
        new = [one + batch["x"] for one in batch["past"]]
        only = batch["only"][0] + 1
        return batch["x"] * 2, new, (only, {"only": only + 1})

    example["past"], example["only"] = tuple(past), example["only"]
    module = trace(
        lambda x, past, only: func({"x": x, "past": past, "only": only}),
        (example["x"], example["past"], example["only"]),
        {past[0]: 1, example["only"][0]: 3},
    )
    names = [argument.name for argument in module.forward.schema.arguments]
    assert names == ["self", "x", "past"]
    assert set(module.state_dict()) == {"past_0", "only_0"}
    x, rest, tail = module(torch.ones(2), (torch.full((2,), 5.0),))
    assert torch.equal(x, torch.full((2,), 2.0))
    assert [one.tolist() for one in rest] == [[6.0, 6.0]]
    assert list(tail[0]) == ["only"]
    assert tail[0]["only"].tolist() == [2.0] * 3
    assert module.past_0.tolist() == [1.0, 1.0]
    assert module.only_0.tolist() == [1.0] * 3


def test_nothing_is_returned_where_all_outputs_are_state():
    count = torch.zeros(1)
    module = loaded(saved_bytes(trace(lambda c: c + 1, count, {count: 0})))
    assert module() is None
    assert module() is None
    assert module.c.item() == 2


def test_an_output_that_is_state_and_result():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(2))

        def forward(self, x):
            total = self.total + x
            return total, total, total[:1]

    net = Net()
    module = trace(net, torch.ones(2), {net.total: 0})
    first = module(torch.ones(2))
    second = module(torch.ones(2))
    assert [one.tolist() for one in first] == [[1.0, 1.0], [1.0]]  # not changed by the second call
    assert [one.tolist() for one in second] == [[2.0, 2.0], [2.0]]
    assert module.total.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("compiler", ["torchscript", "inductor"])
def test_states_that_change_places(compiler):
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    module = trace(lambda a, b, x: (b, a, x + a), (a, b, torch.zeros(1)), {a: 0, b: 1}, compiler)
    assert [module(torch.zeros(1)).item() for _ in range(4)] == [1.0, 2.0, 1.0, 2.0]
    assert (module.a.item(), module.b.item()) == (1.0, 2.0)


@pytest.mark.parametrize("compiler", ["torchscript", "inductor"])
def test_a_buffer_may_be_put_in_place_of_the_old_one(compiler):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(2))

        def forward(self, x):
            self.total = self.total + x
            return self.total * 10, self.total

    net = Net()
    before = net.total
    module = trace(net, torch.ones(2), {net.total: 1}, compiler)
    assert net.total is before
    assert [module(torch.ones(2))[0].item() for _ in range(3)] == [10.0, 20.0, 30.0]


def test_a_failed_call_leaves_the_state():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(3))

        def forward(self, place):
            self.total += 1
            return torch.arange(3.0)[place], self.total

    net = Net()
    module = trace(net, torch.tensor([0]), {net.total: 1})
    module(torch.tensor([2]))
    with pytest.raises(RuntimeError, match=r"out of (range|bounds)"):
        module(torch.tensor([7]))
    with pytest.raises(RuntimeError, match="input 'place'"):
        module(torch.tensor([1, 2]))
    assert module.total.tolist() == [1.0] * 3
    module(torch.tensor([1]))
    assert module.total.tolist() == [2.0] * 3


def counter():
    """Returns how often it was called before, plus x."""
    count = torch.zeros(1)
    return trace(lambda c, x: (c + 1, c + x), (count, torch.zeros(1)), {count: 0})


def test_calls_of_many_threads_run_one_after_another_on_all_replicas():
    with neuron_ext.multicore_context():
        module = loaded(saved_bytes(counter()))

    def call():
        return [module(torch.ones(1)).item() for _ in range(100)]

    seen = run_threads([call] * 8)
    assert sorted(itertools.chain(*seen)) == [float(i) for i in range(1, 801)]
    assert all(one == sorted(one) for one in seen)
    assert module.c.item() == 800
    assert all(count > 0 for count in only_status(module).executions)


def test_inference_mode_makes_no_difference():
    data = saved_bytes(counter())
    with torch.inference_mode():
        module = loaded(data)
        assert module(torch.zeros(1)).item() == 0
    assert module(torch.zeros(1)).item() == 1
    neuron_ext.reset_state(module)
    assert module(torch.zeros(1)).item() == 0


def test_a_reset_falls_between_two_calls():
    state = torch.zeros(500)
    module = trace(lambda s, x: (s + x, s * 1), (state, torch.ones(500)), {state: 0})

    def call():
        for _ in range(200):
            got = module(torch.ones(500))
            assert torch.equal(got, got[:1].expand(500))

    def reset():
        for _ in range(200):
            neuron_ext.reset_state(module)

    run_threads([call, call, reset])
    neuron_ext.reset_state(module)
    assert torch.equal(module.s, state)


def test_state_beside_separated_weights():
    net, other = Cache(), Cache()
    aliases = {net.keys: 1, net.count: 2}
    module = trace(net, STEPS[1], aliases, inline_weights_to_neff=False)
    assert set(module.state_dict()) == {"keys", "count", "project.weight", "project.bias"}
    run_steps(module, STEPS[:2])
    neuron_ext.replace_weights(module, other)  # its state dict has the state, which stays
    run_steps(net, STEPS[:2])
    other.keys.copy_(net.keys)
    torch.testing.assert_close(module.keys, net.keys)
    for step in STEPS[2:]:
        torch.testing.assert_close(module(*step), other(*step)[0])
    with pytest.raises(ValueError, match=r"missing: project\.weight"):
        neuron_ext.replace_weights(module, {"project.bias": other.project.bias})


def test_state_alone_is_no_separated_weight():
    module = trace(lambda c: c + 1, (count := torch.zeros(1)), {count: 0})
    with pytest.warns(UserWarning, match="no separated weights"):
        neuron_ext.replace_weights(module, {"c": torch.ones(1)})
    assert module.c.item() == 0


def test_dynamic_batching_refuses_state():
    state = torch.zeros(2)
    module = trace(lambda s, x: (s + x, x * 2), (state, torch.ones(2)), {state: 0})
    with pytest.raises(ValueError, match="it has the state 's'"):
        neuron_ext.dynamic_batch(module)
    assert not only_status(module).dynamic_batch


class Twice(torch.nn.Module):
    """Calls that look alike, and one whose result nobody wants."""

    def __init__(self, counter):
        super().__init__()
        self.counter = counter

    def forward(self, x):
        self.counter(x)
        return self.counter(x), self.counter(x)


@pytest.mark.parametrize("freeze", [False, True])
def test_graphs_leave_no_call_out(freeze):
    module = torch.jit.script(Twice(counter()).eval())
    module = torch.jit.freeze(module) if freeze else module
    got = [[one.item() for one in module(torch.zeros(1))] for _ in range(4)]
    assert got == [[1.0, 2.0], [4.0, 5.0], [7.0, 8.0], [10.0, 11.0]]
    neuron_ext.reset_state(module)
    assert [one.item() for one in module(torch.zeros(1))] == [1.0, 2.0]
    neuron_ext.unload(module)  # PyTorch never frees what it froze


def test_a_module_without_state_is_left_alone(small_net):
    neuron_ext.reset_state(small_net)
    neuron_ext.reset_state(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="got int"):
        neuron_ext.reset_state(3)


def test_a_tensor_put_in_the_place_of_the_state_is_checked():
    module = trace(lambda c: (c + 1, c * 2), (count := torch.zeros(2)), {count: 0})
    module.c = torch.zeros(3)
    for call in (module, lambda: neuron_ext.reset_state(module)):
        with pytest.raises((RuntimeError, ValueError), match=r"held tensor 'c'.* shape \[3\]"):
            call()
    module.c = torch.full((2,), 4.0)
    assert module().tolist() == [8.0, 8.0]


S = torch.zeros(2)
X = torch.ones(2)


@pytest.mark.parametrize(
    ("aliases", "why"),
    [
        ({S: 2}, r"state 's' the output 2; .* returns 2 tensor\(s\)"),
        ({S: -1}, r"state 's' the output -1"),
        ({S: 1}, r"state 's', a float32 tensor of shape \[2\], the output 1, .* shape \[1\]"),
        ({S: True}, "the value True of type bool"),
        ({S: "0"}, "the value '0' of type str"),
        ({"s": 0}, "the key 's' of type str"),
        ({torch.zeros(2): 0}, r"shape \[2\] is neither a parameter or buffer of function nor"),
        ({S: 0, X: 0}, "gives output 0 to two states"),
        ([S], "must be a dict from state tensors to output indices"),
    ],
    ids=str,
)
def test_aliases_that_mean_nothing(aliases, why):
    with pytest.raises(ValueError, match=why):
        trace(lambda s, x: (s + x, x[:1] * 2), (S, X), aliases)


def test_other_dtypes_and_shared_outputs_are_refused():
    with pytest.raises(ValueError, match="a float64 tensor"):
        trace(lambda s, x: (s.double(), x), (S, X), {S: 0})
    with pytest.raises(ValueError, match="'s' and 'x' outputs that are one tensor"):
        trace(lambda s, x: [s + x] * 2, (S, X), {S: 0, X: 1})


def test_a_tensor_that_is_two_things_is_refused():
    with pytest.raises(ValueError, match="one tensor is 's' and the example input 'x'; pass a cl"):
        trace(lambda s, x: (s + x, x), (S, S), {S: 0})
    net = Cache()
    with pytest.raises(ValueError, match="one tensor is 'keys' and the example input 'x'"):
        trace(net, (net.keys, STEPS[0][1]), {net.keys: 1})


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="'subgraph' cannot be held"):
        trace(lambda subgraph, x: (subgraph + x, x), (S, X), {S: 0})


def test_a_changed_buffer_that_is_no_state_is_still_refused():
    net = Cache()
    with pytest.raises(ValueError, match="changes its buffer 'count'"):
        trace(net, STEPS[1], {net.keys: 1})
