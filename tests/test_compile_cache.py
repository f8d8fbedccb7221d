"""The compile cache in traces: what is found again, and what becomes of those who look for it.

`CODE` stands in place of what a compiler would make; such modules are never run.
"""

import logging
import os
import re
from pathlib import Path

import pytest
import torch
from helpers import EXAMPLE, SmallNet
from trace_helpers import assert_same, state_of

import neuron_ext
from neuron_ext._trace import trace_parts
from neuron_ext.compiler import inductor
from neuron_ext.compiler.executable import Constant, NativeCode, UnsupportedOperatorsError

CODE = torch.arange(100, dtype=torch.uint8)
WEIGHTS = torch.arange(64, dtype=torch.uint8)


@pytest.fixture
def lines(caplog):
    """(level, text) of each line logged so far by neuron_ext."""
    caplog.set_level(logging.INFO, "neuron_ext")
    return lambda: [
        (one.levelname, one.getMessage()) for one in caplog.records if one.name == "neuron_ext"
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a compile cache for this test alone."""
    folder = tmp_path / "own"
    monkeypatch.setenv("NEURON_EXT_CACHE_DIR", str(folder))
    return folder


class Compiler:
    """In place of the compiler: takes no time, and knows what it was asked for."""

    def __init__(self):
        self.names = []
        self.few_rows = []
        self.tiled = []
        self.during = lambda: None

    def __call__(self, flat, _program, _settings, _workdir, *, few_rows, tiled):
        self.names.append(flat.name)
        self.few_rows.append(few_rows)
        self.tiled.append(tiled)
        self.during()
        constant = Constant("_frozen_param0", "parts.0.bias", "uint8", "strided", 0, 4, (4,), (1,))
        return NativeCode(CODE.clone(), WEIGHTS.clone(), [constant])


@pytest.fixture
def compiler(monkeypatch):
    compiler = Compiler()
    monkeypatch.setattr(inductor, "compile_native", compiler)
    return compiler


def _trace(func=None, example=EXAMPLE, **options):
    func = SmallNet().eval() if func is None else func
    return neuron_ext.trace(func, example, **{"compiler": "inductor", **options})


def _entries(folder):
    return list(folder.glob("*.entry"))


# ------------------------------------------------------------------------------- hits


@pytest.mark.usefixtures("folder")
def test_a_hit_is_the_first_trace_again(compiler, lines):
    net = SmallNet(1).eval()
    first, second, portable = [
        state_of(
            _trace(
                lambda x, y: (net(x), [y.add_(1)]),
                (EXAMPLE, EXAMPLE),
                compiler_args=f"--verbose info {flags}",
            )
        )
        for flags in ("", "", "--portable-graph")
    ]
    assert compiler.names == ["function"]
    assert first[3]["mutated_inputs"] == [1]
    assert torch.equal(first[5]["code"], CODE)
    assert torch.equal(first[5]["weights"], WEIGHTS)
    assert second[:5] == first[:5]
    assert_same(second[5], first[5])
    graph = portable[5].pop("graph")
    assert graph.numel() > 0
    assert_same(portable[5], first[5])
    assert portable[3:5] == first[3:5]

    said = [text for _, text in lines()]
    key = said[0].split()[-1]
    assert re.fullmatch("[0-9a-f]{64}", key)
    assert said == [f"compile cache: {what}, key {key}" for what in ("miss", "hit", "hit")]


@pytest.mark.usefixtures("folder")
def test_weights_are_packed_for_a_core_however_many_threads_the_caller_has(compiler, monkeypatch):
    threads = []
    compiler.during = lambda: threads.append(torch.get_num_threads())
    for own in (3, 1):
        torch.set_num_threads(own)
        _trace()
        assert torch.get_num_threads() == own
    cpus = len(os.sched_getaffinity(0))
    monkeypatch.setenv("NEURON_EXT_HOST_CORES", "1")
    _trace(SmallNet(1).eval())
    monkeypatch.delenv("NEURON_EXT_HOST_CORES")
    _trace(SmallNet(2).eval())
    # The second of the first two was a hit.
    assert threads == [1, cpus, 1]


@pytest.mark.usefixtures("folder")
def test_nothing_is_said_unless_asked_for(compiler, lines):
    for _ in range(2):
        _trace()
    assert compiler.names == ["SmallNet"]
    assert lines() == []


@pytest.mark.usefixtures("folder")
def test_constants_have_the_names_that_the_caller_knows(compiler):
    net = SmallNet().eval()
    names = [state_of(_trace(func))[4]["constant_fqns"] for func in (net, net, lambda x: net(x))]
    assert compiler.names == ["SmallNet"]
    assert names == [["bias"], ["bias"], ["parts.0.bias"]]


@pytest.mark.usefixtures("folder")
def test_operators_that_native_code_cannot_call_are_found_out_once(compiler, lines):
    def refuse():
        raise UnsupportedOperatorsError(["aten::odd", "aten::even"])

    compiler.during = refuse
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no native entry point: aten::odd, aten::even"):
            _trace()
    assert state_of(_trace(compiler=None))[2]["format"] == "torchscript"
    assert compiler.names == ["SmallNet"]
    assert lines() == [
        (
            "WARNING",
            "SmallNet is compiled with compiler='torchscript': natively compiled code cannot call "
            "the operators aten::odd, aten::even",
        )
    ]


# ------------------------------------------------------------------------------- misses


def test_what_differs_is_compiled(folder, compiler):
    other = SmallNet().eval()
    other.weight.data.view(torch.int32)[0, 0] ^= 1
    for func, flags in ((SmallNet().eval(), ""), (other, ""), (other, "-O1")):
        _trace(func, compiler_args=flags)
    assert compiler.names == ["SmallNet"] * 3
    assert compiler.tiled == [True, True, False]
    assert len(_entries(folder)) == 3


def test_weights_to_be_shared_are_not_those_of_few_rows(folder, compiler):
    for shared in (False, True, True, False):
        trace_parts(
            SmallNet().eval(),
            EXAMPLE,
            compiler_workdir=None,
            compiler_args=None,
            compiler="inductor",
            shared_weights=shared,
        )
    assert compiler.few_rows == [True, False]
    assert len(_entries(folder)) == 2


def test_the_switch_turns_it_off(folder, compiler, monkeypatch):
    monkeypatch.setenv("NEURON_EXT_CACHE", "0")
    for _ in range(2):
        _trace()
    assert compiler.names == ["SmallNet"] * 2
    assert not folder.exists()


def test_a_trace_with_a_workdir_compiles_and_keeps_for_others(folder, compiler, tmp_path):
    _trace(compiler_workdir=tmp_path / "first")
    assert len(_entries(folder)) == 1
    _trace()
    assert compiler.names == ["SmallNet"]
    _trace(compiler_workdir=tmp_path / "second")
    assert compiler.names == ["SmallNet"] * 2
    for name in ("first", "second"):
        assert sorted(os.listdir(tmp_path / name)) == ["options.json", "program.txt"]


def test_a_damaged_entry_is_compiled_again_with_one_line(folder, compiler, lines):
    _trace()
    (entry,) = _entries(folder)
    data = bytearray(entry.read_bytes())
    data[10] ^= 1
    entry.write_bytes(data)
    _trace()
    _trace()
    assert compiler.names == ["SmallNet"] * 2
    ((level, text),) = lines()
    assert level == "WARNING"
    assert text.endswith("is not used and will be replaced: its weights is damaged")


def test_a_compile_that_fails_is_not_kept(folder, compiler):
    def fail():
        raise RuntimeError("out of cheese")

    compiler.during = fail
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of cheese"):
            _trace()
    assert compiler.names == ["SmallNet"] * 2
    assert _entries(folder) == []


def test_weights_that_change_while_they_are_compiled_are_not_kept(folder, compiler):
    net = SmallNet().eval()
    compiler.during = lambda: net.bias.add_(1)
    _trace(net)
    assert _entries(folder) == []


@pytest.mark.usefixtures("folder")
def test_what_has_no_key_compiles_each_time_and_says_so(compiler, lines):
    from torch._inductor import config

    with config.patch({"post_grad_custom_pre_pass": lambda graph: graph}):
        for _ in range(2):
            _trace(compiler_args="--verbose info")
    assert compiler.names == ["SmallNet"] * 2
    said = (
        "INFO",
        "compile cache: not used, since TorchInductor's setting post_grad_custom_pre_pass is a "
        "function",
    )
    assert lines() == [said, said]


# ------------------------------------------------------------------------------- the environment


@pytest.mark.parametrize(
    ("variable", "value", "wanted"),
    [
        ("NEURON_EXT_CACHE", "yes", r"expected 0 \(off\) or 1 \(on\)"),
        ("NEURON_EXT_CACHE", "", r"expected 0 \(off\) or 1 \(on\)"),
        ("NEURON_EXT_CACHE_MAX_GB", "many", "expected a number of gigabytes above 0"),
        ("NEURON_EXT_CACHE_MAX_GB", "0", "expected a number of gigabytes above 0"),
        ("NEURON_EXT_CACHE_MAX_GB", "-1", "expected a number of gigabytes above 0"),
        ("NEURON_EXT_CACHE_MAX_GB", "nan", "expected a number of gigabytes above 0"),
        ("NEURON_EXT_CACHE_MAX_GB", "inf", "expected a number of gigabytes above 0"),
        ("NEURON_EXT_CACHE_DIR", __file__, "which is a file; expected a directory"),
    ],
)
def test_a_value_that_means_nothing_is_refused(variable, value, wanted, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(RuntimeError, match=rf"^{variable} is {re.escape(repr(value))}\W {wanted}"):
        _trace()


def _below_a_file(folder, _monkeypatch):
    folder.parent.joinpath("file").touch()
    return folder.parent / "file" / "below"


def _foreign(folder, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    return folder


def _writable(mode):
    def make(folder, _monkeypatch):
        folder.mkdir()
        folder.chmod(mode)
        return folder

    return make


def _no_home(_folder, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME")
    return ""


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_below_a_file, "cannot be made: Not a directory"),
        (lambda *_: "/proc/neuron_ext", "cannot be made: "),
        (_foreign, "belongs to user "),
        (_writable(0o770), r"can be written by others \(mode 0770\)"),
        (_writable(0o702), r"can be written by others \(mode 0702\)"),
        (_no_home, "there is no home folder"),
    ],
    ids=["below a file", "read only", "foreign", "group", "others", "no home"],
)
def test_a_folder_that_cannot_be_used_is_done_without(
    make, why, tmp_path, monkeypatch, compiler, lines
):
    monkeypatch.setenv("NEURON_EXT_CACHE_DIR", str(make(tmp_path / "folder", monkeypatch)))
    _trace()
    ((level, text),) = lines()
    assert level == "WARNING"
    assert re.fullmatch(
        rf"the compile cache is off: .*{why}.*; set NEURON_EXT_CACHE_DIR to another folder, "
        "or NEURON_EXT_CACHE=0 to do without",
        text,
    )
    assert compiler.names == ["SmallNet"]
    assert list(tmp_path.rglob("*.entry")) == []
