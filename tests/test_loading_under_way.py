"""What can be seen and done while a load is under way.

The load is held up until the test lets it go on: see `helpers.FullStderr`.
"""

import pytest

HELD_UP = """
import io, threading
from helpers import *

buffer = io.BytesIO()
torch.jit.save(flagged(falls_back(trace_small_net()), asynchronous=True), buffer)
load = lambda: torch.jit.load(io.BytesIO(buffer.getvalue()))
models = lambda: [core.models for core in neuron_ext.core_stats()]
"""
HELD_UP_ENV = {
    "NEURON_EXT_HOST_CORES": 4,
    "NEURON_EXT_NATIVE_CODE": "deny",
    "NEURON_RT_LOG_LEVEL": "warning",
}


class TestWhileALoadIsUnderWay:
    @pytest.fixture
    def run(self, fork_server):
        return lambda code: fork_server.run(HELD_UP + code, env=HELD_UP_ENV)

    def test_load_has_returned_and_wait_times_out_and_forward_waits(self, run):
        run(
            """
with FullStderr() as stderr:
    module = load()
    assert only_status(module).state == "loading"
    for timeout in (0, 0.05):
        try:
            neuron_ext.wait(module, timeout=timeout)
        except TimeoutError as error:
            assert f"after {timeout} s" in str(error)
        else:
            raise AssertionError("wait came back")
    answers = []
    caller = threading.Thread(target=lambda: answers.append(module(EXAMPLE)))
    caller.start()
    caller.join(0.2)
    assert caller.is_alive() and only_status(module).state == "loading"
    stderr.release()
    caller.join()
assert torch.equal(answers[0], expected())
assert only_status(module).state == "loaded"
"""
        )

    def test_other_modules_load_and_run_and_cores_count_both(self, run):
        run(
            """
with FullStderr() as stderr:
    slow = [load(), load()]
    other = trace_small_net()
    assert torch.equal(other(EXAMPLE), expected())
    assert [only_status(module).state for module in (*slow, other)] == ["loading"] * 2 + ["loaded"]
    stderr.release()
    for module in slow:
        neuron_ext.wait(module)
assert models() == [1, 1, 1, 0]
"""
        )

    def test_a_module_that_moves_in_the_background_answers_after_the_move(self, run):
        run(
            """
module = trace_small_net()
slow = falls_back(module)
slow(EXAMPLE)
assert only_status(slow).cores == [0]
neuron_ext.async_load(slow)
with FullStderr() as stderr:
    neuron_ext.set_neuron_cores(slow, 2, 2)
    assert only_status(slow).state == "loading"
    stderr.release()
assert torch.equal(slow(EXAMPLE), expected())
assert only_status(slow).cores == [2, 3]
assert models() == [0, 0, 1, 1]
"""
        )

    def test_requests_go_on_where_the_module_is_during_a_move_that_is_not_async(self, run):
        run(
            """
slow = falls_back(trace_small_net())
slow(EXAMPLE)
with FullStderr() as stderr:
    mover = threading.Thread(target=neuron_ext.set_neuron_cores, args=(slow, 3))
    mover.start()
    for _ in range(20):
        assert torch.equal(slow(EXAMPLE), expected())
    mover.join(0.2)
    assert mover.is_alive()
    assert only_status(slow).cores == [0] and only_status(slow).executions == [21]
    stderr.release()
    mover.join()
assert only_status(slow).cores == [3] and models() == [0, 0, 0, 1]
"""
        )

    def test_unload_waits_for_the_load_and_then_frees_the_core(self, run):
        run(
            """
with FullStderr() as stderr:
    module = load()
    unloader = threading.Thread(target=neuron_ext.unload, args=(module,))
    unloader.start()
    unloader.join(0.2)
    assert unloader.is_alive()
    stderr.release()
    unloader.join()
assert only_status(module).state == "unloaded" and models() == [0, 0, 0, 0]
"""
        )

    def test_a_module_that_is_dropped_frees_its_core_when_the_load_ends(self, run):
        run(
            """
with FullStderr() as stderr:
    module = load()
    assert only_status(module).state == "loading"
    eventually(lambda: models() == [1, 0, 0, 0])
    del module
    assert models() == [1, 0, 0, 0]
    stderr.release()
eventually(lambda: models() == [0, 0, 0, 0])
"""
        )
