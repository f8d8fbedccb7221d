"""What trace says and does where func, the machine or the compiler cannot do it."""

import logging

import pytest
import torch
from helpers import EXAMPLE, run_python
from trace_helpers import COMPILERS, assert_same, state_of

import neuron_ext


@pytest.fixture
def lines(caplog):
    """The text of each line logged so far by neuron_ext."""
    caplog.set_level(logging.INFO, "neuron_ext")
    return lambda: [one.getMessage() for one in caplog.records if one.name == "neuron_ext"]


# ------------------------------------------------------------------------------- func


class Counter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))


class AddsInPlace(Counter):
    def forward(self, x):
        self.count += 1
        return x + self.count


class Replaces(Counter):
    def forward(self, x):
        self.count = self.count + 1
        return x + self.count


class WritesToParameter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        self.weight.mul_(2)
        return x * self.weight


@pytest.mark.parametrize("compiler", [*COMPILERS, None])
@pytest.mark.parametrize(
    ("model", "changed"),
    [
        (AddsInPlace().eval(), "count"),
        (Replaces().eval(), "count"),
        (torch.nn.Sequential(AddsInPlace()).eval(), "0.count"),
        (torch.nn.BatchNorm1d(3), "running_mean"),
    ],
    ids=["in place", "replaced", "nested", "statistics"],
)
def test_a_model_that_changes_its_state_is_refused_and_stays_as_it_was(model, changed, compiler):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"changes its buffer '{changed}'.* in place.*eval\(\)"):
        neuron_ext.trace(model, EXAMPLE, compiler=compiler)
    assert_same(dict(model.state_dict()), before)


def test_a_model_that_writes_to_a_parameter_is_refused():
    with pytest.raises(ValueError, match=r"changes its parameter 'weight' in place"):
        neuron_ext.trace(WritesToParameter().eval(), EXAMPLE, compiler="torchscript")


@pytest.mark.parametrize("compiler", [*COMPILERS, None])
def test_a_func_that_fails_is_named_with_its_error_and_inputs(compiler):
    def add_wrong(x):
        return x + torch.ones(5)

    with pytest.raises(RuntimeError) as caught:
        neuron_ext.trace(add_wrong, EXAMPLE, compiler=compiler)
    assert str(caught.value) == (
        "add_wrong failed when it was run on the example inputs: RuntimeError: The size of tensor "
        "a (3) must match the size of tensor b (5) at non-singleton dimension 1. Check that it "
        "runs by itself with inputs of x: float32[2, 3]"
    )
    assert type(caught.value.__cause__) is RuntimeError


def _branches(x):
    return x + 1 if x.sum() > 0 else x - 1


def test_control_flow_that_depends_on_values_is_refused_by_inductor_only():
    with pytest.raises(
        RuntimeError, match=r"(?s)_branches cannot be exported .*compiler='torchscript' could"
    ):
        neuron_ext.trace(_branches, EXAMPLE, compiler="inductor")
    traced = neuron_ext.trace(_branches, EXAMPLE, compiler="torchscript")
    assert_same(traced(EXAMPLE), EXAMPLE + 1)


def test_a_structure_that_changes_from_call_to_call_is_refused():
    calls = []

    def func(x):
        calls.append(x)
        return (x, x) if len(calls) > 1 else (x,)

    with pytest.raises(RuntimeError, match=r"func returned another structure when it was traced"):
        neuron_ext.trace(func, EXAMPLE, compiler="torchscript")


# ------------------------------------------------------------------------------- the machine

_TRACE = """
import logging, sys
logging.basicConfig(format="%(levelname)s %(message)s", level="INFO")
import torch, neuron_ext
from helpers import EXAMPLE, SmallNet, expected
model = SmallNet().eval()
try:
    neuron_ext.trace(model, EXAMPLE, compiler="inductor")
except RuntimeError as error:
    print(error)
traced = neuron_ext.trace(model, EXAMPLE)
assert torch.equal(traced(EXAMPLE), expected())
print(traced.subgraph.__getstate__()[0][2]["format"])
"""


def _script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("compiler", ["none", "broken"])
def test_without_a_working_cpp_compiler_torchscript_is_the_default(compiler, tmp_path):
    env = {"PATH": str(tmp_path)}
    why = "the C++ compiler 'g++' was not found in PATH"
    if compiler == "broken":
        env["CXX"] = str(_script(tmp_path / "c++", "echo out of cheese >&2; exit 1\n"))
        why = (
            f"the C++ compiler {env['CXX']!r} cannot compile a small program with OpenMP; it said: "
            "out of cheese"
        )
    process = run_python(_TRACE, env=env, returncode=None)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [
        f"compiler='inductor' cannot be used for SmallNet: {why}. compiler='torchscript' works "
        "without a C++ compiler and takes scripted code",
        "torchscript",
    ]
    logged = [line for line in process.stderr.splitlines() if line.startswith(("INFO", "WARN"))]
    assert logged == [f"WARNING SmallNet is compiled with compiler='torchscript': {why}"]


def test_what_the_cpp_compiler_says_is_in_the_error(tmp_path):
    # Compiles the probe, and refuses what is generated.
    compiler = _script(
        tmp_path / "c++",
        'case "$*" in *probe.cpp*|*--version*) exec g++ "$@";; esac\n'
        "echo out of cheese >&2; exit 1\n",
    )
    code = """
    import sys, tempfile, os
    import torch, neuron_ext
    from helpers import EXAMPLE, SmallNet
    try:
        neuron_ext.trace(SmallNet().eval(), EXAMPLE, compiler_workdir=sys.argv[1])
    except RuntimeError as error:
        print(error)
    """
    workdir = tmp_path / "kept"
    cache = {"CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": tmp_path / "cache"}
    printed = run_python(code, workdir, env=cache)
    assert printed.startswith("compiling SmallNet with compiler='inductor' failed: ")
    assert "out of cheese" in printed
    assert "compiler='torchscript' needs no C++ compiler" in printed
    assert "program.txt" in [path.name for path in workdir.iterdir()]


def test_operators_that_native_code_cannot_call_are_left_to_torchscript(lines):
    def func(x):
        return torch.linalg.matrix_exp(x @ x.t() * 0)

    traced = neuron_ext.trace(func, EXAMPLE)
    assert_same(traced(EXAMPLE), torch.eye(2))
    assert state_of(traced)[2]["format"] == "torchscript"
    assert lines() == [
        "func is compiled with compiler='torchscript': natively compiled code cannot call the "
        "operators aten::linalg_matrix_exp"
    ]
    with pytest.raises(RuntimeError) as caught:
        neuron_ext.trace(func, EXAMPLE, compiler="inductor")
    assert str(caught.value) == (
        "compiler='inductor' cannot compile func: these operators have no native entry point: "
        "aten::linalg_matrix_exp. Use compiler='torchscript' for it"
    )
