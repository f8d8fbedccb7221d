"""The examples of the two API pages and of the placement guide, as written there, on four cores.

Only the import changes: ``import neuron_ext as torch_neuronx``. Comments that say where a call
executes, or where a model loads, are checked as they stand.
"""

import ast
import functools
import re
import textwrap

import pytest
import torch
from helpers import CoreCounter, only_status, save, trace_small_net

import neuron_ext as torch_neuronx

pytestmark = pytest.mark.usefixtures("idle_cores", "in_model_folder")

CALL = re.compile(r"# Executes on (?:NeuronCore |nc)(\d)$")
LOAD = re.compile(r"# Loads (?:replicas |replications )?to nc(\d)(?:(-| and )nc(\d))?$")


@pytest.fixture
def in_model_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(trace_small_net(), "example_neuron_model.pt")


def run_example(text, **names):
    """Run an example statement by statement; returns its names and what its comments were about."""
    text = textwrap.dedent(text)
    lines = text.splitlines()
    names = {"torch": torch, "torch_neuronx": torch_neuronx, **names}
    counter = CoreCounter()
    executed, loaded = [], []

    def run(statement):
        exec(compile(ast.Module([statement], []), "<example>", "exec"), names)

    for statement in ast.parse(text).body:
        comment = lines[statement.end_lineno - 1]
        if called := CALL.search(comment):
            core = counter.core_of(lambda statement=statement: run(statement))
            assert core == int(called[1]), comment
            executed.append(core)
        else:
            run(statement)
        if placed := LOAD.search(comment):
            while isinstance(statement, ast.With):
                statement = statement.body[-1]
            first, word, last = int(placed[1]), placed[2], int(placed[3] or placed[1])
            assert word != " and " or last == first + 1
            cores = only_status(names[statement.targets[0].id]).cores
            assert cores == list(range(first, last + 1)), comment
            loaded.append(cores)
    return names, executed, loaded


MOVE_SINGLE = """
model = torch.jit.load('example_neuron_model.pt')
torch_neuronx.experimental.set_neuron_cores(model, start_nc=0, nc_count=1)

model(example) # Executes on NeuronCore 0
model(example) # Executes on NeuronCore 0
model(example) # Executes on NeuronCore 0
"""
MOVE_REPLICATED = """
model = torch.jit.load('example_neuron_model.pt')
torch_neuronx.experimental.set_neuron_cores(model, start_nc=2, nc_count=2)

model(example) # Executes on NeuronCore 2
model(example) # Executes on NeuronCore 3
model(example) # Executes on NeuronCore 2
"""
MOVE_TWO_MODELS = """
model1 = torch.jit.load('example_neuron_model.pt')
torch_neuronx.experimental.set_neuron_cores(model1, start_nc=2)

model2 = torch.jit.load('example_neuron_model.pt')
torch_neuronx.experimental.set_neuron_cores(model2, start_nc=0)

model1(example) # Executes on NeuronCore 2
model1(example) # Executes on NeuronCore 2
model2(example) # Executes on NeuronCore 0
model2(example) # Executes on NeuronCore 0
"""
MOVE_TO_ALL = """
model = torch.jit.load('example_neuron_model.pt')
torch_neuronx.experimental.set_multicore(model)

model(example) # Executes on NeuronCore 0
model(example) # Executes on NeuronCore 1
model(example) # Executes on NeuronCore 2
"""
LOAD_SINGLE = """
with torch_neuronx.experimental.neuron_cores_context(start_nc=0, nc_count=1):
    model = torch.jit.load('example_neuron_model.pt')

model(example) # Executes on NeuronCore 0
model(example) # Executes on NeuronCore 0
model(example) # Executes on NeuronCore 0
"""
LOAD_REPLICATED = """
with torch_neuronx.experimental.neuron_cores_context(start_nc=2, nc_count=2):
    model = torch.jit.load('example_neuron_model.pt')

model(example) # Executes on NeuronCore 2
model(example) # Executes on NeuronCore 3
model(example) # Executes on NeuronCore 2
"""
LOAD_TWO_MODELS = """
with torch_neuronx.experimental.neuron_cores_context(start_nc=2):
    model1 = torch.jit.load('example_neuron_model.pt')

with torch_neuronx.experimental.neuron_cores_context(start_nc=0):
    model2 = torch.jit.load('example_neuron_model.pt')

model1(example) # Executes on NeuronCore 2
model1(example) # Executes on NeuronCore 2
model2(example) # Executes on NeuronCore 0
model2(example) # Executes on NeuronCore 0
"""
LOAD_TO_ALL = """
with torch_neuronx.experimental.multicore_context():
    model = torch.jit.load('example_neuron_model.pt')

model(example) # Executes on NeuronCore 0
model(example) # Executes on NeuronCore 1
model(example) # Executes on NeuronCore 2
"""


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        pytest.param(MOVE_SINGLE, [0, 0, 0], id="move to one core"),
        pytest.param(MOVE_REPLICATED, [2, 3, 2], id="replicate to two cores"),
        pytest.param(MOVE_TWO_MODELS, [2, 2, 0, 0], id="move two models"),
        pytest.param(MOVE_TO_ALL, [0, 1, 2], id="replicate to all cores"),
        pytest.param(LOAD_SINGLE, [0, 0, 0], id="load on one core"),
        pytest.param(LOAD_REPLICATED, [2, 3, 2], id="load on two cores"),
        pytest.param(LOAD_TWO_MODELS, [2, 2, 0, 0], id="load two models"),
        pytest.param(LOAD_TO_ALL, [0, 1, 2], id="load on all cores"),
    ],
)
def test_placement_example_executes_where_its_comments_say(text, cores):
    example = torch.arange(6.0).reshape(2, 3)
    _, executed, _ = run_example(text, example=example)
    assert executed == cores


# ---------------------------------------------------------------------------- the placement guide

GUIDE_DEFAULT = """
import torch
import neuron_ext as torch_neuronx

m0 = torch.jit.load('model.pt')  # Loads to nc0
m1 = torch.jit.load('model.pt')  # Loads to nc1
"""
# In the guide the comments of the calls have m0 and m1 the other way round.
GUIDE_MANUAL = """
import torch
import neuron_ext as torch_neuronx

# NOTE: Order of loads does NOT matter
with torch_neuronx.experimental.neuron_cores_context(start_nc=3):
    m0 = torch.jit.load('model.pt')  # Loads to nc3

with torch_neuronx.experimental.neuron_cores_context(start_nc=0, nc_count=2):
    m1 = torch.jit.load('model.pt')  # Loads replicas to nc0 and nc1

example = torch.rand(1, 3, 224, 224)

m0(example)  # Executes on nc3
m0(example)  # Executes on nc3

m1(example)  # Executes on nc0
m1(example)  # Executes on nc1
m1(example)  # Executes on nc0
"""
GUIDE_MULTICORE = """
import torch
import neuron_ext as torch_neuronx

with torch_neuronx.experimental.multicore_context():
    m0 = torch.jit.load('model.pt')  # Loads replications to nc0-nc3

example = torch.rand(1, 3, 224, 224)

m0(example)  # Executes on nc0
m0(example)  # Executes on nc1
"""


@pytest.fixture
def guide_model(in_model_folder):
    pixels = torch.rand(1, 3, 224, 224)
    traced = torch_neuronx.trace(lambda x: x.mean((2, 3)), pixels, compiler="torchscript")
    save(traced, "model.pt")


@pytest.mark.parametrize(
    ("text", "executed", "loaded"),
    [
        pytest.param(GUIDE_DEFAULT, [], [[0], [1]], id="default"),
        pytest.param(GUIDE_MANUAL, [3, 3, 0, 1, 0], [[3], [0, 1]], id="manual selection"),
        pytest.param(GUIDE_MULTICORE, [0, 1], [[0, 1, 2, 3]], id="automatic multicore"),
    ],
)
@pytest.mark.usefixtures("guide_model")
def test_guide_example_loads_and_executes_where_its_comments_say(text, executed, loaded):
    assert run_example(text)[1:] == (executed, loaded)


@pytest.mark.parametrize(
    ("setting", "outside"),
    [
        ({"NEURON_RT_NUM_CORES": "2"}, [0, 1]),
        ({"NEURON_RT_VISIBLE_CORES": "4-5"}, [4, 5]),
    ],
    ids=["num_cores", "visible_cores"],
)
@pytest.mark.usefixtures("guide_model")
def test_guide_example_with_cores_chosen_by_the_environment(
    setting, outside, fork_server, tmp_path
):
    where = """
        m0, m1 = [torch.jit.load(args[0]) for _ in range(2)]
        cores = [neuron_ext.status(m)[0].cores for m in (m0, m1)]
        result = [neuron_ext.core_stats()[core].global_index for (core,) in cores]
    """
    env = {"NEURON_EXT_HOST_CORES": 8, "NEURON_EXT_LOCK_DIR": tmp_path, **setting}
    assert fork_server.run(where, str(tmp_path / "model.pt"), env=env) == outside


# ------------------------------------------------------------------------- lazy and async loading

LAZY = """
neuron_model = torch_neuronx.trace(model, inputs)
torch_neuronx.lazy_load(neuron_model)
torch.jit.save(neuron_model, "my_model")
"""
LAZY_LATER = """
neuron_model = torch.jit.load("my_model")
"""
ASYNC = """
neuron_model1 = torch_neuronx.trace(model1, inputs1)
torch_neuronx.async_load(neuron_model1)
torch.jit.save(neuron_model1, "my_model1")

neuron_model2 = torch_neuronx.trace(model2, inputs2)
torch_neuronx.async_load(neuron_model2)
torch.jit.save(neuron_model2, "my_model2")
"""
ASYNC_LATER = """
neuron_model1 = torch.jit.load("my_model1")
neuron_model2 = torch.jit.load("my_model2")
"""
ASYNC_USE = """
output1 = neuron_model1(input1)
output2 = neuron_model2(input2)
"""
BOTH = """
neuron_model = torch_neuronx.trace(model, inputs)
torch_neuronx.lazy_load(neuron_model)
torch_neuronx.async_load(neuron_model)
torch.jit.save(neuron_model, "my_model")
"""

INPUTS = torch.tensor([1.0, 2.0])


def double(x):
    return 2 * x


def negate(x):
    return -x


@pytest.fixture
def portable_traces(monkeypatch):
    """``trace`` makes portable graphs, in no time, where the examples let it choose."""
    trace = functools.partial(torch_neuronx.trace, compiler="torchscript")
    monkeypatch.setattr(torch_neuronx, "trace", trace)


def models_on_cores():
    return [core.models for core in torch_neuronx.core_stats()]


def test_lazy_example_with_native_code_loads_at_its_first_run():
    run_example(LAZY, model=double, inputs=INPUTS)
    model = run_example(LAZY_LATER)[0]["neuron_model"]
    assert only_status(model).state == "unloaded"
    assert models_on_cores() == [0, 0, 0, 0]
    assert CoreCounter().core_of(lambda: model(INPUTS)) == 0
    assert only_status(model).state == "loaded"
    assert models_on_cores() == [1, 0, 0, 0]
    assert torch.equal(model(INPUTS), torch.tensor([2.0, 4.0]))


def test_async_example_loads_both_models_without_waiting_for_a_use(
    portable_traces,
):
    run_example(ASYNC, model1=double, inputs1=INPUTS, model2=negate, inputs2=INPUTS)
    names = run_example(ASYNC_LATER)[0]
    for model in (names["neuron_model1"], names["neuron_model2"]):
        assert only_status(model).async_load
        assert only_status(model).state in ("loading", "loaded")
    names = run_example(ASYNC_USE, **names, input1=INPUTS, input2=INPUTS)[0]
    assert torch.equal(names["output1"], torch.tensor([2.0, 4.0]))
    assert torch.equal(names["output2"], torch.tensor([-1.0, -2.0]))
    assert models_on_cores() == [1, 1, 0, 0]


def test_example_of_both_flags_delays_the_load_and_loads_in_the_background(
    portable_traces,
):
    run_example(BOTH, model=double, inputs=INPUTS)
    model = run_example(LAZY_LATER)[0]["neuron_model"]
    status = only_status(model)
    assert (status.state, status.lazy_load, status.async_load) == ("unloaded", True, True)
    torch_neuronx.set_neuron_cores(model, start_nc=3)
    assert torch.equal(model(INPUTS), torch.tensor([2.0, 4.0]))
    assert only_status(model).cores == [3]
