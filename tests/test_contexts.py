"""neuron_cores_context and multicore_context: what they place, and what they leave alone."""

import asyncio
import io

import pytest
import torch
from helpers import (
    EXAMPLE,
    executed_by,
    expected,
    flagged,
    only_status,
    run_threads,
    save,
    trace_small_net,
)

import neuron_ext
from neuron_ext import multicore_context, neuron_cores_context

pytestmark = pytest.mark.usefixtures("idle_cores")


@pytest.fixture
def load(torchscript_file):
    return lambda: torch.jit.load(str(torchscript_file))


@pytest.fixture
def load_lazy(small_net):
    """Loads a file of a module with the lazy flag."""
    buffer = io.BytesIO()
    save_to(buffer, flagged(small_net, lazy=True))
    neuron_ext.unload(small_net)
    return lambda: torch.jit.load(io.BytesIO(buffer.getvalue()))


@pytest.fixture
def load_pinned(small_net):
    """Loads a file that was saved with core 3."""
    neuron_ext.set_neuron_cores(small_net, start_nc=3)
    buffer = io.BytesIO()
    save_to(buffer, small_net)
    neuron_ext.unload(small_net)
    return lambda: torch.jit.load(io.BytesIO(buffer.getvalue()))


def save_to(buffer, module):
    torch.jit.save(module, buffer)


def cores(module):
    return only_status(module).cores


def run(module):
    assert torch.equal(module(EXAMPLE), expected())


class TestLoadsInside:
    def test_go_where_the_context_says_and_later_ones_do_not(self, load):
        with neuron_cores_context(start_nc=2, nc_count=2):
            inside = load()
        outside = load()
        assert (cores(inside), cores(outside)) == ([2, 3], [0])
        assert [executed_by(inside, lambda: run(inside)) for _ in range(3)] == [2, 3, 2]

    def test_without_arguments_take_one_least_used_core_each(self, load):
        with neuron_cores_context():
            first, second = load(), load()
        assert (cores(first), cores(second)) == ([0], [1])

    def test_multicore_takes_all_cores(self, load):
        with multicore_context():
            module = load()
        assert cores(module) == [0, 1, 2, 3]

    def test_several_models_in_one_context_all_go_there(self, load):
        with neuron_cores_context(1):
            modules = [load(), load()]
        assert [cores(module) for module in modules] == [[1], [1]]

    def test_the_innermost_context_counts(self, load):
        with neuron_cores_context(0):
            outer = load()
            with multicore_context():
                inner = load()
                with neuron_cores_context(2):
                    innermost = load()
                inner_again = load()
            outer_again = load()
        assert [cores(m) for m in (outer, inner, innermost)] == [[0], [0, 1, 2, 3], [2]]
        assert [cores(m) for m in (inner_again, outer_again)] == [[0, 1, 2, 3], [0]]

    def test_an_exception_restores_the_outer_context(self, load):
        with neuron_cores_context(1):
            with pytest.raises(KeyError), neuron_cores_context(2):
                raise KeyError
            with pytest.raises(KeyError), multicore_context():
                raise KeyError
            module = load()
        assert cores(module) == [1]
        assert cores(load()) == [0]


class TestPrecedence:
    def test_a_file_goes_where_it_was_saved_to_go(self, load_pinned):
        assert cores(load_pinned()) == [3]

    def test_a_context_wins_over_the_file(self, load_pinned):
        with neuron_cores_context(1):
            assert cores(load_pinned()) == [1]

    def test_an_automatic_context_wins_over_the_file_too(self, load_pinned):
        with neuron_cores_context():
            assert cores(load_pinned()) == [0]

    def test_a_move_wins_over_the_context_of_the_load(self, load):
        with neuron_cores_context(1):
            module = load()
        neuron_ext.set_neuron_cores(module, start_nc=2)
        neuron_ext.unload(module)
        run(module)
        assert cores(module) == [2]


class TestLazyModules:
    def test_load_where_the_context_said_that_is_long_closed(self, load_lazy):
        with neuron_cores_context(2, 2):
            module = load_lazy()
        assert (only_status(module).state, cores(module)) == ("unloaded", [])
        with neuron_cores_context(0):
            run(module)
        assert cores(module) == [2, 3]

    def test_wait_loads_them_there_too(self, load_lazy):
        with neuron_cores_context(3):
            module = load_lazy()
        neuron_ext.wait(module)
        assert cores(module) == [3]

    def test_another_thread_may_be_the_first_to_use_them(self, load_lazy):
        with neuron_cores_context(3):
            module = load_lazy()

        def use_in_another_context():
            with neuron_cores_context(1):
                run(module)

        run_threads([use_in_another_context])
        assert cores(module) == [3]

    def test_go_there_again_after_an_unload(self, load):
        with neuron_cores_context(2):
            module = load()
        neuron_ext.unload(module)
        run(module)
        assert cores(module) == [2]

    def test_status_tells_where_they_will_go(self, load_lazy):
        with neuron_cores_context(1, 2):
            status = only_status(load_lazy())
        assert (status.start_nc, status.nc_count) == (1, 2)


class TestWhatContextsLeaveAlone:
    def test_models_already_loaded(self, load):
        module = load()
        with neuron_cores_context(2):
            assert [executed_by(module, lambda: run(module)) for _ in range(2)] == [0, 0]
            assert cores(module) == [0]
        assert cores(module) == [0]

    def test_models_loaded_outside_that_load_again_inside(self, load):
        module = load()
        neuron_ext.unload(module)
        with neuron_cores_context(2):
            run(module)
        assert cores(module) == [0]

    def test_what_is_saved_of_a_module_loaded_inside(self, load, tmp_path, fork_server):
        with neuron_cores_context(2):
            module = load()
            path = save(module, tmp_path / "m.pt")
        again = "result = neuron_ext.status(torch.jit.load(args[0]))[0].cores"
        assert cores(module) == [2]
        assert fork_server.run(again, str(path), env={"NEURON_EXT_HOST_CORES": 4}) == [0]

    def test_a_placement_saved_inside_another_context(self, small_net, tmp_path, fork_server):
        neuron_ext.set_neuron_cores(small_net, 1, 2)
        with neuron_cores_context(3):
            path = save(small_net, tmp_path / "m.pt")
        again = "result = neuron_ext.status(torch.jit.load(args[0]))[0].cores"
        assert fork_server.run(again, str(path), env={"NEURON_EXT_HOST_CORES": 4}) == [1, 2]


class TestTracesInside:
    def test_are_first_placed_where_the_context_says_at_their_first_use(self):
        with neuron_cores_context(2):
            module = trace_small_net()
        assert (only_status(module).state, cores(module)) == ("unloaded", [])
        run(module)
        assert cores(module) == [2]

    def test_are_not_saved_with_the_context(self, tmp_path):
        with neuron_cores_context(2):
            path = save(trace_small_net(), tmp_path / "m.pt")
        assert cores(torch.jit.load(str(path))) == [0]


class TestThreads:
    def test_sixteen_threads_in_different_contexts_never_mix(self, torchscript_file):
        data = torchscript_file.read_bytes()
        placements = [(start, n) for start in range(4) for n in (1, 2, 3, 4) if start + n <= 4]
        placements += [(-1, 4), None, (0, 1), (1, 2), (2, 2), (3, 1)]
        assert len(placements) == 16

        def load():
            return torch.jit.load(io.BytesIO(data))

        def worker(placement):
            def body():
                for _ in range(20):
                    if placement is None:
                        assert len(cores(load())) == 1
                        continue
                    start, n = placement
                    with neuron_cores_context(start, n):
                        module = load()
                        with neuron_cores_context((start + 1) % 4, 1):
                            inner = load()
                        module_again = load()
                    wanted = list(range(max(start, 0), max(start, 0) + n))
                    assert cores(module) == cores(module_again) == wanted
                    assert cores(inner) == [(start + 1) % 4]
                    # Which of them is free when is up to the other threads.
                    assert executed_by(module, lambda m=module: run(m)) in wanted

            return body

        run_threads([worker(placement) for placement in placements], timeout=120)
        assert [core.models for core in neuron_ext.core_stats()] == [0, 0, 0, 0]

    def test_another_thread_never_sees_a_context(self, load):
        with neuron_cores_context(3):
            (module,) = run_threads([load])
        assert cores(module) == [0]

    def test_leaving_on_another_thread_is_an_error_that_says_so(self, load):
        context = neuron_cores_context(3)
        run_threads([context.__enter__])
        with pytest.raises(ValueError, match="leave a context on the thread that entered it"):
            context.__exit__(None, None, None)
        assert cores(load()) == [0]


class TestForms:
    def test_as_decorators_they_hold_during_each_call(self, load):
        @neuron_cores_context(start_nc=1, nc_count=2)
        def load_replicated():
            """Loads."""
            return load()

        @multicore_context()
        def load_everywhere():
            return load()

        assert load_replicated.__doc__ == "Loads."
        assert cores(load()) == [0]
        assert [cores(load_replicated()) for _ in range(2)] == [[1, 2], [1, 2]]
        assert cores(load_everywhere()) == [0, 1, 2, 3]
        assert cores(load()) == [0]

    def test_a_decorator_checks_at_each_call_not_when_made(self):
        decorated = neuron_cores_context(start_nc=99)(lambda: None)
        for _ in range(2):
            with pytest.raises(ValueError, match="start_nc=99"):
                decorated()

    def test_a_decorated_function_that_raises_leaves_no_context(self, load):
        @neuron_cores_context(3)
        def fail():
            raise KeyError

        for _ in range(2):
            with pytest.raises(KeyError):
                fail()
        assert cores(load()) == [0]

    def test_generators_that_hold_contexts_close_them_in_any_order(self, load):
        def hold(core):
            with neuron_cores_context(core):
                yield
                yield

        first, second = hold(1), hold(2)
        next(first)
        next(second)
        assert cores(load()) == [2]
        first.close()
        assert cores(load()) == [2]
        second.close()
        assert cores(load()) == [0]

    def test_the_later_generator_may_close_first(self, load):
        def hold(core):
            with neuron_cores_context(core):
                yield

        first, second = hold(1), hold(2)
        next(first)
        next(second)
        second.close()
        assert cores(load()) == [1]
        first.close()
        assert cores(load()) == [0]

    def test_coroutines_that_interleave_leave_no_context_behind(self, load):
        async def hold(core):
            with neuron_cores_context(core):
                await asyncio.sleep(0)

        async def both():
            await asyncio.gather(hold(1), hold(2))

        asyncio.run(both())
        assert cores(load()) == [0]

    def test_a_context_object_is_entered_once(self, load):
        context = neuron_cores_context(2)
        with context:
            assert cores(load()) == [2]
        assert cores(load()) == [0]
