"""Threads that tests run, hold up and wait for. Import it through ``helpers``."""

import faulthandler
import sys
import threading
import time
from typing import ClassVar

import pytest
import torch

import neuron_ext


def eventually(condition, timeout=60):
    """Wait until ``condition()`` is true; fails after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"still not so after {timeout} s")
        time.sleep(0.001)


class Gate:
    """Holds up the inferences of one input number in `gated_net`, until `open`.

    So a core is busy for as long as a test likes, without a clock.
    """

    _all: ClassVar[dict] = {}

    def __init__(self, number):
        assert number != 0, "0 goes through without a gate"
        self.entered = threading.Event()
        self._opened = threading.Event()
        self._number = number
        Gate._all[number] = self

    def open(self):
        self._opened.set()

    def close(self):
        """For good; whoever waits goes on."""
        self._opened.set()
        Gate._all.pop(self._number, None)

    @staticmethod
    def pass_through(x):
        gate = Gate._all.get(int(x.flatten()[0]))
        if gate is not None:
            gate.entered.set()
            if not gate._opened.wait(60):
                raise RuntimeError("nobody opened the gate")
        return x + 1


test_ops = torch.library.Library("neuron_ext_test", "DEF")
test_ops.define("gate(Tensor x) -> Tensor")
test_ops.define("thread_count(Tensor x) -> Tensor")
test_ops.impl("gate", Gate.pass_through, "CompositeExplicitAutograd")
test_ops.impl("thread_count", lambda x: x + torch.get_num_threads(), "CompositeExplicitAutograd")


def gated_net():
    """A fresh trace of ``x + 1`` that stops at the `Gate` of the number in ``x``, if any."""
    return neuron_ext.trace(
        lambda x: torch.ops.neuron_ext_test.gate(x), torch.zeros(1), compiler="torchscript"
    )


def run_threads(functions, timeout=60):
    """Run each function in a thread of its own and return what they return, in order.

    Raises the first error of any. After ``timeout`` seconds it shows where every thread stands, and
    fails.
    """
    results = [None] * len(functions)
    errors = []
    start = threading.Barrier(len(functions))

    def body(i, function):
        try:
            start.wait()
            results[i] = function()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=body, args=(i, function), name=f"test-{i}", daemon=True)
        for i, function in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    hanging = [thread.name for thread in threads if thread.is_alive()]
    if errors:
        raise errors[0]
    if hanging:
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        pytest.fail(f"threads {hanging} still run after {timeout} s")
    return results
