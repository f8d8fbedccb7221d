"""The key of the compile cache: what differs has another one, what is the same has the same.

Models are exported here, which is quick, and not compiled.
"""

import math
import os

import pytest
import torch
from helpers import EXAMPLE, SmallNet

from neuron_ext import _structure
from neuron_ext.compiler import inductor
from neuron_ext.compiler.args import parse_compiler_args
from neuron_ext.compiler.cache_key import NotKeyableError, compile_key
from neuron_ext.compiler.flat_module import FlatModule, fresh_inputs, run_once
from neuron_ext.compiler.naming import argument_names


def _program(func, example=EXAMPLE, flags=None):
    inputs, tensors = _structure.read_inputs(argument_names(func, 1), [example])
    flat = FlatModule(func, inputs, parse_compiler_args(flags))
    with torch.no_grad():
        run_once(flat, tensors)
        return torch.export.export(flat, fresh_inputs(tensors))


def _key(func, example=EXAMPLE, flags=None):
    return compile_key(_program(func, example, flags), inductor._SETTINGS)


class Affine(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x):
        return x * self.weight


class Pair(torch.nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = torch.nn.Parameter(first), torch.nn.Parameter(second)

    def forward(self, x):
        return x * self.first + self.second


def _next_bit(tensor):
    other = tensor.clone()
    other.view(torch.int32).view(-1)[-1] ^= 1
    return other


_SQUARE = torch.arange(9.0).reshape(3, 3)
_ONES = torch.ones(3, 3)
_ROW = torch.ones(3)
_DIFFERENT = {
    "weight": (Affine(_SQUARE), Affine(_next_bit(_SQUARE))),
    "weight's sign of zero": (Affine(torch.zeros(3)), Affine(-torch.zeros(3))),
    "weight's dtype": (Affine(torch.ones(3)), Affine(torch.ones(3, dtype=torch.float64))),
    "weight's shape": (Affine(torch.ones(3)), Affine(torch.ones(1, 3))),
    "weight's strides": (Affine(_ONES), Affine(_ONES.t())),
    "weight's offset": (Affine(torch.ones(6)[:3]), Affine(torch.ones(6)[3:])),
    "sharing": (Pair(_ROW, _ROW), Pair(_ROW, _ROW.clone())),
    "constant": (lambda x: x + torch.tensor([1.0]), lambda x: x + torch.tensor([2.0])),
    "literal": (lambda x: x + 1, lambda x: x + 2),
    "literal's type": (lambda x: x * 2, lambda x: x * 2.0),
    "sign of zero": (lambda x: x + 0.0, lambda x: x + -0.0),
    "literal that is no number": (lambda x: x + math.nan, lambda x: x + math.inf),
    "operator": (lambda x: x + 1, lambda x: x - 1),
    "overload": (lambda x: x.sum(), lambda x: x.sum(0)),
    "dimension": (lambda x: x.sum(0), lambda x: x.sum((0, 1))),
    "dtype": (lambda x: x.to(torch.float64), lambda x: x.to(torch.float16)),
    "order": (lambda x: x - x.sin(), lambda x: x.sin() - x),
    "outputs": (lambda x: (x.sin(), x.cos()), lambda x: (x.cos(), x.sin())),
    "unused output": (lambda x: x.sin(), lambda x: (x.sin(), x.sin())),
    "mutation": (lambda x: x.add(1), lambda x: x.add_(1)),
    "branch": (
        lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)),
        lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 2, (x,)),
    ),
}


@pytest.mark.parametrize("pair", _DIFFERENT.values(), ids=_DIFFERENT)
def test_programs_that_differ_have_other_keys(pair):
    first, second = [_key(func, _SQUARE) for func in pair]
    assert first != second


def _one_more(x):
    return x + 1


def test_the_same_program_has_the_same_key():
    assert _key(SmallNet().eval()) == _key(SmallNet().eval())
    assert _key(_one_more) == _key(lambda other_name: other_name + 1)
    assert _key(_one_more, EXAMPLE) == _key(_one_more, EXAMPLE.t().contiguous().t())
    assert _key(_one_more, EXAMPLE) == _key(_one_more, EXAMPLE * 2)


def test_inputs_are_part_of_the_key():
    def func(x):
        return x + x

    examples = (EXAMPLE, EXAMPLE[:1], EXAMPLE.double(), EXAMPLE.reshape(-1))
    assert len({_key(func, one) for one in examples}) == len(examples)


def test_options_and_settings_are_part_of_the_key(monkeypatch, tmp_path):
    from torch._inductor import config

    program = _program(SmallNet().eval())

    def key(settings=None):
        return compile_key(program, {**inductor._SETTINGS, **(settings or {})})

    keys = {"as it is": key()}
    for flags in ("--auto-cast matmult", "--auto-cast all"):
        keys[flags] = _key(SmallNet().eval(), flags=flags)
    for level in (1, 3):
        keys[f"-O{level}"] = key(inductor._BY_OPTLEVEL[level])
    for name, value in {
        "epilogue_fusion": not config.epilogue_fusion,
        "cpp.simdlen": 256,
        "_use_fp64_for_unbacked_floats": not config._use_fp64_for_unbacked_floats,
    }.items():
        with config.patch({name: value}):
            keys[name] = key()
    for name in ("TORCHINDUCTOR_OF_LATER", "ATEN_CPU_CAPABILITY", "CPATH", "ONEDNN_MAX_CPU_ISA"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "default")
            keys[name] = key()
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        keys["another compiler"] = key()
        os.utime(compiler, (1, 1))
        keys["a compiler of another time"] = key()
        compiler.unlink()
        keys["no compiler"] = key()
    torch.set_num_threads(torch.get_num_threads() + 1)
    keys["threads"] = key()
    torch.set_num_threads(torch.get_num_threads() - 1)
    torch.use_deterministic_algorithms(True)
    keys["deterministic"] = key()
    torch.use_deterministic_algorithms(False)
    assert sorted(set(keys.values())) == sorted(keys.values()), keys

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NOTHING_TO_DO_WITH_IT", "1")
    with config.patch({"compile_threads": 7, "trace.debug_dir": "elsewhere"}):
        assert key() == keys["as it is"]


@torch.library.custom_op("neuron_ext_test::twice", mutates_args=())
def _twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@_twice.register_fake
def _(x):
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("func", "why"),
    [
        (_twice, r"it calls neuron_ext_test.twice.default, which may change"),
        (lambda x: x.nonzero(), r"dimensions without a fixed size|value of type SymInt"),
    ],
    ids=["custom operator", "open dimension"],
)
def test_what_cannot_be_told_from_something_else_has_no_key(func, why):
    with pytest.raises(NotKeyableError, match=why):
        _key(func)


def test_functions_hooked_into_torchinductor_have_no_key():
    from torch._inductor import config

    program = _program(SmallNet().eval(), EXAMPLE)
    with (
        config.patch({"post_grad_custom_pre_pass": lambda graph: graph}),
        pytest.raises(NotKeyableError, match="setting post_grad_custom_pre_pass is a function"),
    ):
        compile_key(program, inductor._SETTINGS)
