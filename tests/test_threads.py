"""Many threads on one module: right answers for each, while it runs, moves and unloads."""

import contextlib
import io
import threading

import pytest
import torch
from helpers import (
    EXAMPLE,
    CoreCounter,
    Gate,
    Pair,
    eventually,
    expected,
    gated_net,
    input_number,
    only_status,
    run_threads,
    trace_small_net,
)

import neuron_ext

pytestmark = pytest.mark.usefixtures("idle_cores")

CALLS = 150


def caller(module, number, calls=CALLS):
    """A thread's work: its own inputs, its own answers, each known beforehand."""
    inputs = [input_number(number * calls + i) for i in range(calls)]
    answers = [expected(x) for x in inputs]

    def body():
        for x, answer in zip(inputs, answers, strict=True):
            assert torch.equal(module(x), answer)

    return body


class TestSixteenThreads:
    def test_on_four_replicas_get_their_own_answers_and_all_count(self, small_net):
        neuron_ext.set_multicore(small_net)
        counter = CoreCounter()
        run_threads([caller(small_net, i) for i in range(16)])
        executions = only_status(small_net).executions
        assert sum(executions) == 16 * CALLS
        assert counter.since() == executions
        assert all(count > 0 for count in executions)

    def test_on_native_code_too(self, native_net):
        neuron_ext.set_multicore(native_net)
        run_threads([caller(native_net, i) for i in range(16)])
        assert sum(only_status(native_net).executions) == 16 * CALLS

    def test_on_one_core_take_turns(self, small_net):
        neuron_ext.set_neuron_cores(small_net, start_nc=2)
        run_threads([caller(small_net, i) for i in range(16)])
        assert only_status(small_net).executions == [16 * CALLS]

    def test_on_a_lazy_module_load_it_once(self):
        module = trace_small_net()
        run_threads([caller(module, i, calls=5) for i in range(16)])
        assert only_status(module).executions == [16 * 5]
        assert sum(core.models for core in neuron_ext.core_stats()) == 1

    def test_on_models_of_their_own_do_not_disturb_each_other(self, torchscript_file):
        data = torchscript_file.read_bytes()

        def body(number):
            def load_and_run():
                module = torch.jit.load(io.BytesIO(data))
                caller(module, number, calls=50)()
                return only_status(module).executions

            return load_and_run

        assert run_threads([body(i) for i in range(16)]) == [[50]] * 16


def keep_changing(module, change, stop):
    def body():
        count = 0
        while not stop.is_set():
            change(module, count)
            count += 1
        return count

    return body


def move(module, i):
    start, count = [(0, 1), (2, 2), (0, 4), (-1, 3), (3, 1), (1, -1)][i % 6]
    neuron_ext.set_neuron_cores(module, start, count)


def anything(module, i):
    [
        lambda: neuron_ext.set_multicore(module),
        lambda: neuron_ext.unload(module),
        lambda: move(module, i),
        lambda: neuron_ext.wait(module),
        lambda: neuron_ext.async_load(module, i % 2 == 0),
        lambda: neuron_ext.unload(module),
        lambda: neuron_ext.lazy_load(module, i % 3 == 0),
        lambda: neuron_ext.status(module),
    ][i % 8]()


class TestWhileTheModuleChanges:
    @pytest.mark.parametrize(
        "change",
        [move, lambda module, i: neuron_ext.unload(module), anything],
        ids=["moves", "unloads", "does all of it"],
    )
    @pytest.mark.parametrize("net", ["small_net", "native_net"])
    def test_no_request_is_lost_or_wrong(self, request, net, change):
        module = request.getfixturevalue(net)
        stop = threading.Event()
        left = [threading.Event() for _ in range(12)]
        counter = CoreCounter()

        def counted(i):
            work = caller(module, i, calls=60)

            def body():
                try:
                    work()
                finally:
                    left[i].set()
                    if all(event.is_set() for event in left):
                        stop.set()

            return body

        changer = keep_changing(module, change, stop)
        *_, changes = run_threads([*[counted(i) for i in range(12)], changer], timeout=120)
        assert changes > 0
        assert sum(counter.since()) == 12 * 60
        neuron_ext.wait(module)
        status = only_status(module)
        assert status.state == "loaded"
        eventually(lambda: sum(c.models for c in neuron_ext.core_stats()) == len(status.cores))

    def test_two_threads_that_move_the_same_modules_both_finish(self):
        a, b = trace_small_net(), trace_small_net()
        pairs = [torch.jit.script(Pair(a, b)), torch.jit.script(Pair(b, a))]

        def mover(pair, core):
            def body():
                for _ in range(50):
                    neuron_ext.set_neuron_cores(pair, core, 2)
                    assert torch.equal(pair(EXAMPLE), 2 * expected())

            return body

        run_threads([mover(pairs[0], 0), mover(pairs[1], 2)])
        cores = [only_status(module).cores for module in (a, b)]
        assert cores[0] == cores[1]
        assert cores[0] in ([0, 1], [2, 3])


@contextlib.contextmanager
def held_up(module, number):
    """A thread stays inside ``module``, on one core, until the end of the block."""
    gate = Gate(number)
    outputs = []
    thread = threading.Thread(
        target=lambda: outputs.append(module(torch.tensor([float(number)]))), daemon=True
    )
    thread.start()
    try:
        assert gate.entered.wait(60)
        yield gate
        gate.open()
        thread.join(60)
        assert outputs == [torch.tensor([number + 1.0])]
    finally:
        gate.close()


def plus_one(module):
    assert module(torch.zeros(1)).item() == 1


class TestWhileACoreIsBusy:
    def test_others_take_the_idle_replicas_in_turn(self):
        module = gated_net()
        neuron_ext.set_neuron_cores(module, 1, 3)
        with held_up(module, 11):
            # Core 1 is busy: turns go on without it.
            counter = CoreCounter()
            assert counter.cores_of(lambda: plus_one(module), 4) == [2, 3, 2, 3]
        counter.since()
        assert sorted(set(counter.cores_of(lambda: plus_one(module), 3))) == [1, 2, 3]

    def test_the_only_idle_replica_serves_everybody(self):
        module = gated_net()
        neuron_ext.set_multicore(module)
        with held_up(module, 1), held_up(module, 2), held_up(module, 3):
            counter = CoreCounter()
            run_threads([lambda: [plus_one(module) for _ in range(20)]] * 8)
            assert counter.since() == [0, 0, 0, 160]

    def test_a_core_runs_one_inference_at_a_time_whichever_module_asks(self):
        first, second = gated_net(), gated_net()
        for module in (first, second):
            neuron_ext.set_neuron_cores(module, start_nc=2)
        waiting = Gate(5)
        thread = threading.Thread(target=second, args=(torch.tensor([5.0]),), daemon=True)
        with held_up(first, 4):
            thread.start()
            assert not waiting.entered.wait(0.1)
        assert waiting.entered.wait(60)
        waiting.close()
        thread.join(60)
        assert only_status(second).executions == [1]

    def test_a_move_returns_at_once_and_the_old_core_is_freed_when_the_request_ends(self):
        module = gated_net()
        neuron_ext.set_neuron_cores(module, start_nc=0)
        with held_up(module, 7):
            neuron_ext.set_neuron_cores(module, start_nc=3)
            assert only_status(module).cores == [3]
            plus_one(module)
            assert [core.models for core in neuron_ext.core_stats()] == [1, 0, 0, 1]
        eventually(lambda: [c.models for c in neuron_ext.core_stats()] == [0, 0, 0, 1])

    def test_a_request_in_flight_ends_well_although_its_module_is_unloaded_and_dropped(self):
        module = gated_net()
        neuron_ext.set_neuron_cores(module, start_nc=1)
        with held_up(module, 8):
            neuron_ext.unload(module)
            assert only_status(module).state == "unloaded"
            del module
        eventually(lambda: sum(c.models for c in neuron_ext.core_stats()) == 0)

    def test_another_module_loads_and_runs_elsewhere(self):
        module, other = gated_net(), trace_small_net()
        neuron_ext.set_neuron_cores(module, start_nc=0)
        with held_up(module, 9):
            assert torch.equal(other(EXAMPLE), expected())
            assert only_status(other).cores == [1]


def test_an_inference_that_raises_frees_its_core_and_shows_its_error():
    def broken(x):
        if int(x.flatten()[0]) == 99:
            raise RuntimeError("the model said no")
        return x + 1

    library = torch.library.Library("neuron_ext_test_broken", "DEF")
    library.define("broken(Tensor x) -> Tensor")
    library.impl("broken", broken, "CompositeExplicitAutograd")
    module = neuron_ext.trace(
        lambda x: torch.ops.neuron_ext_test_broken.broken(x), torch.zeros(1), compiler="torchscript"
    )
    neuron_ext.set_neuron_cores(module, 0, 2)

    def fail_and_succeed():
        for _ in range(20):
            with pytest.raises(RuntimeError, match="the model said no"):
                module(torch.tensor([99.0]))
            plus_one(module)

    run_threads([fail_and_succeed] * 8)
    assert sum(only_status(module).executions) == 160
