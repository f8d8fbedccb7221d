"""Lazy and asynchronous loading, loads that fail, wait and unload."""

import copy
import io

import pytest
import torch
from helpers import (
    EXAMPLE,
    Pair,
    bytes_of,
    damaged,
    expected,
    flagged,
    flip_byte,
    only_status,
    rebuild,
    save,
    trace_small_net,
)

import neuron_ext

pytestmark = pytest.mark.usefixtures("idle_cores")


def reloaded(module):
    """What ``torch.jit.load`` makes of ``module`` saved."""
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def state(module):
    return only_status(module).state


def models_on_cores():
    return [core.models for core in neuron_ext.core_stats()]


def flags(module):
    status = only_status(module)
    return status.lazy_load, status.async_load


def answers(module):
    return torch.equal(module(EXAMPLE), expected())


class TestWhenModulesLoad:
    def test_by_default_when_load_returns(self):
        module = reloaded(trace_small_net())
        assert state(module) == "loaded"
        assert models_on_cores() == [1, 0, 0, 0]

    def test_a_fresh_trace_at_its_first_forward(self):
        module = trace_small_net()
        assert (state(module), models_on_cores()) == ("unloaded", [0, 0, 0, 0])
        assert answers(module)
        assert (state(module), models_on_cores()) == ("loaded", [1, 0, 0, 0])

    @pytest.mark.parametrize("asynchronous", [False, True])
    @pytest.mark.parametrize(
        "use",
        [
            lambda module: module(EXAMPLE),
            neuron_ext.wait,
            lambda module: neuron_ext.set_neuron_cores(module, 0),
            lambda module: neuron_ext.set_neuron_cores(module, 0, 1),
        ],
        ids=["forward", "wait", "set_neuron_cores", "set_neuron_cores with count"],
    )
    def test_lazy_modules_at_their_first_use(self, use, asynchronous):
        module = reloaded(flagged(trace_small_net(), lazy=True, asynchronous=asynchronous))
        assert flags(module) == (True, asynchronous)
        assert (state(module), models_on_cores()) == ("unloaded", [0, 0, 0, 0])
        neuron_ext.status(module)
        assert models_on_cores() == [0, 0, 0, 0]
        use(module)
        neuron_ext.wait(module)
        assert (state(module), models_on_cores()) == ("loaded", [1, 0, 0, 0])
        assert answers(module)

    def test_set_multicore_loads_a_lazy_module_everywhere_at_once(self):
        module = reloaded(flagged(trace_small_net(), lazy=True))
        neuron_ext.set_multicore(module)
        assert (state(module), models_on_cores()) == ("loaded", [1, 1, 1, 1])

    def test_async_modules_without_any_use(self):
        module = reloaded(flagged(trace_small_net(), asynchronous=True))
        assert state(module) in ("loading", "loaded")
        neuron_ext.wait(module)
        assert (state(module), models_on_cores()) == ("loaded", [1, 0, 0, 0])
        assert only_status(module).executions == [0]
        assert answers(module)

    def test_forward_of_an_async_module_waits_for_its_load(self):
        modules = [reloaded(flagged(trace_small_net(), asynchronous=True)) for _ in range(8)]
        assert all(answers(module) for module in modules)
        assert models_on_cores() == [2, 2, 2, 2]

    def test_a_deep_copy_loads_as_its_flags_say(self):
        lazy = copy.deepcopy(flagged(trace_small_net(), lazy=True))
        eager = copy.deepcopy(trace_small_net())
        assert (state(lazy), state(eager)) == ("unloaded", "loaded")


class TestFlags:
    def test_are_off_unless_set(self):
        assert flags(reloaded(trace_small_net())) == (False, False)

    def test_set_before_saving_count_after_loading(self):
        module = trace_small_net()
        assert neuron_ext.lazy_load(module) is None
        assert neuron_ext.async_load(module) is None
        assert flags(module) == flags(reloaded(module)) == (True, True)

    def test_can_be_taken_back(self):
        module = flagged(trace_small_net(), lazy=True, asynchronous=True)
        neuron_ext.lazy_load(module, False)
        neuron_ext.async_load(module, enable_async_load=False)
        assert flags(reloaded(module)) == (False, False)

    def test_change_nothing_about_a_loaded_module(self):
        module = reloaded(trace_small_net())
        neuron_ext.lazy_load(module, enable_lazy_load=True)
        assert (state(module), models_on_cores()) == ("loaded", [1, 0, 0, 0])

    def test_lazy_and_async_do_not_touch_each_other(self):
        module = trace_small_net()
        neuron_ext.lazy_load(module)
        assert flags(module) == (True, False)
        neuron_ext.async_load(module)
        neuron_ext.lazy_load(module, False)
        assert flags(module) == (False, True)


DAMAGE = "the portable graph of subgraph 'SmallNet' is damaged"


class TestLoadsThatFail:
    def test_in_load_raise_there(self, tmp_path):
        path = save(damaged(trace_small_net(), "graph"), tmp_path / "m.pt")
        with pytest.raises(RuntimeError, match=DAMAGE):
            torch.jit.load(str(path))
        assert models_on_cores() == [0, 0, 0, 0]

    def test_of_a_lazy_module_raise_at_forward_and_leave_it_failed_not_stuck(self):
        module = reloaded(flagged(damaged(trace_small_net(), "graph"), lazy=True))
        for _ in range(3):
            with pytest.raises(RuntimeError, match=DAMAGE):
                module(EXAMPLE)
            assert state(module) == "failed"
            assert DAMAGE in only_status(module).error
        assert (only_status(module).cores, models_on_cores()) == ([], [0, 0, 0, 0])

    @pytest.mark.parametrize(
        "use", [lambda module: module(EXAMPLE), neuron_ext.wait], ids=["forward", "wait"]
    )
    def test_in_the_background_raise_at_the_next(self, use):
        module = reloaded(flagged(damaged(trace_small_net(), "graph"), asynchronous=True))
        with pytest.raises(RuntimeError, match=DAMAGE):
            use(module)
        assert state(module) == "failed"
        assert models_on_cores() == [0, 0, 0, 0]

    def test_after_a_lazy_trigger_raise_too(self):
        module = reloaded(
            flagged(damaged(trace_small_net(), "graph"), lazy=True, asynchronous=True)
        )
        assert state(module) == "unloaded"
        neuron_ext.set_neuron_cores(module, 2)
        with pytest.raises(RuntimeError, match=DAMAGE):
            module(EXAMPLE)
        assert state(module) == "failed"

    def test_wait_tells_of_it_each_time_until_something_is_tried(self):
        module = reloaded(flagged(damaged(trace_small_net(), "graph"), asynchronous=True))
        for _ in range(2):
            with pytest.raises(RuntimeError, match=DAMAGE):
                neuron_ext.wait(module)

    @pytest.mark.parametrize(
        ("retry", "cores"),
        [
            (lambda module: module(EXAMPLE), [0]),
            (lambda module: neuron_ext.set_neuron_cores(module, 2, 2), [2, 3]),
        ],
        ids=["forward", "set_neuron_cores"],
    )
    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_are_tried_again(self, retry, cores, asynchronous):
        module = reloaded(flagged(trace_small_net(), lazy=True, asynchronous=asynchronous))
        graph = bytes_of(module, "graph")
        flip_byte(graph)
        with pytest.raises(RuntimeError, match=DAMAGE):
            neuron_ext.wait(module)
        assert state(module) == "failed"
        flip_byte(graph)
        retry(module)
        neuron_ext.wait(module)
        assert (state(module), only_status(module).error) == ("loaded", "")
        assert only_status(module).cores == cores
        assert answers(module)

    def test_of_one_subgraph_do_not_hold_up_the_others(self):
        good = flagged(trace_small_net(), lazy=True, asynchronous=True)
        bad = flagged(damaged(trace_small_net(), "graph"), lazy=True, asynchronous=True)
        pair = torch.jit.script(Pair(good, bad))
        with pytest.raises(RuntimeError, match=DAMAGE):
            neuron_ext.wait(pair)
        assert [status.state for status in neuron_ext.status(pair)] == ["loaded", "failed"]

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_for_native_code_with_a_wrong_digest(self, native_net, asynchronous):
        module = flagged(damaged(native_net, "code"), lazy=True, asynchronous=asynchronous)
        module = reloaded(module)
        for use in (neuron_ext.wait, lambda module: module(EXAMPLE)):
            with pytest.raises(
                RuntimeError, match="the native code of subgraph 'SmallNet' is damag"
            ):
                use(module)
            assert state(module) == "failed"

    def test_for_cpu_features_that_are_not_here_name_them_and_the_remedy(self, native_net):
        module = rebuild(native_net, string_lists={"cpu_features": ["avx2", "flux_capacitor"]})
        module = reloaded(flagged(module, asynchronous=True))
        with pytest.raises(RuntimeError) as caught:
            neuron_ext.wait(module)
        for part in ("lacks (flux_capacitor)", "needs avx2, flux_capacitor", "trace it again"):
            assert part in str(caught.value)
        assert state(module) == "failed"


class TestWaitAndUnload:
    def test_wait_on_a_loaded_module_returns_at_once(self):
        module = reloaded(trace_small_net())
        assert neuron_ext.wait(module, timeout=0) is None
        assert neuron_ext.wait(module) is None

    @pytest.mark.parametrize("timeout", [-1, -0.001, float("nan"), float("-inf")])
    def test_a_timeout_that_is_no_time_is_refused_by_value(self, timeout):
        with pytest.raises(ValueError, match=f"timeout={timeout}"):
            neuron_ext.wait(trace_small_net(), timeout=timeout)

    @pytest.mark.parametrize("timeout", [60, 1e300, float("inf")])
    def test_any_time_is_fine_however_long(self, timeout):
        module = trace_small_net()
        neuron_ext.wait(module, timeout)
        assert state(module) == "loaded"

    def test_unload_frees_all_cores_and_the_next_use_loads_again(self):
        module = reloaded(trace_small_net())
        neuron_ext.set_neuron_cores(module, 1, 3)
        assert neuron_ext.unload(module) is None
        status = only_status(module)
        assert (status.state, status.cores, status.executions) == ("unloaded", [], [])
        assert models_on_cores() == [0, 0, 0, 0]
        assert answers(module)
        assert models_on_cores() == [0, 1, 1, 1]

    def test_unload_twice_and_unload_of_what_never_was_loaded_do_nothing(self):
        module = trace_small_net()
        neuron_ext.unload(module)
        neuron_ext.unload(module)
        assert (state(module), models_on_cores()) == ("unloaded", [0, 0, 0, 0])

    def test_unload_of_a_failed_module_clears_the_failure(self):
        module = damaged(trace_small_net(), "graph")
        with pytest.raises(RuntimeError, match=DAMAGE):
            module(EXAMPLE)
        neuron_ext.unload(module)
        assert (state(module), only_status(module).error) == ("unloaded", "")
