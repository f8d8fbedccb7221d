"""What trace does to func and to the process, and where the ScriptModule can go."""

import copy
import functools
import gc
import importlib
import logging
import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from helpers import EXAMPLE, SmallNet, expected, only_status, run_python, save, trace_small_net
from trace_helpers import COMPILERS, assert_same, loaded, saved_bytes, state_of

import neuron_ext


class Mixed(torch.nn.Module):
    """Layers in different modes, a frozen parameter, and random numbers that do not show."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.drop = torch.nn.Dropout(0.5)
        self.first.weight.requires_grad_(False)
        self.eval()
        self.first.train()

    def forward(self, x):
        return self.drop(self.norm(self.first(x))) + torch.rand(1) * 0


def _of_module(module):
    return (
        [(name, part.training, sorted(vars(part))) for name, part in module.named_modules()],
        [
            (name, id(p), p.requires_grad, p.grad, p._version)
            for name, p in module.named_parameters()
        ],
        [(name, id(b), b._version) for name, b in module.named_buffers()],
        [tensor.tolist() for tensor in (*module.parameters(), *module.buffers())],
    )


def _of_process():
    from torch._inductor import config

    temporary = Path(tempfile.gettempdir())
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "threads": torch.get_num_threads(),
        "random": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "level": logging.getLogger("neuron_ext").level,
        "settings": {**config.save_config_portable(), "_cache_config_ignore_prefix": 0},
        "folder": os.getcwd(),
        "files": sorted(path.name for path in temporary.glob("neuron_ext-*")),
    }


@pytest.mark.parametrize("compiler", COMPILERS)
def test_trace_leaves_func_the_inputs_and_the_process_as_they_were(compiler, tmp_path, monkeypatch):
    # A temporary folder for this test alone. TorchInductor's headers, which take long to compile,
    # stay where they are: it looks where that is when it is imported.
    codecache = importlib.import_module("torch._inductor.codecache")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", codecache.cache_dir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, x = Mixed(), EXAMPLE.clone().t().contiguous().t()
    torch.set_num_threads(3)
    with torch.inference_mode(compiler == "inductor"):
        before = _of_module(model), _of_process()
        traced = neuron_ext.trace(model, x, compiler=compiler, compiler_args="--verbose error")
        after = _of_module(model), _of_process()
    assert after[0] == before[0]
    for name, value in before[1].items():
        assert after[1][name] == value, name
    assert torch.equal(x, EXAMPLE)
    assert x._version == 0
    assert not x.is_contiguous()
    torch.testing.assert_close(traced(x), model(x), rtol=1e-6, atol=1e-6)


def test_a_trace_that_fails_leaves_the_module_and_the_process_as_they_were():
    class Counting(Mixed):
        def forward(self, x):
            self.norm.num_batches_tracked += 1
            return super().forward(x)

    model = Counting()
    before = _of_module(model), _of_process()
    with pytest.raises(ValueError, match=r"changes its buffer 'norm.num_batches_tracked' in place"):
        neuron_ext.trace(model, EXAMPLE, compiler="torchscript")
    assert (_of_module(model), _of_process()) == before


# ------------------------------------------------------------------------------- callables


class Caller:
    """Not a module, but holds one."""

    def __init__(self):
        self.net = SmallNet(2).eval()

    def __call__(self, x, scale=1):
        return self.net(x) * scale

    def method(self, x):
        return self.net(x) * 3


def _decorated(func):
    @functools.wraps(func)
    def wrapper(*arguments):
        return func(*arguments)

    return wrapper


_net = SmallNet().eval()


@_decorated
def decorated(x):
    return _net(x)


@pytest.mark.parametrize(
    ("func", "want", "name"),
    [
        (SmallNet().eval(), expected(), "SmallNet"),
        (decorated, expected(), "decorated"),
        (Caller(), expected(shift=2), "Caller"),
        (Caller().method, expected(shift=2) * 3, "Caller_method"),
        (functools.partial(Caller(), scale=2), expected(shift=2) * 2, "Caller"),
        (functools.partial(functools.partial(_net)), expected(), "SmallNet"),
        (lambda x: _net(x), expected(), "function"),
        (_net.forward, expected(), "SmallNet_forward"),
        (torch.relu, EXAMPLE, "relu"),
        (torch.nn.Sequential(SmallNet().eval(), torch.nn.ReLU()), expected(), "Sequential"),
    ],
    ids=range(10),
)
def test_any_callable_can_be_traced(func, want, name):
    traced = neuron_ext.trace(func, EXAMPLE, compiler="torchscript")
    assert_same(traced(EXAMPLE), want)
    assert only_status(traced).name == name
    assert not traced.training
    assert not _save_and_load(traced).training


def test_the_result_keeps_nothing_of_the_model_it_was_traced_from():
    model = SmallNet().eval()
    traced = neuron_ext.trace(model, EXAMPLE, compiler="torchscript")
    model.weight.data.zero_()
    assert_same(traced(EXAMPLE), expected())


@pytest.mark.parametrize("compiler", [None, "torchscript"])
def test_a_scriptmodule_can_be_traced(compiler, caplog):
    scripted = torch.jit.script(SmallNet().eval())
    with caplog.at_level(logging.INFO, "neuron_ext"):
        traced = neuron_ext.trace(scripted, EXAMPLE, compiler=compiler)
    assert_same(traced(EXAMPLE), expected())
    assert state_of(traced)[2]["format"] == "torchscript"
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [] if compiler else len(lines) == 1
    assert all("it is or holds a ScriptModule" in line for line in lines)


def test_native_code_cannot_be_made_of_a_scriptmodule():
    holder = torch.nn.Sequential(torch.jit.script(SmallNet().eval()))
    with pytest.raises(RuntimeError, match=r"holds a ScriptModule.*compiler='torchscript' works"):
        neuron_ext.trace(holder, EXAMPLE, compiler="inductor")


def test_a_model_in_training_mode_is_traced_with_a_warning(caplog):
    model = torch.nn.Sequential(SmallNet(), torch.nn.Dropout(0.0))
    traced = neuron_ext.trace(model, EXAMPLE, compiler="torchscript")
    assert_same(traced(EXAMPLE), expected())
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "Sequential is traced in training mode, with Dropout active; "
        "call model.eval() before tracing for inference"
    )
    assert model.training
    assert model[1].training


# ------------------------------------------------------------------------------- cores


@pytest.mark.usefixtures("idle_cores")
def test_a_fresh_trace_takes_no_core_before_its_first_use():
    traced = trace_small_net()
    assert only_status(traced).state == "unloaded"
    assert [core.models for core in neuron_ext.core_stats()] == [0, 0, 0, 0]
    traced(EXAMPLE)
    assert only_status(traced).state == "loaded"
    assert [core.models for core in neuron_ext.core_stats()] == [1, 0, 0, 0]


@pytest.mark.usefixtures("idle_cores")
def test_a_module_traced_in_a_context_is_first_placed_there_and_saved_without_it():
    with neuron_ext.neuron_cores_context(2, 2):
        traced = trace_small_net()
    data = saved_bytes(traced)
    traced(EXAMPLE)
    assert only_status(traced).cores == [2, 3]
    assert only_status(loaded(data)).cores == [0]


@pytest.mark.usefixtures("idle_cores")
def test_a_module_that_was_asked_about_is_freed_with_its_last_reference():
    traced = trace_small_net()
    traced(EXAMPLE)
    holder = torch.nn.Sequential(traced)
    assert only_status(traced).cores == only_status(holder).cores == [0]
    neuron_ext.wait(traced)
    del traced, holder
    gc.collect()
    assert [core.models for core in neuron_ext.core_stats()] == [0, 0, 0, 0]


# ------------------------------------------------------------------------------- TorchScript


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 1


class Twice(torch.nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x):
        return self.first(x) + self.second(x)


def _save_and_load(module):
    return loaded(saved_bytes(module))


@pytest.fixture(params=COMPILERS)
def file(request):
    """A saved `SmallNet` of each compiler."""
    fixture = {"torchscript": "torchscript_file", "inductor": "native_file"}[request.param]
    return request.getfixturevalue(fixture)


@pytest.mark.parametrize(
    ("change", "added"),
    [
        (lambda module: module, 0),
        (_save_and_load, 0),
        (lambda module: _save_and_load(_save_and_load(module)), 0),
        (copy.deepcopy, 0),
        (copy.copy, 0),
        (torch.jit.freeze, 0),
        (lambda module: _save_and_load(torch.jit.freeze(module)), 0),
        (lambda module: torch.jit.script(Wrapper(module).eval()), 1),
        (lambda module: torch.jit.trace(Wrapper(module).eval(), EXAMPLE), 1),
        (lambda module: torch.jit.freeze(torch.jit.script(Wrapper(module).eval())), 1),
        (lambda module: _save_and_load(torch.jit.script(Wrapper(module).eval())), 1),
        (lambda module: copy.deepcopy(Wrapper(module)), 1),
        (lambda module: torch.jit.optimize_for_inference(module), 0),
        (lambda module: module.to(torch.float64).cpu().train().eval(), 0),
    ],
    ids=range(14),
)
def test_the_scriptmodule_goes_where_scriptmodules_go(file, change, added):
    module = change(torch.jit.load(str(file)))
    assert_same(module(EXAMPLE), expected() + added)
    assert_same(module(EXAMPLE + 1), expected(EXAMPLE + 1) + added)


def test_modules_of_one_name_stand_in_one_model():
    both = torch.jit.script(Twice(trace_small_net(), trace_small_net(shift=3)).eval())
    for module in (both, _save_and_load(both), copy.deepcopy(both)):
        assert_same(module(EXAMPLE), expected() + expected(shift=3))
        assert len(neuron_ext.status(module)) == 2


def test_every_kind_of_saved_file_runs_in_a_process_that_only_imports_the_package(file, tmp_path):
    wrapper = save(torch.jit.script(Wrapper(torch.jit.load(str(file)))), tmp_path / "wrapper.pt")
    structured = neuron_ext.trace(
        lambda a, b: {"sum": [a + b["y"]], "first": [a]},
        (EXAMPLE, {"y": EXAMPLE}),
        compiler="torchscript",
    )
    code = """
    import io, pathlib, sys
    import torch
    import neuron_ext
    first, second, third = map(pathlib.Path, sys.argv[1:])
    x = torch.arange(6.0).reshape(2, 3)
    print(torch.jit.load(first)(x).tolist())
    with open(first, "rb") as stream:
        print(torch.jit.load(stream)(x).tolist())
    print(torch.jit.load(str(second))(x).tolist())
    print({key: value[0].tolist() for key, value in torch.jit.load(third)(x, {"y": x}).items()})
    print(sorted(name for name in sys.modules if name.startswith("torch._inductor.codegen")))
    """
    printed = run_python(code, file, wrapper, save(structured, tmp_path / "structured.pt"))
    plain = expected().tolist()
    assert printed.splitlines() == [
        str(plain),
        str(plain),
        str((expected() + 1).tolist()),
        str({"sum": (EXAMPLE * 2).tolist(), "first": EXAMPLE.tolist()}),
        "[]",
    ]


def test_a_process_that_imports_no_neuron_ext_is_told_what_is_missing(torchscript_file):
    code = "import sys, torch; torch.jit.load(sys.argv[1])"
    process = run_python(code, torchscript_file, returncode=None)
    assert process.returncode == 1
    assert "torch.classes.neuron_ext.NeuronSubgraph" in process.stderr
    assert "Unknown" in process.stderr
