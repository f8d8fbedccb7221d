"""Cores of the host backend that fail or do not answer, as Python sees them.

The rules in detail, on stub cores: tests/cpp/faults_test.cpp and replica_health_test.cpp.
"""

import pytest
import torch

import neuron_ext

FAULTY = """
    import os, threading
    import helpers, helpers_threads

    faults = {}

    def compute(x):
        # With a timeout, which the environment sets, cores compute on threads of their own.
        core = open(f"/proc/self/task/{threading.get_native_id()}/comm").read().strip()
        if core in faults:
            faults[core]()
        helpers_threads.time.sleep(0.001)  # brief inferences are the caller's
        return x + 1

    helpers_threads.test_ops.define("faulty(Tensor x) -> Tensor")
    helpers_threads.test_ops.impl("faulty", compute, "CompositeExplicitAutograd")
    zero = torch.zeros(1)
    module = neuron_ext.trace(
        lambda x: torch.ops.neuron_ext_test.faulty(x), zero, compiler="torchscript"
    )
    neuron_ext.set_multicore(module)

    def outcome():
        try:
            return module(zero).tolist()
        except RuntimeError as error:
            return next(k for k in ("is broken", "NEURON_RT_EXEC_TIMEOUT") if k in str(error))

    def shown():
        (status,) = neuron_ext.status(module)
        return status.quarantined, [core.quarantined for core in neuron_ext.core_stats()]
"""


def run(fork_server, code, timeout):
    env = {"NEURON_EXT_HOST_CORES": 3, "NEURON_RT_EXEC_TIMEOUT": timeout}
    return fork_server.run(FAULTY + code, env=env)


def test_a_core_that_fails_is_taken_out_and_comes_back_when_it_works(fork_server):
    code = """
    def broken():
        raise RuntimeError("is broken")

    faults["nc1"] = broken
    told = [outcome() for _ in range(30)]
    result = [told.count("is broken"), told.count([1.0]), shown()]
    faults.clear()
    before = neuron_ext.status(module)[0].executions[1]
    while neuron_ext.status(module)[0].executions[1] == before:
        assert outcome() == [1.0]
    result.append(shown())
    """
    assert run(fork_server, code, timeout=60) == [
        2,
        28,
        [[1], [False, True, False]],
        [[], [False, False, False]],
    ]


def test_inputs_that_fail_everywhere_take_no_core_out(fork_server):
    code = """
    def broken():
        raise RuntimeError("is broken")

    faults.update(nc0=broken, nc1=broken, nc2=broken)
    result = [[outcome() for _ in range(20)], shown()]
    faults.clear()
    result.append(outcome())
    """
    found = run(fork_server, code, timeout=60)
    assert found == [["is broken"] * 20, [[], [False] * 3], [1.0]]


def test_a_core_that_does_not_answer_costs_one_request_and_is_shown(fork_server):
    code = """
    back = threading.Event()
    faults["nc0"] = back.wait
    result = [outcome(), shown(), [outcome() for _ in range(5)]]
    back.set()
    helpers_threads.eventually(lambda: shown() == ([], [False] * 3))
    faults.clear()
    result += [outcome(), shown()]
    """
    assert run(fork_server, code, timeout=1) == [
        "NEURON_RT_EXEC_TIMEOUT",
        [[0], [True, False, False]],
        [[1.0]] * 5,
        [1.0],
        [[], [False] * 3],
    ]


@pytest.mark.parametrize("compiler", ["torchscript", "inductor"])
def test_a_subgraph_inside_another_is_refused(small_net, compiler):
    with pytest.raises(ValueError, match="calls a module that is traced already"):
        neuron_ext.trace(lambda x: small_net(x) + 1, torch.ones(2, 3), compiler=compiler)
