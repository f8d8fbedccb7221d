"""State of buckets: buffers that they share, whole or in parts, and state of their own."""

import copy
import io
import itertools

import pytest
import torch
from bucket_state_helpers import (
    STEPS,
    Cache,
    Plain,
    given,
    initial,
    make_sum,
    shared_config,
    trace_cache,
)
from helpers import run_threads
from trace_helpers import assert_same, loaded, saved_bytes

import neuron_ext


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """Quicker than workers; `cached` uses them."""
    monkeypatch.setattr("neuron_ext.buckets.trace.usable_cpus", lambda: 1)


@pytest.fixture(scope="module", params=["torchscript", "inductor"])
def cached(request):
    """The file of the guide's kind of cache; traced natively it went through worker processes."""
    with pytest.MonkeyPatch.context() as patch:
        cpus = 1 if request.param == "torchscript" else 2
        patch.setattr("neuron_ext.buckets.trace.usable_cpus", lambda: cpus)
        buffers = initial()
        module = trace_cache(configuration=shared_config(buffers=buffers), compiler=request.param)
        data = saved_bytes(module)
    module(given(4))
    assert all(map(torch.equal, buffers, initial()))  # the module has copies
    return data


@pytest.fixture(scope="module")
def portable():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuron_ext.buckets.trace.usable_cpus", lambda: 1)
        return saved_bytes(trace_cache())


def assert_goes_on(module, plain, steps=STEPS, state=None):
    """Each call, and the state it leaves in ``state``, is that of plain PyTorch."""
    state = module if state is None else state
    for x in steps:
        assert_same(module(x), plain(x))
        assert torch.equal(state.state_0, plain.keys)
        assert torch.equal(state.state_1, plain.count)


def assert_initial(module):
    assert all(map(torch.equal, (module.state_0, module.state_1), initial()))


# ------------------------------------------------------------------------------- shared, in parts


def test_buckets_update_the_shared_buffers_through_the_preprocessors_views(cached):
    module = loaded(cached)
    assert list(module.state_dict()) == ["state_0", "state_1"]
    assert_initial(module)
    assert_goes_on(module, Plain())
    states = neuron_ext.status(module)
    assert [one.name for one in states] == ["Cache.bucket_0", "Cache.bucket_1"]
    assert [sum(one.executions) for one in states] == [4, 4]


def test_saved_with_the_module_and_copied_by_deepcopy(cached):
    module, plain = loaded(cached), Plain()
    assert_goes_on(module, plain, STEPS[:3])
    twin, again = copy.deepcopy(module), loaded(saved_bytes(module))
    for one in (module, twin, again):  # each goes on by itself
        assert_goes_on(one, copy.deepcopy(plain), STEPS[3:])


def test_reset_puts_the_initial_values_back(cached):
    module = loaded(cached)
    for step in (STEPS[0], STEPS[1]):  # also where only one bucket has run
        module(step)
        module = loaded(saved_bytes(module))
        neuron_ext.reset_state(module)
        assert_initial(module)
        assert_goes_on(module, Plain())


class Wrapper(torch.nn.Module):
    def __init__(self, cache):
        super().__init__()
        self.cache = cache

    def forward(self, x):
        self.cache(x)
        return self.cache(x)


@pytest.mark.parametrize("wrap", [torch.jit.script, lambda one: torch.jit.freeze(one.eval()), None])
def test_inside_of_other_modules(portable, wrap):
    if wrap is None:
        module = Wrapper(loaded(portable))
    else:
        module = wrap(torch.jit.script(Wrapper(loaded(portable)).eval()))
    for _ in range(2):
        plain = Plain()
        for x in STEPS:
            plain(x)
            assert_same(module(x), plain(x))
            assert torch.equal(module.cache.state_0, plain.keys)
        neuron_ext.reset_state(module)
        assert_initial(module.cache)
    neuron_ext.unload(module)  # PyTorch never frees what it froze


def test_inference_mode_makes_no_difference(portable):
    plain = Plain()
    with torch.inference_mode():
        module = loaded(portable)
        assert_goes_on(module, plain, STEPS[:2])
    assert_goes_on(module, plain, STEPS[2:4])
    with torch.inference_mode():
        assert_goes_on(module, plain, STEPS[4:])
        neuron_ext.reset_state(module)
    assert_goes_on(module, Plain())


def test_a_call_that_fails_leaves_the_state(portable):
    module, plain = loaded(portable), Plain()
    assert_goes_on(module, plain, STEPS[:2])
    with pytest.raises(RuntimeError, match="no bucket fits"):
        module(given(9))
    with pytest.raises(RuntimeError, match=r"input 'x'.* expected .*\[2, 4, 3\]"):
        module(given(4).double())
    assert_goes_on(module, plain, STEPS[2:])


def test_flags_unloading_and_moves_leave_the_state(portable):
    module, plain = loaded(portable), Plain()
    assert_goes_on(module, plain, STEPS[:3])
    neuron_ext.lazy_load(module)
    neuron_ext.unload(module)
    neuron_ext.set_multicore(module)
    assert_goes_on(module, plain, STEPS[3:])


def test_other_tensors_in_place_of_the_buffers(portable):
    module, plain = loaded(portable), Plain()
    module(STEPS[0])
    module.state_0, module.state_1 = initial()
    assert_goes_on(module, plain, STEPS[:3])
    module.state_1 = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"held tensor 'bucket_0.state_1'.*int64"):
        module(given(4))
    with pytest.raises(RuntimeError, match=r"held tensor 'state_1'.*int64"):
        module(given(8))
    assert torch.equal(module.state_0, plain.keys)


class Ticket(Cache):
    """Returns how often all buckets were called. In one the buffers come in another order."""

    def __init__(self, length):
        super().__init__(length)
        if length == 4:
            self.register_buffer("count", self._buffers.pop("count"))

    def forward(self, x):
        out, count, keys = super().forward(x)
        return (count + x.sum().long() * 0) * 1, count, keys, out["total"]


def make_ticket(length):
    model = Ticket(length).eval()
    return model, {model.keys: 2, model.count: 1}


def test_calls_run_one_after_another_in_all_buckets():
    with neuron_ext.multicore_context():
        module = loaded(saved_bytes(trace_cache(make_ticket)))

    def call(rows):
        return [module(given(rows))[0].item() for _ in range(100)]

    # Which model has which buffer first makes no difference: 8 threads, in turns of 2 buckets.
    seen = run_threads([lambda rows=rows: call(rows) for rows in (3, 7) * 4])
    assert sorted(itertools.chain(*seen)) == list(range(11, 811))
    assert all(one == sorted(one) for one in seen)
    assert module.state_1.item() == 810


def test_a_reset_falls_between_two_calls(portable):
    module = loaded(portable)
    module.state_0.zero_()  # as a reset does not leave it
    neuron_ext.reset_state(module)
    zeros = torch.zeros(2, 4, 3)

    def call():
        # Zeros are put into the cache, so what is left of its initial values says how many calls
        # there were since the reset, and so does the count.
        whole = initial()[0]
        for _ in range(200):
            total = module(zeros)["total"]
            left = [whole[:, 4 + n :].sum(1) + 10 + n for n in range(1, 5)]
            later = (total == total[0, 0]).all() and total[0, 0] > 14
            assert later or any(torch.equal(total, one) for one in left)

    def reset():
        for _ in range(200):
            neuron_ext.reset_state(module)

    run_threads([call, call, reset])
    neuron_ext.reset_state(module)
    assert_initial(module)


def test_what_is_refused_and_what_is_left_alone(portable):
    module, plain = loaded(portable), Plain()
    assert_goes_on(module, plain, STEPS[:1])
    with pytest.raises(ValueError, match=r"it has the state 'bucket_0.state_0'"):
        neuron_ext.dynamic_batch(module)
    with pytest.raises(ValueError, match="state"):
        neuron_ext.DataParallel(module)
    linear = torch.nn.Linear(3, 3)
    traced = neuron_ext.trace(
        linear, torch.ones(1, 3), inline_weights_to_neff=False, compiler="torchscript"
    )
    both = torch.nn.ModuleDict({"cache": module, "linear": traced})
    neuron_ext.replace_weights(
        both, {f"linear.{name}": one + 1 for name, one in linear.state_dict().items()}
    )
    assert torch.equal(traced.weight, linear.weight + 1)
    assert_goes_on(module, plain, STEPS[1:])


class Flat(torch.nn.Module):
    """A state of one dimension."""

    def __init__(self, length):
        super().__init__()
        self.register_buffer("seen", torch.zeros(length * 2))

    def forward(self, x):
        seen = self.seen + x.sum((0, 2)).repeat(2)
        return seen * 2, seen


def make_flat(length):
    model = Flat(length).eval()
    return model, {model.seen: 1}


def reshape(
    shapes: list[list[list[int]]], states: list[torch.Tensor], index: torch.Tensor
) -> list[torch.Tensor]:
    size = shapes[int(index.item())][0][0]
    return [states[0].view(-1)[:size]]


def test_buffers_that_no_bucket_takes_as_they_are():
    start = torch.arange(18.0).reshape(3, 6)
    module = trace_cache(make_flat, shared_config(lambda: torch.jit.script(reshape), [start]))
    module = loaded(saved_bytes(module))
    states = neuron_ext.status(module)
    assert [one.name for one in states] == ["Flat.bucket_0", "Flat.bucket_1", "Flat.state"]
    assert [one.state for one in states] == ["loaded", "loaded", "unloaded"]
    for _ in range(2):
        want = start.clone()
        for x in (given(3), given(8), given(4, 2)):
            length = 4 if x.size(1) <= 4 else 8
            padded = torch.nn.functional.pad(x, [0, 0, 0, length - x.size(1)])
            want.view(-1)[: 2 * length] += padded.sum((0, 2)).repeat(2)
            assert torch.equal(module(x), want.view(-1)[: 2 * length] * 2)
            assert torch.equal(module.state_0, want)
        module = copy.deepcopy(module)
        neuron_ext.reset_state(module)
        assert torch.equal(module.state_0, start)


# ---------------------------------------------------------------------------------- shared, whole


def test_without_a_preprocessor_each_bucket_takes_the_whole_buffers():
    start = torch.tensor([1.0, 2.0, 3.0])
    module = loaded(saved_bytes(trace_cache(make_sum, shared_config(None, [start]))))
    twin = copy.deepcopy(module)
    for one in (module, twin):
        want = start.clone()
        for x in STEPS:
            want += x.sum((0, 1)) * (4 if x.size(1) <= 4 else 8)
            assert torch.equal(one(x), want + 1)
            assert torch.equal(one.state_0, want)
        neuron_ext.reset_state(one)
        assert torch.equal(one.state_0, start)


@pytest.mark.parametrize("buffers", [[torch.zeros(3)] * 2, [torch.zeros(6)[::2], torch.ones(3)]])
def test_buffers_are_copies_apart_from_each_other(buffers):
    def make(length):
        model = torch.nn.Module()
        model.register_buffer("a", torch.zeros(3))
        model.register_buffer("b", torch.zeros(3))
        model.forward = lambda x: (model.a + 1, model.b + 2, x)
        return model, {model.a: 0, model.b: 1}

    want = [buffers[0] + 1, buffers[1] + 2]
    module = trace_cache(make, shared_config(None, buffers))
    assert torch.equal(module(given(4)), given(4))
    assert_same([module.state_0, module.state_1], want)


def test_native_code_of_buckets_with_state_shares_its_weights(cached):
    module = loaded(cached)
    tensors = [one.__getstate__()[0][5] for one in neuron_ext._subgraphs.find_subgraphs(module)]
    if "weights" in tensors[0]:
        assert len({one["weights"].data_ptr() for one in tensors}) == 1
    else:
        assert all("graph" in one for one in tensors)


def test_a_file_is_no_larger_for_the_parts():
    big = [torch.rand(2, 8, 30_000), torch.tensor([1])]
    stream = io.BytesIO()

    def make(length):
        model = Cache(length)
        model.keys = torch.zeros(2, length, 30_000)
        model.forward = lambda x: (x, model.keys + 1, model.count + 1)
        return model, {model.keys: 1, model.count: 2}

    torch.jit.save(trace_cache(make, shared_config(buffers=big)), stream)
    # The buffer once, and as initial values: whole and in part, since they are not all equal.
    assert len(stream.getvalue()) < big[0].nbytes * 2.6
