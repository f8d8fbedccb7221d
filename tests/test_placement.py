"""set_neuron_cores, set_multicore, and the choice of cores for loads that name none."""

import numpy as np
import pytest
import torch
from helpers import (
    EXAMPLE,
    CoreCounter,
    Pair,
    executed_by,
    expected,
    only_status,
    run_threads,
    save,
    trace_small_net,
)

import neuron_ext

pytestmark = pytest.mark.usefixtures("idle_cores")


@pytest.fixture
def load(torchscript_file):
    return lambda: torch.jit.load(str(torchscript_file))


def models_on_cores():
    return [core.models for core in neuron_ext.core_stats()]


def sequence(module, times):
    """The cores of ``times`` calls, one after another, each with the right answer."""

    def call():
        assert torch.equal(module(EXAMPLE), expected())

    return [executed_by(module, call) for _ in range(times)]


class TestAutomaticChoice:
    def test_successive_loads_go_round_all_cores_and_wrap(self, load):
        modules = [load() for _ in range(9)]
        cores = [only_status(module).cores for module in modules]
        assert cores == [[0], [1], [2], [3], [0], [1], [2], [3], [0]]

    def test_a_freed_core_is_the_least_used(self, load):
        modules = [load() for _ in range(4)]
        del modules[2]
        assert models_on_cores() == [1, 1, 0, 1]
        assert only_status(load()).cores == [2]

    def test_an_unloaded_module_leaves_its_core_to_others(self, load):
        first, second = load(), load()
        neuron_ext.unload(first)
        third = load()
        assert [only_status(m).cores for m in (first, second, third)] == [[], [1], [0]]
        first(EXAMPLE)
        assert only_status(first).cores == [2]

    @pytest.mark.parametrize(
        ("taken", "count", "window"),
        [
            ([], 2, [0, 1]),
            ([0], 2, [1, 2]),
            ([1], 2, [2, 3]),
            ([0, 2], 2, [0, 1]),
            ([0, 0, 2, 3], 2, [1, 2]),
            ([0, 1, 1], 3, [1, 2, 3]),
            ([0, 0, 0, 1, 2, 3], 3, [1, 2, 3]),
            ([3], 3, [0, 1, 2]),
            ([1, 2], 4, [0, 1, 2, 3]),
            ([0, 1, 3], 1, [2]),
        ],
    )
    def test_a_window_is_the_least_loaded_run_of_cores_lowest_first(
        self, load, taken, count, window
    ):
        keepers = []
        for core in taken:
            with neuron_ext.neuron_cores_context(core):
                keepers.append(load())
        with neuron_ext.neuron_cores_context(nc_count=count):
            module = load()
        assert only_status(module).cores == window
        assert [only_status(keeper).cores for keeper in keepers] == [[core] for core in taken]

    def test_sixteen_loads_at_once_share_the_cores_evenly(self, load):
        modules = run_threads([load] * 16)
        assert models_on_cores() == [4, 4, 4, 4]
        assert sorted(only_status(module).cores[0] for module in modules) == sorted(
            [0, 1, 2, 3] * 4
        )


class TestExplicitPlacement:
    @pytest.mark.parametrize("start", range(4))
    def test_one_core(self, load, start):
        module = load()
        neuron_ext.set_neuron_cores(module, start_nc=start)
        assert sequence(module, 3) == [start] * 3
        status = only_status(module)
        assert (status.start_nc, status.nc_count) == (start, -1)
        assert models_on_cores() == [int(core == start) for core in range(4)]

    @pytest.mark.parametrize(
        ("start", "count", "cores"),
        [
            (0, 2, [0, 1, 0, 1, 0]),
            (1, 3, [1, 2, 3, 1, 2]),
            (2, 2, [2, 3, 2, 3, 2]),
            (0, 4, [0, 1, 2, 3, 0]),
            (3, 1, [3, 3, 3, 3, 3]),
        ],
    )
    def test_replicas_take_turns_from_the_start(self, load, start, count, cores):
        module = load()
        neuron_ext.set_neuron_cores(module, start, count)
        counter = CoreCounter()
        assert counter.cores_of(lambda: module(EXAMPLE), 5) == cores
        assert only_status(module).executions == [cores.count(core) for core in cores[:count]]

    def test_replicas_on_the_least_used_window(self, load):
        keeper = load()
        module = load()
        neuron_ext.set_neuron_cores(module, nc_count=2)
        assert only_status(keeper).cores == [0]
        assert sequence(module, 3) == [2, 3, 2]

    def test_turns_begin_at_the_start_after_each_move(self, load):
        module = load()
        for _ in range(2):
            neuron_ext.set_neuron_cores(module, 1, 3)
            assert sequence(module, 2) == [1, 2]
        neuron_ext.set_multicore(module)
        assert sequence(module, 5) == [0, 1, 2, 3, 0]

    def test_executions_count_from_the_last_move(self, load):
        module = load()
        sequence(module, 3)
        assert only_status(module).executions == [3]
        neuron_ext.set_neuron_cores(module, 2, 2)
        assert only_status(module).executions == [0, 0]

    def test_moving_frees_the_old_cores(self, load):
        module = load()
        neuron_ext.set_multicore(module)
        assert models_on_cores() == [1, 1, 1, 1]
        neuron_ext.set_neuron_cores(module, start_nc=1)
        assert models_on_cores() == [0, 1, 0, 0]

    @pytest.mark.parametrize(
        "one", [np.int64(1), True, torch.tensor(1)], ids=["numpy", "bool", "tensor"]
    )
    def test_whole_numbers_of_any_type_are_fine(self, load, one):
        module = load()
        neuron_ext.set_neuron_cores(module, one, one)
        assert only_status(module).cores == [1]

    def test_a_fresh_trace_loads_where_it_is_moved_to(self):
        module = trace_small_net()
        assert models_on_cores() == [0, 0, 0, 0]
        neuron_ext.set_neuron_cores(module, start_nc=3)
        assert models_on_cores() == [0, 0, 0, 1]
        assert sequence(module, 1) == [3]

    def test_both_names_are_the_same_functions(self):
        for name in neuron_ext.experimental.__all__:
            assert getattr(neuron_ext.experimental, name) is getattr(neuron_ext, name)
        assert sorted(neuron_ext.experimental.__all__) == [
            "multicore_context",
            "neuron_cores_context",
            "set_multicore",
            "set_neuron_cores",
        ]


def enter(start_nc, nc_count):
    with neuron_ext.neuron_cores_context(start_nc, nc_count):
        pass


BAD_PLACEMENTS = [
    (-1, 0, "nc_count=0", "use 1 to 4, or -1"),
    (-1, -2, "nc_count=-2", "use 1 to 4, or -1"),
    (-1, 5, "nc_count=5", "use at most 4"),
    (-1, 99, "nc_count=99", "NEURON_EXT_HOST_CORES"),
    (0, 99, "nc_count=99", "use at most 4"),
    (-2, -1, "start_nc=-2", "use 0 to 3, or -1"),
    (4, -1, "start_nc=4", "use 0 to 3, or -1"),
    (99, 1, "start_nc=99", "use 0 to 3, or -1"),
    (3, 2, "start_nc=3 with nc_count=2", "use start_nc <= 2 or a smaller nc_count"),
    (1, 4, "start_nc=1 with nc_count=4", "use start_nc <= 0 or a smaller nc_count"),
    (2**32, 1, "start_nc=4294967296", "use 0 to 3, or -1"),
    (0, 2**32 + 1, "nc_count=4294967297", "use at most 4"),
    (-(2**63), -1, "start_nc=-9223372036854775808", "use 0 to 3, or -1"),
    (0, 2**70, f"nc_count={2**70}", "use"),
]


class TestBadPlacements:
    @pytest.mark.parametrize(("start", "count", "value", "remedy"), BAD_PLACEMENTS)
    def test_a_move_says_value_cores_and_remedy_and_changes_nothing(
        self, load, start, count, value, remedy
    ):
        module = load()
        neuron_ext.set_neuron_cores(module, 1, 2)
        before = only_status(module)
        with pytest.raises(ValueError, match="this process sees 4 cores") as caught:
            neuron_ext.set_neuron_cores(module, start, count)
        for part in (value, "(0-3)", remedy):
            assert part in str(caught.value)
        assert only_status(module) == before
        assert sequence(module, 3) == [1, 2, 1]
        assert models_on_cores() == [0, 1, 1, 0]

    @pytest.mark.parametrize(("start", "count", "value", "remedy"), BAD_PLACEMENTS)
    def test_a_context_says_the_same_on_entry(self, start, count, value, remedy):
        with pytest.raises(ValueError, match="this process sees 4 cores") as caught:
            enter(start, count)
        for part in (value, "(0-3)", remedy):
            assert part in str(caught.value)

    @pytest.mark.parametrize("value", [1.0, "1", None, [1], float("nan")])
    @pytest.mark.parametrize("name", ["start_nc", "nc_count"])
    def test_what_is_no_whole_number_is_named(self, load, name, value):
        module = load()
        for call in (
            lambda: neuron_ext.neuron_cores_context(**{name: value}).__enter__(),
            lambda: neuron_ext.set_neuron_cores(module, **{name: value}),
        ):
            with pytest.raises(ValueError, match="not a whole number") as caught:
                call()
            assert f"{name}={value!r}" in str(caught.value)
        assert only_status(module).cores == [0]

    def test_a_bad_context_leaves_no_context_behind(self, load):
        with pytest.raises(ValueError, match="nc_count=0"):
            enter(3, 0)
        assert only_status(load()).cores == [0]


class TestMovesAreTransactions:
    """A load that fails: native code on a machine that forbids it from now on."""

    def test_a_failed_move_leaves_the_module_running_where_it_was(self, native_net, monkeypatch):
        neuron_ext.set_neuron_cores(native_net, 1, 2)
        monkeypatch.setenv("NEURON_EXT_NATIVE_CODE", "deny")
        with pytest.raises(RuntimeError, match="NEURON_EXT_NATIVE_CODE=deny") as caught:
            neuron_ext.set_neuron_cores(native_net, 3)
        assert "it still runs on cores 1, 2" in str(caught.value)
        assert "start_nc=3, nc_count=-1" in str(caught.value)
        status = only_status(native_net)
        assert (status.state, status.cores) == ("loaded", [1, 2])
        assert (status.start_nc, status.nc_count) == (1, 2)
        assert sequence(native_net, 3) == [1, 2, 1]
        assert models_on_cores() == [0, 1, 1, 0]

    def test_status_tells_of_a_failed_move_until_one_succeeds(self, native_net, monkeypatch):
        monkeypatch.setenv("NEURON_EXT_NATIVE_CODE", "deny")
        with pytest.raises(RuntimeError, match="deny"):
            neuron_ext.set_neuron_cores(native_net, 3)
        assert "NEURON_EXT_NATIVE_CODE=deny" in only_status(native_net).error
        monkeypatch.setenv("NEURON_EXT_NATIVE_CODE", "allow")
        neuron_ext.set_neuron_cores(native_net, 3)
        assert only_status(native_net).error == ""
        assert sequence(native_net, 2) == [3, 3]

    def test_all_subgraphs_of_a_module_move_or_none(self, load, native_net, monkeypatch):
        pair = torch.jit.script(Pair(load(), native_net))
        neuron_ext.set_neuron_cores(pair, start_nc=2)
        monkeypatch.setenv("NEURON_EXT_NATIVE_CODE", "deny")
        with pytest.raises(RuntimeError, match="deny"):
            neuron_ext.set_neuron_cores(pair, start_nc=0, nc_count=2)
        assert [status.cores for status in neuron_ext.status(pair)] == [[2], [2]]
        assert torch.equal(pair(EXAMPLE), 2 * expected())
        monkeypatch.delenv("NEURON_EXT_NATIVE_CODE")
        neuron_ext.set_neuron_cores(pair, start_nc=0, nc_count=2)
        assert [status.cores for status in neuron_ext.status(pair)] == [[0, 1], [0, 1]]


class TestModulesWithoutSubgraphs:
    @pytest.mark.parametrize(
        "make", [torch.nn.Identity, lambda: torch.jit.script(torch.nn.Identity())]
    )
    def test_everything_leaves_them_alone(self, make):
        module = make()
        neuron_ext.set_neuron_cores(module, start_nc=2, nc_count=1)
        neuron_ext.set_multicore(module)
        neuron_ext.lazy_load(module)
        neuron_ext.async_load(module)
        neuron_ext.wait(module)
        neuron_ext.unload(module)
        assert neuron_ext.status(module) == []
        assert torch.equal(module(EXAMPLE), EXAMPLE)

    def test_they_take_no_core_and_read_no_setting(self, fork_server):
        code = """
            module = torch.nn.Identity()
            neuron_ext.set_neuron_cores(module, start_nc=2)
            neuron_ext.set_multicore(module)
            neuron_ext.wait(module)
            result = neuron_ext.status(module)
        """
        assert fork_server.run(code, env={"NEURON_RT_VISIBLE_CORES": "junk"}) == []

    @pytest.mark.parametrize("thing", [None, 3, "model.pt", torch.ones(1), len])
    def test_what_is_no_module_is_refused_by_name(self, thing):
        for function in (neuron_ext.set_neuron_cores, neuron_ext.set_multicore, neuron_ext.status):
            with pytest.raises(ValueError, match=f"got {type(thing).__name__}"):
                function(thing)


def test_a_window_that_no_longer_fits_is_refused_with_the_remedy(tmp_path, fork_server):
    module = trace_small_net()
    neuron_ext.set_neuron_cores(module, start_nc=3)
    path = save(module, tmp_path / "on_core_3.pt")
    load = "neuron_ext.visible_core_count(); torch.jit.load(args[0])"
    code = f"""
        try:
            {load}
        except (ValueError, RuntimeError) as error:
            result = str(error)
    """
    text = fork_server.run(code, str(path), env={"NEURON_EXT_HOST_CORES": 2})
    assert "start_nc=3 is not a visible core: this process sees 2 cores (0-1)" in text
    code = """
        with neuron_ext.neuron_cores_context(start_nc=1):
            result = neuron_ext.status(torch.jit.load(args[0]))[0].cores
    """
    assert fork_server.run(code, str(path), env={"NEURON_EXT_HOST_CORES": 2}) == [1]
