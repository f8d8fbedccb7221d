"""The end of a process while things run, and forked children."""

import pytest
from helpers import run_python

ENV = {"NEURON_EXT_HOST_CORES": 4}
IMPORTS = """
import os, sys, threading
import torch, neuron_ext
from helpers import *
"""


@pytest.fixture
def ends(fork_server):
    """Runs code; the process must end by itself, with this code, and say nothing of a crash."""

    def run(code, *args, returncode=0):
        done = fork_server.run_to_exit(IMPORTS + code, *args, env=ENV)
        assert done.returncode == returncode, done.stdout + done.stderr
        for word in ("Fatal", "terminate called", "Segmentation", "core dumped"):
            assert word not in done.stderr
        return done

    return run


@pytest.fixture(params=["torchscript", "native"])
def model_file(request):
    return request.getfixturevalue(f"{request.param}_file")


LOADED = """
model = torch.jit.load(sys.argv[1])
neuron_ext.set_multicore(model)
model(EXAMPLE)
"""
BUSY = (
    LOADED
    + """
started = [threading.Event() for _ in range(8)]
def run(event):
    while True:
        model(EXAMPLE)
        event.set()
for event in started:
    threading.Thread(target=run, args=(event,), daemon=True).start()
for event in started:
    event.wait()
"""
)


class TestExit:
    @pytest.mark.parametrize(
        ("way", "returncode"),
        [
            ("", 0),
            ("sys.exit(7)", 7),
            ("raise KeyError('mine')", 1),
            ("os._exit(5)", 5),
        ],
    )
    def test_with_a_loaded_module_gives_the_right_code(self, ends, model_file, way, returncode):
        done = ends(LOADED + way, model_file, returncode=returncode)
        assert done.stdout == ""
        assert ("KeyError: 'mine'" in done.stderr) is ("KeyError" in way)

    @pytest.mark.parametrize("way", ["", "sys.exit(7)", "os._exit(7)"])
    def test_while_daemon_threads_run_inferences(self, ends, model_file, way):
        for _ in range(3):
            ends(BUSY + way, model_file, returncode=7 if way else 0)

    def test_while_threads_that_python_waits_for_run_inferences(self, ends, model_file):
        code = """
def work():
    for i in range(300):
        assert torch.equal(model(input_number(i)), expected(input_number(i)))
    sys.stdout.write("finished\\n")
for _ in range(4):
    threading.Thread(target=work).start()
sys.exit(3)
"""
        done = ends(LOADED + code, model_file, returncode=3)
        assert done.stdout == "finished\n" * 4

    @pytest.mark.parametrize("way", ["", "sys.exit(7)"])
    def test_while_background_loads_are_under_way(self, ends, model_file, way):
        code = """
import io
model = torch.jit.load(sys.argv[1])
buffer = io.BytesIO()
torch.jit.save(flagged(model, asynchronous=True), buffer)
models = [torch.jit.load(io.BytesIO(buffer.getvalue())) for _ in range(40)]
"""
        ends(code + way, model_file, returncode=7 if way else 0)

    def test_while_another_thread_moves_the_module(self, ends, model_file):
        code = """
moved = threading.Event()
def keep_moving():
    i = 0
    while True:
        neuron_ext.set_neuron_cores(model, i % 4)
        moved.set()
        i += 1
threading.Thread(target=keep_moving, daemon=True).start()
moved.wait()
"""
        for _ in range(3):
            ends(LOADED + code, model_file)

    def test_in_an_atexit_function_a_module_still_runs(self, ends, model_file):
        code = """
import atexit
atexit.register(lambda: print(torch.equal(model(EXAMPLE), expected())))
"""
        assert ends(LOADED + code, model_file).stdout == "True\n"

    def test_with_a_module_in_a_global_of_another_module_and_in_a_cycle(self, ends, model_file):
        code = """
import types
holder = types.ModuleType("holder")
sys.modules["holder"] = holder
holder.model = model
cycle = [model]
cycle.append(cycle)
del model
"""
        ends(LOADED + code, model_file)

    def test_with_an_inference_that_never_ends_says_so_and_keeps_the_code(self, ends):
        code = """
gate = Gate(1)
model = gated_net()
threading.Thread(target=model, args=(torch.ones(1),), daemon=True).start()
gate.entered.wait()
sys.exit(7)
"""
        done = ends(code, returncode=7)
        assert "still runs at exit" in done.stderr


FORKED = """
def child(use):
    sys.stdout.flush()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            use()
        except RuntimeError as error:
            os.write(write, str(error).encode())
        except BaseException as error:
            os.write(write, repr(error).encode())
            code = 2
        os._exit(code)
    os.close(write)
    text = os.fdopen(read).read()
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0, text
    return text
"""
CLEAR = "this process was forked from one that used NeuronCores"


class TestFork:
    def test_every_use_in_the_child_gives_one_clear_error_and_none_hangs(self, ends, model_file):
        code = """
uses = [
    lambda: model(EXAMPLE),
    lambda: torch.jit.load(sys.argv[1]),
    lambda: neuron_ext.set_neuron_cores(model, 1),
    lambda: neuron_ext.set_multicore(model),
    lambda: neuron_ext.status(model),
    lambda: neuron_ext.wait(model),
    lambda: neuron_ext.unload(model),
    lambda: neuron_ext.core_stats(),
    lambda: neuron_ext.visible_core_count(),
    lambda: neuron_ext.neuron_cores_context(0).__enter__(),
    lambda: neuron_ext.multicore_context().__enter__(),
]
for use in uses:
    text = child(use)
    assert sys.argv[2] in text and "'spawn'" in text, text
assert torch.equal(model(EXAMPLE), expected())
"""
        ends(FORKED + LOADED + code, model_file, CLEAR)

    def test_calls_are_refused_before_they_enter_torchscript(self, ends, model_file):
        # Its executor has locks that a thread of the parent may have held at the fork.
        code = """
batches = torch.jit.load(sys.argv[1])
neuron_ext.dynamic_batch(batches)
parallel = neuron_ext.DataParallel(batches)
pair = torch.jit.script(Pair(model, model))
for called in (model, pair, Pair(model, model), parallel, model.forward, pair.forward):
    text = child(lambda: called(EXAMPLE))
    assert text.startswith(sys.argv[2]), text
other = torch.jit.script(torch.nn.Identity())
for called in (other, other.forward):
    assert child(lambda: torch.equal(called(EXAMPLE), EXAMPLE) or os._exit(1)) == ""
assert torch.equal(model(EXAMPLE), expected())
"""
        ends(FORKED + LOADED + code, model_file, CLEAR)

    def test_while_all_cores_are_busy_too_and_the_parent_goes_on(self, ends, model_file):
        code = """
for _ in range(5):
    assert sys.argv[2] in child(lambda: model(EXAMPLE))
assert torch.equal(model(EXAMPLE), expected())
"""
        ends(FORKED + BUSY + code, model_file, CLEAR)

    def test_a_child_that_drops_the_module_and_exits_normally_is_fine(self, ends, model_file):
        code = """
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        del model
        import gc; gc.collect()
        sys.exit(9)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
assert torch.equal(model(EXAMPLE), expected())
"""
        ends(BUSY + code, model_file)

    def test_before_the_first_use_children_are_processes_like_any_other(self, ends, model_file):
        code = """
def use():
    model = torch.jit.load(sys.argv[1])
    assert torch.equal(model(EXAMPLE), expected())
for _ in range(3):
    assert child(use) == ""
use()
"""
        ends(FORKED + code, model_file)

    def test_multiprocessing_with_spawn_works_beside_a_loaded_module(self, torchscript_file):
        code = """
import multiprocessing
pool = multiprocessing.get_context("spawn").Pool(1)
with pool:
    print(pool.apply(neuron_ext.visible_core_count))
"""
        assert run_python(IMPORTS + LOADED + code, torchscript_file, env=ENV) == "4\n"
