"""status, core_stats and visible_core_count: what they tell of modules and cores."""

import dataclasses

import pytest
import torch
from helpers import (
    EXAMPLE,
    CoreCounter,
    damaged,
    expected,
    only_status,
    rebuild,
    run_threads,
    trace_small_net,
)

import neuron_ext
from neuron_ext import CoreStats, SubgraphStatus

pytestmark = pytest.mark.usefixtures("idle_cores")


class Wrapper(torch.nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return x


class TestStatus:
    def test_of_a_loaded_replicated_module_tells_all(self, small_net):
        neuron_ext.set_neuron_cores(small_net, 1, 3)
        neuron_ext.lazy_load(small_net)
        for _ in range(4):
            small_net(EXAMPLE)
        assert neuron_ext.status(small_net) == [
            SubgraphStatus(
                name="SmallNet",
                state="loaded",
                cores=[1, 2, 3],
                start_nc=1,
                nc_count=3,
                lazy_load=True,
                async_load=False,
                dynamic_batch=False,
                executions=[2, 1, 1],
                error="",
                quarantined=[],
            )
        ]

    def test_of_a_fresh_trace(self):
        assert neuron_ext.status(trace_small_net()) == [
            SubgraphStatus("SmallNet", "unloaded", [], -1, -1, False, False, False, [], "", [])
        ]

    def test_of_a_failed_module_holds_the_error_as_it_was_raised(self):
        module = damaged(trace_small_net(), "graph")
        with pytest.raises(RuntimeError) as caught:
            neuron_ext.wait(module)
        status = only_status(module)
        assert (status.state, status.cores, status.executions) == ("failed", [], [])
        assert status.error == str(caught.value)

    def test_does_not_load_anything(self):
        module = trace_small_net()
        for _ in range(3):
            assert only_status(module).state == "unloaded"
        assert [core.models for core in neuron_ext.core_stats()] == [0, 0, 0, 0]

    def test_lists_subgraphs_in_the_order_of_attributes(self):
        traces = {name: trace_small_net() for name in ("zulu", "alpha", "mike")}
        named = {
            name: rebuild(module, strings={"name": name, "producer": "test"})
            for name, module in traces.items()
        }
        for wrapper in (Wrapper(**named), torch.jit.script(Wrapper(**named))):
            assert [s.name for s in neuron_ext.status(wrapper)] == ["zulu", "alpha", "mike"]

    def test_lists_a_shared_subgraph_once(self):
        module = trace_small_net()
        for wrapper in (
            Wrapper(a=module, b=module),
            torch.jit.script(Wrapper(a=module, b=module)),
            torch.nn.ModuleList([module, Wrapper(a=module)]),
        ):
            assert len(neuron_ext.status(wrapper)) == 1

    def test_is_read_only(self, small_net):
        with pytest.raises(dataclasses.FrozenInstanceError):
            only_status(small_net).state = "failed"

    def test_counts_add_up_and_failed_inputs_do_not_count(self, small_net):
        with pytest.raises(RuntimeError, match="shape"):
            small_net(torch.ones(7, 7))
        assert only_status(small_net).executions == [0]
        small_net(EXAMPLE)
        assert only_status(small_net).executions == [1]


class TestCoreStats:
    def test_describes_every_visible_core(self):
        stats = neuron_ext.core_stats()
        assert [core.index for core in stats] == [0, 1, 2, 3]
        assert [core.global_index for core in stats] == [0, 1, 2, 3]
        assert all(isinstance(core, CoreStats) for core in stats)
        assert neuron_ext.visible_core_count() == len(stats)

    def test_counts_replicas_of_all_modules(self, small_net):
        assert [core.models for core in neuron_ext.core_stats()] == [1, 0, 0, 0]
        other = trace_small_net()
        neuron_ext.set_neuron_cores(other, 0, 2)
        assert [core.models for core in neuron_ext.core_stats()] == [2, 1, 0, 0]
        del other
        assert [core.models for core in neuron_ext.core_stats()] == [1, 0, 0, 0]

    def test_executions_outlive_the_modules_and_add_up_over_them(self):
        counter = CoreCounter()
        for start in (0, 0, 2):
            module = trace_small_net()
            neuron_ext.set_neuron_cores(module, start)
            for _ in range(5):
                module(EXAMPLE)
            del module
        assert counter.since() == [10, 0, 5, 0]

    def test_busy_time_grows_on_the_core_that_works_and_on_no_other(self, small_net):
        neuron_ext.set_neuron_cores(small_net, 3)
        before = [core.busy_seconds for core in neuron_ext.core_stats()]
        for _ in range(20):
            small_net(EXAMPLE)
        after = [core.busy_seconds for core in neuron_ext.core_stats()]
        assert after[:3] == before[:3]
        assert after[3] > before[3]

    def test_is_read_only(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            neuron_ext.core_stats()[0].models = 3


class TestIntraOpThreads:
    """A core computes with its own share of CPUs, whatever the caller's threads are set to."""

    def test_a_call_leaves_the_callers_number_of_threads_alone(self, small_net, native_net):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for module in (small_net, native_net):
                for _ in range(3):
                    module(EXAMPLE)
                assert torch.get_num_threads() == threads

    def test_nor_that_of_other_threads(self, small_net, native_net):
        torch.set_num_threads(2)

        def body():
            before = torch.get_num_threads()
            for module in (small_net, native_net):
                for _ in range(3):
                    assert torch.equal(module(EXAMPLE), expected())
            return before, torch.get_num_threads()

        # A thread that torch has not seen has the number that was set last.
        assert run_threads([body] * 4) == [(2, 2)] * 4
        assert torch.get_num_threads() == 2

    @pytest.mark.parametrize("cores", [1, 4])
    def test_the_callers_number_does_not_reach_a_core(self, fork_server, cores):
        code = """
            zero = torch.zeros(1)
            count = lambda x: torch.ops.neuron_ext_test.thread_count(x)
            module = neuron_ext.trace(count, zero, compiler="torchscript")
            result = []
            for threads in (1, 3, 2):
                torch.set_num_threads(threads)
                result.append([int(module(zero)) for _ in range(3)])
            result.append(len(neuron_ext.core_stats()[0].cpus))
        """
        *counts, cpus = fork_server.run(code, env={"NEURON_EXT_HOST_CORES": cores})
        assert counts == [[cpus] * 3] * 3


class TestCallersModes:
    @pytest.fixture(params=["small_net", "native_net"])
    def net(self, request):
        return request.getfixturevalue(request.param)

    def test_autocast_changes_no_output(self, net):
        # 1000 + 1/16 has no bfloat16: a product computed there would differ.
        fine = torch.full((2, 3), 1000.0625)
        plain = net(fine)
        with torch.autocast("cpu", torch.bfloat16):
            inside = net(fine)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, plain)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(net(EXAMPLE), expected())

    def test_autocast_of_the_caller_is_still_on_after_a_call(self, net):
        weight = torch.ones(3, 3)
        with torch.autocast("cpu", torch.bfloat16):
            net(EXAMPLE)
            assert torch.is_autocast_enabled("cpu")
            assert (weight @ weight).dtype == torch.bfloat16
        net(EXAMPLE)
        assert not torch.is_autocast_enabled("cpu")

    @pytest.mark.parametrize("enabled", [True, False])
    def test_grad_mode_of_the_caller_stays_and_outputs_need_no_gradient(self, net, enabled):
        with torch.set_grad_enabled(enabled):
            for needs in (False, True):
                output = net(EXAMPLE.clone().requires_grad_(needs))
                assert torch.is_grad_enabled() is enabled
                assert not output.requires_grad
                assert torch.equal(output, expected())

    def test_inference_mode_of_the_caller_is_fine(self, net):
        with torch.inference_mode():
            assert torch.equal(net(EXAMPLE), expected())
            assert torch.is_inference_mode_enabled()
        assert torch.equal(net(EXAMPLE), expected())

    def test_outputs_can_be_used_in_training_outside(self, net):
        weight = torch.ones(4, requires_grad=True)
        (net(EXAMPLE) * weight).sum().backward()
        assert torch.equal(weight.grad, expected().sum(0))
