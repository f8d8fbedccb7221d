"""The report of ``analyze``: names, counts and places of operators."""

import copy
import json
import re

import pytest
import torch
from helpers import EXAMPLE, SmallNet, run_python
from trace_helpers import assert_same, state_of

import neuron_ext
import neuron_ext as torch_neuronx

KEYS = [
    "torch_neuronx_version",
    "neuronx_cc_version",
    "support_percentage",
    "supported_operators",
    "unsupported_operators",
]


def matrix_exp(x):
    return torch.linalg.matrix_exp(x)


def loop(x):
    for _ in range(3):
        x = matrix_exp(x)
    return x * 2


def analyze(func, *inputs, **keywords):
    report = neuron_ext.analyze(func, inputs, **keywords)
    assert json.loads(json.dumps(report)) == report
    assert list(report) == KEYS
    return report


# ------------------------------------------------------------------------------- documentation


class MLP(torch.nn.Module):
    """Of the documentation, with smaller layers and the one that it forgot."""

    def __init__(self, input_size=28 * 28, output_size=10, layers=(12, 8)):
        super().__init__()
        self.fc1 = torch.nn.Linear(input_size, layers[0])
        self.relu = torch.nn.ReLU()
        self.fc2 = torch.nn.Linear(layers[0], layers[1])
        self.fc3 = torch.nn.Linear(layers[1], output_size)

    def forward(self, x):
        f1 = self.fc1(x)
        r1 = self.relu(f1)
        f2 = self.fc2(r1)
        r2 = self.relu(f2)
        f3 = self.fc3(r2)
        return torch.log_softmax(f3, dim=1)


def test_the_supported_example_of_the_documentation():
    model = MLP()
    ex_input = torch.rand([32, 784])
    model_support = torch_neuronx.analyze(model, ex_input)
    assert json.loads(json.dumps(model_support, indent=4)) == {
        "torch_neuronx_version": neuron_ext.__version__,
        "neuronx_cc_version": f"inductor (torch {torch.__version__.split('+')[0]})",
        "support_percentage": "100.00%",
        "supported_operators": {"aten::linear": 3, "aten::relu": 2, "aten::log_softmax": 1},
        "unsupported_operators": [],
    }


def test_the_other_example_of_the_documentation():
    def fft(x):
        return torch.fft.fft(x)

    model = fft
    ex_input = torch.arange(4)
    model_support = torch_neuronx.analyze(model, ex_input)
    # What Neuron's compiler cannot do, TorchInductor can: the report says what trace does.
    assert model_support["support_percentage"] == "100.00%"
    assert model_support["supported_operators"] == {"aten::fft_fft": 1}
    traced = neuron_ext.trace(fft, ex_input, compiler="inductor")
    assert state_of(traced)[2]["format"] == "inductor"
    torch.testing.assert_close(traced(ex_input), fft(ex_input))


# ------------------------------------------------------------------------------- the report


def test_what_is_not_supported_is_reported_with_its_place_and_graph():
    report = analyze(matrix_exp, torch.eye(4))
    assert report["support_percentage"] == "0.00%"
    assert report["supported_operators"] == {}
    (one,) = report["unsupported_operators"]
    assert one["kind"] == "aten::linalg_matrix_exp"
    assert one["failureAt"] == "neuronx-cc"
    line = matrix_exp.__code__.co_firstlineno + 1
    assert one["call"] == f"{__file__}({line}): matrix_exp\n"
    value = "Float(4, 4, strides=[4, 1], requires_grad=0, device=cpu)"
    assert one["opGraph"] == (
        f"graph(%neuron_0 : {value}):\n"
        f"  %neuron_1 : {value} = aten::linalg_matrix_exp(%neuron_0)\n"
        "  return (%neuron_1)\n"
    )


def test_a_call_site_is_listed_once_and_counted_each_time():
    report = analyze(loop, torch.eye(4))
    assert report["support_percentage"] == "25.00%"
    assert report["supported_operators"] == {"aten::mul": 1}
    (one,) = report["unsupported_operators"]
    places = [line.rpartition(": ")[2] for line in one["call"].splitlines()]
    assert places == ["matrix_exp", "loop"]


def test_calls_from_two_places_are_listed_twice():
    def func(x):
        one = matrix_exp(x)
        return one, matrix_exp(x + 1)

    report = analyze(func, torch.eye(4))
    first, second = report["unsupported_operators"]
    assert first["kind"] == second["kind"]
    assert report["supported_operators"] == {"aten::add": 1}


def test_shapes_that_depend_on_data_are_no_code():
    def func(x):
        return torch.nonzero(torch.relu(x)), x[x > 0].sum()

    report = analyze(func, EXAMPLE)
    assert report["supported_operators"] == {"aten::relu": 1, "aten::gt": 1}
    assert [(one["kind"], one["failureAt"]) for one in report["unsupported_operators"]] == [
        ("aten::nonzero", "Lowering to HLO"),
        ("aten::index", "Lowering to HLO"),
        ("aten::sum", "Lowering to HLO"),
    ]
    assert report["support_percentage"] == "40.00%"
    assert re.search(r"Long\(u\d+, 2", report["unsupported_operators"][0]["opGraph"])


def test_operators_are_those_before_any_decomposition_and_in_place_ones_too():
    def func(x, y):
        x = torch.nn.functional.layer_norm(x, (3,))
        x += 1
        x.relu_()
        with torch.autocast("cpu", torch.bfloat16):
            z = torch.nn.functional.linear(x, y)
        return torch.nn.functional.gelu(z), torch.rand(2), torch.quantile(x, 0.5), x.split(2, 1)

    report = analyze(func, EXAMPLE, torch.ones(4, 3))
    assert report["supported_operators"] == {
        **{"aten::layer_norm": 1, "aten::add_": 1, "aten::relu_": 1, "aten::linear": 1},
        **{"aten::gelu": 1, "aten::rand": 1, "aten::quantile": 1, "aten::split": 1},
    }
    assert report["support_percentage"] == "100.00%"


def test_a_custom_operator():
    library = torch.library.Library("analyze_test", "DEF")
    try:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        torch.library.register_fake("analyze_test::twice", torch.empty_like, lib=library)
        report = analyze(lambda x: torch.ops.analyze_test.twice(x) + 1, EXAMPLE)
    finally:
        library._destroy()
    (one,) = report["unsupported_operators"]
    assert (one["kind"], one["failureAt"]) == ("analyze_test::twice", "neuronx-cc")


@pytest.mark.parametrize(
    "func",
    [
        lambda x: torch.linalg.inv(x),
        lambda x: torch.linalg.svd(x)[1],
        lambda x: torch.complex(x, x).abs(),
    ],
    ids=["inv", "svd", "complex"],
)
def test_the_report_says_what_the_compiler_says(func):
    report = analyze(func, torch.eye(3) + 1)
    assert report["unsupported_operators"] != []
    with pytest.raises(RuntimeError, match=r"these operators have no native entry point"):
        neuron_ext.trace(func, torch.eye(3) + 1, compiler="inductor")


def test_ignored_operators_are_left_out():
    report = analyze(loop, torch.eye(4), additional_ignored_ops={"aten::linalg_matrix_exp"})
    assert report["support_percentage"] == "100.00%"
    assert report["supported_operators"] == {"aten::mul": 1}
    assert report["unsupported_operators"] == []


def test_the_model_and_the_inputs_stay_as_they_were():
    model = SmallNet()
    before = copy.deepcopy(model.state_dict())
    values = EXAMPLE.clone()
    state = torch.get_rng_state()
    analyze(lambda x: model(x.add_(1)), values)
    assert torch.equal(values, EXAMPLE)
    assert_same(dict(model.state_dict()), dict(before))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_it_needs_no_cpp_compiler(tmp_path):
    code = """
        import torch, neuron_ext
        from helpers import EXAMPLE, SmallNet
        print(neuron_ext.analyze(SmallNet().eval(), EXAMPLE)["support_percentage"])
    """
    assert run_python(code, env={"PATH": str(tmp_path)}).splitlines()[-1] == "100.00%"


# ------------------------------------------------------------------------------- arguments


def test_compiler_workdir_keeps_the_report_and_the_program(tmp_path):
    folder = tmp_path / "deep" / "folder"
    report = analyze(loop, torch.eye(4), compiler_workdir=str(folder))
    assert json.loads((folder / "analysis.json").read_text()) == report
    assert "linalg_matrix_exp" in (folder / "program.txt").read_text()
    other = tmp_path / "other"
    neuron_ext.analyze(loop, torch.eye(4), other, cleanup=True, is_hf_transformers=True)
    assert not other.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"compiler_workdir '.*file' cannot be written"):
        analyze(loop, torch.eye(4), compiler_workdir=tmp_path / "file")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"additional_ignored_ops": "aten::add"}, r"additional_ignored_ops must be a set of"),
        ({"additional_ignored_ops": {"add"}}, r"additional_ignored_ops holds 'add', which names"),
        ({"additional_ignored_ops": None}, r"additional_ignored_ops must be a set .*got None"),
        ({"max_workers": 0}, r"max_workers must be a number from 1 on, got 0"),
        ({"max_workers": "4"}, r"max_workers must be a number from 1 on, got '4'"),
        ({"is_hf_transformers": 1}, r"is_hf_transformers must be True or False, got 1"),
        ({"cleanup": None}, r"cleanup must be True or False, got None"),
        ({"compiler_workdir": 7}, r"compiler_workdir must be the path of a directory, got 7"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        neuron_ext.analyze(loop, torch.eye(4), **keywords)


def test_what_cannot_be_analyzed_is_refused():
    with pytest.raises(TypeError, match=r"func must be a module or another callable, got 3"):
        neuron_ext.analyze(3, EXAMPLE)
    with pytest.raises(TypeError):
        neuron_ext.analyze(loop, torch.eye(4), workers=2)
    with pytest.raises(ValueError, match=r"example_inputs is empty"):
        neuron_ext.analyze(loop, ())
    with pytest.raises(RuntimeError, match=r"loop failed when it was run on the example inputs"):
        neuron_ext.analyze(loop, torch.ones(2, 3))
    with pytest.raises(RuntimeError, match=r"cannot be exported"):
        neuron_ext.analyze(lambda x: x if x.sum() > 0 else -x, EXAMPLE)
    with pytest.raises(RuntimeError, match=r"cannot be exported"):
        neuron_ext.analyze(torch.jit.script(torch.nn.ReLU()), EXAMPLE)
