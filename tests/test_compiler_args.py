"""Options of trace: its compiler, the flags of that, and what it keeps on disk."""

import io
import json
import logging
import os

import pytest
import torch
from helpers import EXAMPLE, SmallNet, expected, run_python, trace_small_net
from trace_helpers import assert_same, loaded, saved_bytes, state_of

import neuron_ext


@pytest.fixture
def lines(caplog):
    """(level, text) of each line logged so far by neuron_ext."""
    caplog.set_level(logging.INFO, "neuron_ext")
    return lambda: [
        (one.levelname, one.getMessage()) for one in caplog.records if one.name == "neuron_ext"
    ]


# ------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flag", "level"),
    [
        ("--framework XLA", "INFO"),
        ("--target inf2", "INFO"),
        ("--target=trn1", "INFO"),
        ("--model-type transformer", "INFO"),
        ("--distribution-strategy llm-training", "INFO"),
        ("--logical-nc-config 2", "INFO"),
        ("-lnc 1", "INFO"),
        ("-lnc2", "INFO"),
        ("--native-int64 enabled", "INFO"),
        ("--native-int64 disabled", "WARNING"),
        ("--implicit-integer-downcast none", "INFO"),
        ("--implicit-integer-downcast dot,pow", "WARNING"),
        ("--enable-mixed-precision-accumulation", "INFO"),
        ("--disable-mixed-precision-accumulation", "WARNING"),
        ("--enable-saturate-infinity", "WARNING"),
        ("--enable-fast-context-switch", "INFO"),
        ("--enable-fast-loading-neuron-binaries", "INFO"),
        ("--enable-experimental-O1", "INFO"),
        ("--logfile 'a file.txt'", "INFO"),
        ("--output=model.neff", "INFO"),
        ("--auto-cast-type bf16", "WARNING"),
        ("--auto-cast all --auto-cast-type tf32", "WARNING"),
    ],
)
def test_a_flag_without_effect_is_accepted_with_one_log_line(flag, level, lines):
    assert_same(trace_small_net(compiler_args=flag)(EXAMPLE), expected())
    ((logged, text),) = lines()
    assert logged == level
    assert text.startswith(f"compiler flag {_long_name(flag)}")
    assert " has no effect: " in text


def _long_name(flag):
    name = flag.removeprefix("--auto-cast all ").replace("=", " ").split()[0]
    return "--logical-nc-config" if name.startswith("-lnc") else name


@pytest.mark.parametrize(
    "flags",
    [
        None,
        "",
        [],
        (),
        "-O1",
        "-O 3",
        "-O=2",
        "--optlevel 1",
        ["--optlevel", "3"],
        ["--optlevel=3", "-O1"],
        "--auto-cast none",
        "--auto-cast matmult --auto-cast-type bf16",
        "--verbose error",
        "--portable-graph",
        ["--auto-cast matmult", "--auto-cast=none"],
    ],
    ids=str,
)
def test_a_flag_with_effect_is_accepted_without_a_log_line(flags, lines):
    assert_same(trace_small_net(compiler_args=flags)(EXAMPLE), expected())
    assert lines() == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--auto-cats all", r"unknown flag '--auto-cats'; known flags are --auto-cast, "),
        ("-X", r"unknown flag '-X'"),
        ("-O4", r"-O cannot be '4'; allowed values are 1, 2, 3"),
        ("-Ofast", r"unknown flag '-Ofast'"),
        ("--optlevel=0", r"--optlevel cannot be '0'; allowed values are 1, 2, 3"),
        ("--auto-cast", r"--auto-cast needs a value; allowed values are none, matmult, all"),
        ("--auto-cast --verbose info", r"--auto-cast needs a value"),
        (
            "--auto-cast most",
            r"--auto-cast cannot be 'most'; allowed values are none, matm",
        ),
        ("--auto-cast-type fp64", r"--auto-cast-type cannot be 'fp64'; allowed values are bf16"),
        ("--portable-graph=yes", r"--portable-graph takes no value, got 'yes'; write just"),
        ("--verbose loud", r"--verbose cannot be 'loud'"),
        ("--logfile=", r"--logfile needs a value that is not empty"),
        ("--implicit-integer-downcast dot,cot", r"cannot be 'dot,cot'.*all_reduce, dot"),
        ("matmult", r"'matmult' is not a flag; expected a word that begins with '-'"),
        ("--target 'trn1", r"cannot split \"--target 'trn1\" into words .*check its quotes"),
        (3, r"compiler_args must be a string or a list of strings, got 3 of type int"),
        (["-O1", 2], r"must be a string or a list of strings, got \['-O1', 2\] of type list"),
        (b"-O1", r"must be a string or a list of strings, got b'-O1' of type bytes"),
    ],
    ids=range(18),
)
@pytest.mark.parametrize("compiler", ["torchscript", "inductor"])
def test_a_flag_that_is_wrong_is_refused(flags, message, compiler):
    with pytest.raises(ValueError, match=message):
        trace_small_net(compiler_args=flags, compiler=compiler)


def test_verbose_decides_which_lines_show(capfd):
    code = """
    import helpers, sys
    helpers.trace_small_net(compiler_args=sys.argv[1] + " --target trn1 --native-int64 disabled")
    """
    shown = {}
    for level in ("info", "warning", "error"):
        process = run_python(code, f"--verbose {level}", returncode=None)
        assert process.returncode == 0
        text = [line for line in process.stderr.splitlines() if "neuron_ext" in line]
        shown[level] = [line.split(":")[1].strip() for line in text]
    assert shown == {"info": ["INFO", "WARNING"], "warning": ["WARNING"], "error": []}


# ------------------------------------------------------------------------------- auto-cast


class Products(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(64, 64, generator=generator))

    def forward(self, x):
        return {"product": x @ self.weight, "shifted": x + 1 / 3, "count": (x > 0).sum()}


_PRODUCTS_INPUT = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))


def _check_cast(outputs, *, cast_inputs=False):
    eager = Products()(_PRODUCTS_INPUT)
    assert {key: value.dtype for key, value in outputs.items()} == {
        "product": torch.float32,
        "shifted": torch.float32,
        "count": torch.int64,
    }
    # bfloat16 keeps 8 bits; the sums are of 64 products of about 1.
    torch.testing.assert_close(outputs["product"], eager["product"], rtol=0.02, atol=0.15)
    assert not torch.equal(outputs["product"], eager["product"])
    assert torch.equal(outputs["shifted"], eager["shifted"]) is not cast_inputs
    torch.testing.assert_close(outputs["shifted"], eager["shifted"], rtol=0.02, atol=0.02)
    assert torch.equal(outputs["count"], eager["count"])


def test_auto_cast_matmult_computes_products_in_bfloat16_in_native_code(tmp_path):
    traced = neuron_ext.trace(
        Products().eval(),
        _PRODUCTS_INPUT,
        compiler="inductor",
        compiler_args="--auto-cast matmult --auto-cast-type bf16 -O1",
        compiler_workdir=tmp_path,
    )
    for module in (traced, loaded(saved_bytes(traced))):
        with torch.no_grad():
            _check_cast(module(_PRODUCTS_INPUT))
    weights = state_of(traced)[5]["weights"].numel()
    assert 64 * 64 * 2 <= weights < 64 * 64 * 4  # in bfloat16

    assert sorted(os.listdir(tmp_path)) == [
        "kernel.cpp",
        "model.so",
        "options.json",
        "program.txt",
        "weights.blob",
        "wrapper.cpp",
    ]
    assert (tmp_path / "model.so").read_bytes() == state_of(traced)[5]["code"].numpy().tobytes()
    assert (tmp_path / "weights.blob").stat().st_size == weights
    options = json.loads((tmp_path / "options.json").read_text())
    assert options["format"] == "inductor"
    assert options["auto_cast"] == "matmult"
    assert options["cast_dtype"] == "torch.bfloat16"
    assert options["optlevel"] == 1
    settings = options["inductor_settings"]
    assert settings["aot_inductor.compile_wrapper_opt_level"] == "O0"


class OneInput(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, width) for width in (32, 32, 48))

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers)


@pytest.mark.parametrize(("flags", "products"), [("-O1", 1), ("-O1 --auto-cast matmult", 3)])
def test_products_of_one_input_are_one_unless_cast(tmp_path, flags, products):
    torch.manual_seed(0)
    # More rows than products of few rows have.
    model, x = OneInput().eval(), torch.randn(257, 64)
    traced = neuron_ext.trace(
        model, x, compiler="inductor", compiler_args=flags, compiler_workdir=tmp_path
    )
    with torch.no_grad():
        for found, wanted in zip(traced(x), model(x), strict=True):
            tolerance = 1e-5 if products == 1 else 0.05
            torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
    assert (tmp_path / "wrapper.cpp").read_text().count("_linear_pointwise(") == products


@pytest.mark.parametrize(
    ("flags", "cast_inputs"),
    [
        ("--auto-cast matmult", False),
        ("--auto-cast=matmult --auto-cast-type=fp16", False),
        ("--auto-cast all", True),
    ],
)
def test_auto_cast_in_portable_graphs(flags, cast_inputs):
    traced = neuron_ext.trace(
        Products().eval(), _PRODUCTS_INPUT, compiler="torchscript", compiler_args=flags
    )
    _check_cast(traced(_PRODUCTS_INPUT), cast_inputs=cast_inputs)


# ------------------------------------------------------------------------------- options


@pytest.mark.parametrize("compiler", ["gcc", "", "INDUCTOR", 3], ids=str)
def test_an_unknown_compiler_is_refused(compiler):
    with pytest.raises(ValueError, match=r"compiler=.* is unknown; expected one of 'inductor', "):
        trace_small_net(compiler=compiler)


def test_the_compiler_of_real_neuroncores_is_refused_with_what_works_instead():
    with pytest.raises(RuntimeError, match=r"'neuronx-cc' is not available .*'inductor' or 'torch"):
        trace_small_net(compiler="neuronx-cc")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"inline_weights_to_neff": 1}, r"inline_weights_to_neff must be True or False, got 1"),
        ({"cpu_backend": None}, r"cpu_backend must be True or False, got None"),
        ({"input_output_aliases": [1]}, r"input_output_aliases must be a dict .*, got \[1\]"),
        (
            {"partitioner_config": {}},
            r"partitioner_config must be a PartitionerConfig",
        ),
    ],
    ids=str,
)
def test_options_of_the_wrong_type_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        trace_small_net(**option)


def test_harmless_options_are_accepted():
    traced = trace_small_net(
        cpu_backend=True,
        inline_weights_to_neff=True,
        input_output_aliases={},
        partitioner_config=None,
    )
    assert_same(traced(EXAMPLE), expected())


@pytest.mark.parametrize("func", [None, 3, "torch.relu", EXAMPLE], ids=str)
def test_what_cannot_be_called_is_refused(func):
    with pytest.raises(TypeError, match=r"func must be a module or another callable, got "):
        neuron_ext.trace(func, EXAMPLE)


# ------------------------------------------------------------------------------- on disk


def test_compiler_workdir_keeps_what_the_compiler_wrote(tmp_path):
    workdir = tmp_path / "deep" / "folder"
    traced = neuron_ext.trace(
        SmallNet().eval(),
        EXAMPLE,
        compiler="torchscript",
        compiler_workdir=workdir,
        compiler_args=["--target", "trn1"],
    )
    assert sorted(os.listdir(workdir)) == ["graph.pt", "options.json"]
    graph = (workdir / "graph.pt").read_bytes()
    assert graph == bytes(state_of(traced)[5]["graph"].tolist())
    assert_same(torch.jit.load(io.BytesIO(graph))(EXAMPLE), (expected(),))
    options = json.loads((workdir / "options.json").read_text())
    assert options["func"] == "SmallNet"
    assert options["format"] == "torchscript"
    assert options["torch_version"] == torch.__version__
    assert options["compiler_args"] == ["--target", "trn1"]


@pytest.mark.parametrize("bad", [3, "", b"", ["a"]], ids=str)
def test_a_compiler_workdir_that_is_no_path_is_refused(bad):
    with pytest.raises(ValueError, match=r"compiler_workdir must be the path of a directory, got"):
        trace_small_net(compiler_workdir=bad)


def test_a_compiler_workdir_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=r"compiler_workdir '.*file' is a file"):
        trace_small_net(compiler_workdir=file)
    with pytest.raises(RuntimeError, match=r"compiler_workdir '.*' cannot be made: .*choose anoth"):
        trace_small_net(compiler_workdir=file / "below")
