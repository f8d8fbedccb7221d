"""One module for several shapes: what it computes, what it refuses, and where it can go."""

import copy
import re
import typing

import pytest
import torch
from bucket_helpers import (
    BUCKETS,
    config,
    examples,
    inputs,
    seeded_pooled,
    subgraphs,
    trace_buckets,
)
from helpers import run_threads, save
from trace_helpers import assert_same, loaded, saved_bytes

import neuron_ext


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """Quicker than workers, which have tests of their own."""
    torch.manual_seed(11)
    monkeypatch.setattr("neuron_ext.buckets.trace.usable_cpus", lambda: 1)


@pytest.fixture(scope="module")
def pooled_file(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(11)
        patch.setattr("neuron_ext.buckets.trace.usable_cpus", lambda: 1)
        return save(trace_buckets(), tmp_path_factory.mktemp("models") / "buckets.pt")


@pytest.fixture
def pooled(pooled_file):
    return torch.jit.load(str(pooled_file))


def assert_works(module):
    """For every number of rows that fits, and equal to the plain model without any padding."""
    model = seeded_pooled()
    for rows in range(1, BUCKETS[-1] + 1):
        assert_same(module(*inputs(rows)), model(*inputs(rows)))


def executions(module):
    return [sum(one.executions) for one in neuron_ext.status(module)]


# ------------------------------------------------------------------------------------- computing


def test_each_input_runs_in_its_bucket():
    module = trace_buckets()
    assert_works(module)
    assert executions(module) == [4, 4]
    assert not module.training


def test_arguments_have_the_names_that_trace_gives_them(pooled):
    x, mask = inputs(3)
    assert_same(pooled(mask=mask, x=x), seeded_pooled()(x, mask))
    traced = neuron_ext.trace(seeded_pooled(), inputs(4), compiler="torchscript")

    def described(module):
        _, *arguments = module.forward.schema.arguments
        return [(one.name, str(one.type)) for one in arguments]

    assert described(pooled) == described(traced) == [("x", "Tensor"), ("mask", "Tensor")]


def test_subgraphs_are_named_after_model_and_bucket(pooled):
    assert [one.name for one in neuron_ext.status(pooled)] == ["Pooled.bucket_0", "Pooled.bucket_1"]


def test_func_is_called_once_per_bucket_with_its_arguments():
    calls = []

    def func(factor, shift=0):
        calls.append((factor, shift))
        return lambda x: x * factor + shift, {}

    def traced(kwargs):
        calls.clear()
        given = [torch.zeros(2, 4), torch.zeros(2, 8)]
        module = trace_buckets(func, given, config(func_kwargs=kwargs))
        return [module(torch.ones(2, rows))[0, 0].item() for rows in (3, 6)]

    assert traced([{"factor": 2}, {"factor": 3, "shift": 1}]) == [2, 4]
    assert calls == [(2, 0), (3, 1)]
    assert traced({"factor": 5}) == [5, 5]
    assert calls == [(5, 0), (5, 0)]


def test_the_caller_s_random_numbers_are_left_alone():
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    module = trace_buckets()
    assert torch.equal(torch.rand(4), wanted)
    torch.manual_seed(3)
    assert_works(module)


def test_one_bucket():
    module = trace_buckets(given=examples()[:1])
    assert_same(module(*inputs(3)), seeded_pooled()(*inputs(3)))


def test_threads(pooled):
    model = seeded_pooled()

    def calls(rows):
        for _ in range(50):
            assert_same(pooled(*inputs(rows)), model(*inputs(rows)))

    run_threads([lambda rows=rows: calls(rows) for rows in range(1, BUCKETS[-1] + 1)])


def test_a_kernel_that_is_a_module():
    class Kernel(torch.nn.Module):
        def forward(self, tensors: list[torch.Tensor]):
            return [tensors[0].reshape(-1)], torch.tensor(int(tensors[0].numel() > 2))

    module = neuron_ext.bucket_model_trace(
        lambda: (lambda x: x + 1, {}),
        [torch.zeros(2), torch.zeros(3)],
        neuron_ext.BucketModelConfig(lambda: torch.jit.script(Kernel())),
        compiler="torchscript",
    )
    module = loaded(saved_bytes(module))
    assert_same(module(torch.ones(1, 2)), torch.full((2,), 2.0))
    assert_same(module(torch.ones(3, 1)), torch.full((3,), 2.0))


# ------------------------------------------------------------------------------------- structure


class Pair(typing.NamedTuple):
    x: torch.Tensor
    rows: int


def choose_by_first(tensors: list[torch.Tensor]):
    return tensors, torch.tensor([0 if tensors[0].size(0) == 2 else 1])


def by_first(**options):
    return neuron_ext.BucketModelConfig(lambda: torch.jit.script(choose_by_first), **options)


def test_containers_in_and_out():
    def model(pair, rest):
        y = pair[0] + rest["a"]
        return {"p": [Pair(y, 7), Pair(y * 2, 8)]}, (y, pair[1][0])

    def arguments(rows):
        x = torch.arange(rows * 2.0).reshape(rows, 2)
        return (x, [x + 1]), {"a": x + 2}

    module = trace_buckets(lambda: (model, {}), [arguments(2), arguments(3)], by_first())
    for rows in (2, 3):
        assert_same(module(*arguments(rows)), model(*arguments(rows)))
    x = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=r"input pair\[1\]: expected a list of 1 element"):
        module((x, [x, x]), {"a": x})


def test_values_in_the_output_may_differ_between_buckets():
    def func(rows):
        def model(x):
            y = x + 1
            return (y, y if rows == 2 else x * 2, rows)

        return model, {}

    kwargs = [{"rows": 2}, {"rows": 3}]
    module = trace_buckets(func, [torch.ones(2), torch.ones(3)], by_first(func_kwargs=kwargs))
    for rows in (2, 3):
        x = torch.full((rows,), 5.0)
        assert_same(module(x), func(rows)[0](x))


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        (lambda x: (x, x), "(Tensor, Tensor)"),
        (lambda x: [x, x, x], "[Tensor, Tensor, Tensor]"),
        (lambda x: {"a": x}, "{'a': Tensor}"),
        (lambda x: Pair(x, 3), "Pair(x=Tensor, rows=int)"),
        (lambda x: (x, None), "(Tensor, None)"),
    ],
)
def test_outputs_of_several_structures_are_refused(other, shown):
    models = [lambda x: [x, x], other]
    given = [torch.ones(2), torch.ones(3)]
    kwargs = [{"i": 0}, {"i": 1}]
    text = re.escape(
        f"the model of bucket 1 returns {shown}, and that of bucket 0 returns [Tensor, Tensor]"
    )
    with pytest.raises(ValueError, match=text):
        trace_buckets(lambda i: (models[i], {}), given, by_first(func_kwargs=kwargs))


def test_arguments_of_several_names_are_refused():
    models = [lambda x: x, lambda y: y]
    with pytest.raises(
        ValueError, match=r"the model of bucket 1 takes \(y\), and that of bucket 0 takes \(x\)"
    ):
        trace_buckets(
            lambda i: (models[i], {}),
            [torch.ones(2), torch.ones(3)],
            by_first(func_kwargs=[{"i": 0}, {"i": 1}]),
        )


# ------------------------------------------------------------------------------------- no bucket


@pytest.mark.parametrize("route", ["traced", "loaded", "frozen"])
def test_an_input_that_fits_no_bucket(pooled, route):
    module = trace_buckets() if route == "traced" else pooled
    if route == "frozen":
        module = torch.jit.freeze(module)
    text = re.escape(
        "no bucket fits the inputs x [2, 9, 3], mask [2, 9]: the bucket kernel returned no "
        "tensors. The buckets take 0: x [2, 4, 3], mask [2, 4]; 1: x [2, 8, 3], mask [2, 8]"
    )
    with pytest.raises(RuntimeError, match=text):
        module(*inputs(9))
    assert_works(module)


def returns_what_x_says(tensors: list[torch.Tensor]):
    """Index x[0], and x[1] tensors."""
    numbers: list[float] = tensors[0].tolist()
    index = torch.tensor([int(numbers[0])])
    if numbers[2] == 1:
        index = torch.tensor([0, 0])
    if numbers[2] == 2:
        index = torch.tensor([0.0])
    return [tensors[0]] * int(numbers[1]), index


@pytest.mark.parametrize(
    ("x", "found"),
    [
        ((1, 1, 0), None),
        ((2, 1, 0), "1 tensor(s) and index 2; expected 1 tensor(s) and an index from 0 to 1."),
        ((-1, 1, 0), "1 tensor(s) and index -1; expected 1 tensor(s) and an index from 0 to 1."),
        ((0, 2, 0), "2 tensor(s) and index 0; expected 1 tensor(s) and an index from 0 to 1."),
        ((1, 0, 0), "no tensors."),
        ((0, 1, 1), "a tensor of shape [2] as index, not one whole number."),
        ((0, 1, 2), "a tensor of shape [1] as index, not one whole number."),
    ],
)
def test_what_a_kernel_returns_is_checked(x, found):
    module = neuron_ext.bucket_model_trace(
        lambda: (lambda x: x + 1, {}),
        [torch.zeros(3), torch.zeros(3)],
        neuron_ext.BucketModelConfig(lambda: torch.jit.script(returns_what_x_says)),
        compiler="torchscript",
    )
    x = torch.tensor(x, dtype=torch.float32)
    if found is None:
        assert torch.equal(module(x), x + 1)
        return
    text = (
        f"no bucket fits the inputs x [3]: the bucket kernel returned {found} "
        "The buckets take 0: x [3]; 1: x [3]"
    )
    with pytest.raises(RuntimeError, match=re.escape(text)):
        module(x)


def test_a_kernel_that_returns_other_shapes(pooled):
    x, mask = inputs(3)
    with pytest.raises(RuntimeError, match=r"Pooled.bucket_0.*x.*\[2, 4, 3\].*\[2, 4, 4\]"):
        pooled(torch.zeros(2, 3, 4), mask)
    with pytest.raises(RuntimeError, match=r"float32.*float64"):
        pooled(x.double(), mask)


# ------------------------------------------------------------------------------------- elsewhere


class Around(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, mask: torch.Tensor):
        return self.inner(x, mask)


ROUTES = {
    "saved": lambda module: loaded(saved_bytes(module)),
    "saved twice": lambda module: loaded(saved_bytes(loaded(saved_bytes(module)))),
    "copied": copy.deepcopy,
    "frozen": lambda module: torch.jit.freeze(module),
    "frozen and saved": lambda module: loaded(saved_bytes(torch.jit.freeze(module))),
    "nested": lambda module: Around(module).eval(),
    "scripted": lambda module: loaded(saved_bytes(torch.jit.script(Around(module).eval()))),
}


@pytest.mark.parametrize("route", ROUTES)
def test_all_buckets_come_along(pooled, route):
    module = ROUTES[route](pooled)
    assert len(subgraphs(module)) == len(BUCKETS)
    assert_works(module)


@pytest.mark.usefixtures("idle_cores")
def test_placement_reaches_all_buckets(pooled_file, pooled):
    neuron_ext.unload(pooled)
    with neuron_ext.neuron_cores_context(start_nc=1, nc_count=2):
        module = torch.jit.load(str(pooled_file))
    assert [one.cores for one in neuron_ext.status(module)] == [[1, 2], [1, 2]]
    neuron_ext.set_neuron_cores(module, 3, 1)
    assert [one.cores for one in neuron_ext.status(module)] == [[3], [3]]
    assert_works(module)
    assert executions(module) == [4, 4]
    again = loaded(saved_bytes(module))
    assert [one.cores for one in neuron_ext.status(again)] == [[3], [3]]


@pytest.mark.parametrize("route", ["saved", "nested", "frozen"])
def test_flags_reach_all_buckets(pooled, route):
    neuron_ext.lazy_load(pooled)
    neuron_ext.async_load(pooled)
    module = ROUTES[route](loaded(saved_bytes(pooled)))
    states = neuron_ext.status(module)
    assert [(one.lazy_load, one.async_load) for one in states] == [(True, True)] * 2
    module(*inputs(6))
    assert executions(module) == [0, 1]
    neuron_ext.wait(module)
    assert [one.state for one in neuron_ext.status(module)] == ["loaded"] * 2
    neuron_ext.unload(module)
    assert [one.state for one in neuron_ext.status(module)] == ["unloaded"] * 2
    assert_works(module)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_dynamic_batches(pooled, batch):
    neuron_ext.dynamic_batch(pooled)
    for rows in (3, 8):
        assert_same(pooled(*inputs(rows, batch)), seeded_pooled()(*inputs(rows, batch)))


def test_a_context_around_the_trace_places_it():
    with neuron_ext.neuron_cores_context(start_nc=2):
        module = trace_buckets()
    assert_works(module)
    assert [one.cores for one in neuron_ext.status(module)] == [[2], [2]]


class Both(torch.nn.Module):
    def __init__(self, one, other):
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x):
        return self.one(x), self.other(x)


def kernel_of_one_name(flipped):
    if flipped:

        def kernel(tensors: list[torch.Tensor]):
            return tensors, torch.tensor([1])
    else:

        def kernel(tensors: list[torch.Tensor]):
            return tensors, torch.tensor([0])

    return neuron_ext.BucketModelConfig(
        lambda: torch.jit.script(kernel), func_kwargs=[{"add": 10}, {"add": 20}]
    )


def test_modules_whose_kernels_have_one_name():
    def func(add):
        return lambda x: x + add, {}

    modules = [
        neuron_ext.bucket_model_trace(func, [torch.zeros(2)] * 2, one, compiler="torchscript")
        for one in map(kernel_of_one_name, (False, True))
    ]
    x = torch.zeros(2)
    both = loaded(saved_bytes(torch.jit.script(Both(*modules).eval())))
    assert [one.tolist() for one in both(x)] == [[10, 10], [20, 20]]
