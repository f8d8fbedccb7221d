"""`DataParallel` computes on all of its cores at once, for any number of callers."""

import threading
from functools import partial

import helpers_threads
import pytest
import torch
from data_parallel_helpers import affine, numbers, traced_affine
from helpers import Gate, expected, gated_net, run_threads

import neuron_ext
from neuron_ext import DataParallel

helpers_threads.test_ops.define("meet(Tensor x) -> Tensor")
helpers_threads.test_ops.define("fail(Tensor x) -> Tensor")
_meeting = {}
_failing = {}


def _meet(x):
    if "barrier" in _meeting:
        _meeting["barrier"].wait(60)
    return x + 1


def _fail(x):
    number = int(x.flatten()[0])
    if number in _failing:
        _failing[number]()
    return x + 1


helpers_threads.test_ops.impl("meet", _meet, "CompositeExplicitAutograd")
helpers_threads.test_ops.impl("fail", _fail, "CompositeExplicitAutograd")


@pytest.mark.parametrize("ids", [None, [0, 1, 3]])
def test_all_cores_work_at_once(ids):
    meet = neuron_ext.trace(
        lambda x: torch.ops.neuron_ext_test.meet(x), torch.zeros(1, 1), compiler="torchscript"
    )
    parallel = DataParallel(meet, ids)
    cores = len(parallel.device_ids)
    _meeting["barrier"] = threading.Barrier(cores)  # passes only if so many compute at once
    try:
        for rows in (cores, 3 * cores):
            x = numbers(rows, 1)
            assert torch.equal(parallel(x), x + 1)
    finally:
        _meeting.clear()


def test_an_error_names_chunk_and_core_and_leaves_nothing_running():
    fail = neuron_ext.trace(
        lambda x: torch.ops.neuron_ext_test.fail(x), torch.zeros(1, 1), compiler="torchscript"
    )
    parallel = DataParallel(fail, [1, 2])
    x = numbers(40, 1)
    parallel.split_size = 1
    failed, others = threading.Event(), []

    def go_wrong():
        failed.set()
        raise RuntimeError("number 4 goes wrong")

    def take_long():
        assert failed.wait(60)
        others.append("ended")

    _failing.update({4: go_wrong, 3: take_long})
    try:
        with pytest.raises(RuntimeError, match=r"(?s)^chunk 5 of 40 on core [12]: .*number 4 go"):
            parallel(x)
        assert others == ["ended"]
        _failing.pop(3)
        assert torch.equal(parallel(x[10:]), x[10:] + 1)

        parallel.num_workers = 1
        done = sum(neuron_ext.status(parallel)[0].executions)
        with pytest.raises(RuntimeError, match=r"^chunk 5 of 40"):
            parallel(x)
        assert sum(neuron_ext.status(parallel)[0].executions) == done + 4
    finally:
        _failing.clear()


def test_threads_get_their_own_rows_back(small_net):
    parallel = DataParallel(small_net, [0, 2, 3])

    def call(start):
        for rows in range(1, 25):
            x = numbers(rows, 3) + start
            assert torch.equal(parallel(x), expected(x))

    run_threads([partial(call, 1000 * i) for i in range(8)])


def test_a_call_waits_for_no_thread_it_does_not_need():
    """As many chunks as there are threads for chunks are held up; another call goes on."""
    held = DataParallel(gated_net(), [0, 1, 2])
    free = DataParallel(traced_affine(1, 2), [3])
    gate = Gate(7)
    try:
        waiting = [
            threading.Thread(target=held, args=(torch.full((3,), 7.0),), daemon=True)
            for _ in range(8)
        ]
        for thread in waiting:
            thread.start()
        assert gate.entered.wait(60)
        assert run_threads([lambda: torch.equal(free(numbers(9, 2)), affine(numbers(9, 2)))])[0]
    finally:
        gate.close()
    for thread in waiting:
        thread.join(60)
        assert not thread.is_alive()
