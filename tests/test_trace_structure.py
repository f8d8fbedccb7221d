"""Structure in is structure out, exactly as eager gives it, whatever the containers and strides."""

import collections
import dataclasses
import functools
import typing

import pytest
import torch
from trace_helpers import COMPILERS, assert_same, copied, loaded, mapped, saved_bytes

import neuron_ext

X = torch.arange(6.0).reshape(2, 3)
Y = 10 - torch.arange(6.0).reshape(2, 3)

IMAGE = torch.arange(96.0).reshape(2, 3, 4, 4) % 7


class Point(typing.NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Nested(typing.NamedTuple):
    point: Point
    scale: torch.Tensor


class ModelOutput(collections.OrderedDict):
    """As of transformers: attributes, and entries of None."""

    def __init__(self, *items, **fields):
        super().__init__(*items, **fields)
        self.__dict__.update(self)


@dataclasses.dataclass
class Record:
    value: torch.Tensor
    extra: torch.Tensor | None = None


class Scale(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]) * factor)

    def forward(self, x):
        return x * self.factor

    def plus(self, x, shift=0):
        return x * self.factor + shift


_scale = Scale(2).eval()


def _closure(module):
    return lambda x: module(x) - 1


class Case(typing.NamedTuple):
    func: typing.Any
    arguments: tuple
    #: What comes out, where it is not what eager returns.
    becomes: typing.Any = lambda output: output


#: What was traced, and other values of the same shapes.
OTHER_VALUES = (torch.clone, lambda t: t.flip(0) if t.dim() else t + 1)


def _mutate(state, x):
    state.add_(x[1])
    state[0] = 7
    return state * 2


CASES = {
    "tensor": Case(lambda x: x * 2 + 1, (X,)),
    "two arguments": Case(lambda x, y: x - y, (X, Y)),
    "tuple in": Case(lambda pair: pair[0] + pair[1], ((X, Y),)),
    "tuple of one": Case(lambda one: (one[0] + 1,), ((X,),)),
    "list in": Case(lambda many: many[0] + many[1] * many[2], ([X, Y, X],)),
    "dict in": Case(lambda d: d["b"] - d["a"], ({"b": X, "a": Y},)),
    "int keys": Case(lambda d: {7: d[3] + 1, -2: d[4]}, ({3: X, 4: Y},)),
    "odd keys": Case(lambda d: {"a b": d["it's"], 'x"\n': d[""]}, ({"it's": X, "": Y},)),
    "named tuple in": Case(lambda p: p.x * p.y, (Point(X, Y),)),
    "ordered dict in": Case(lambda d: d["a"], (collections.OrderedDict(a=X),)),
    "model output in": Case(lambda o: o.logits + 1, (ModelOutput(logits=X),)),
    "tuple out": Case(lambda x: (x + 1, x + 2), (X,)),
    "list out": Case(lambda x: [x + 1, x + 2], (X,)),
    "dict out": Case(lambda x: {"z": x + 1, "a": x + 2}, (X,)),
    "named tuple out": Case(lambda x: Point(x + 1, x.sum()), (X,)),
    "named tuples nested": Case(lambda x: Nested(Point(x, x + 1), x.sum()), (X,)),
    "nested": Case(
        lambda a, b: {"p": [(b["q"][0], a[0])], "r": [(a[1]["s"] + 1, a[0] + b["q"][1])]},
        ((X, {"s": Y}), {"q": [Y, X]}),
    ),
    "lists of lists": Case(lambda x: [[x, x + 1], [x + 2]], (X,)),
    "model output": Case(
        lambda x: ModelOutput(loss=None, logits=x + 1),
        (X,),
        lambda output: {"logits": output["logits"]},
    ),
    "dataclass": Case(lambda x: Record(x + 1), (X,), lambda output: {"value": output.value}),
    "0-dim": Case(lambda x: (x.sum(), x.max()), (X,)),
    "0-dim in": Case(lambda s: s * 2, (torch.tensor(3.0),)),
    "input as output": Case(lambda x, y: (y, x), (X, Y)),
    "view of input": Case(lambda x: (x.t(), x[1], x.reshape(-1)[::2]), (X,)),
    "same tensor twice": Case(lambda x: (lambda y: (y, [y]))(x + 1), (X,)),
    "same argument twice": Case(lambda x, y: x + 2 * y, (X, X)),
    "ignored inputs": Case(lambda x, y, z: z["b"] + 1, (X, Y, {"a": X, "b": Y})),
    "zero-size": Case(lambda x: (x + 1, x.sum(), torch.cat([x, x], 1)), (torch.zeros(0, 3),)),
    "int64": Case(lambda x: (x * 3, x // 2, x == 4), (torch.arange(-3, 6),)),
    "other integers": Case(
        lambda a, b, c: (a + 1, b + 1, c + 200),
        (torch.arange(4).int(), torch.arange(4).to(torch.int16), torch.arange(4).to(torch.uint8)),
    ),
    "bool": Case(lambda m: (~m, m.sum()), (torch.tensor([True, False, True]),)),
    "bfloat16": Case(lambda x: x * 2 + 1, (X.bfloat16(),)),
    "float64": Case(lambda x: x * 2 + 1, (X.double(),)),
    "None": Case(lambda x: (x + 1, None), (X,)),
    "constants": Case(lambda x: (x, 3, "it's", True, -2.5, float("inf")), (X,)),
    "empty containers": Case(lambda x: (x, [], {}, ()), (X,)),
    "constant tensor": Case(lambda x: (x, torch.tensor([1.0, 2.0]), torch.ones(2, 2)), (X,)),
    "module": Case(_scale, (X,)),
    "bound method": Case(_scale.plus, (X,)),
    "partial": Case(functools.partial(_scale.plus, shift=5), (X,)),
    "closure": Case(_closure(_scale), (X,)),
    "partial of a closure": Case(functools.partial(_closure(Scale(3).eval())), (X,)),
    "image": Case(lambda i: torch.conv2d(i, i[:1, :, :2, :2]) + i.amax(), (IMAGE,)),
    "parameters": Case(lambda x: (_scale.factor, _scale.factor[1:], _scale(x)), (X,)),
    "mutated input": Case(_mutate, (X[0], Y)),
}


def _all_cases(*arguments):
    """Every case in one func, for one native compile."""
    return tuple(case.func(*given) for case, given in zip(CASES.values(), arguments, strict=True))


@functools.cache
def _native():
    arguments = tuple(copied(case.arguments) for case in CASES.values())
    return neuron_ext.trace(_all_cases, arguments, compiler="inductor")


def _eager(case, arguments):
    with torch.no_grad():
        return case.becomes(case.func(*arguments))


@pytest.mark.parametrize("name", CASES)
def test_a_trace_returns_what_eager_returns(name):
    case = CASES[name]
    traced = neuron_ext.trace(case.func, copied(case.arguments), compiler="torchscript")
    for module in (traced, loaded(saved_bytes(traced))):
        for values in OTHER_VALUES:
            given = mapped(values, case.arguments)
            assert_same(module(*copied(given)), _eager(case, copied(given)))


@pytest.mark.parametrize("model_first", [True, False])
def test_a_model_and_a_named_tuple_may_have_one_name(model_first):
    name = f"Twin{model_first}"
    pair = collections.namedtuple(name, ["x", "y"])
    model = type(name, (Scale,), {})(3).eval()
    traces = [(model, (X,)), (lambda x: pair(x, x + 1), (X,))]
    for func, arguments in traces if model_first else reversed(traces):
        module = neuron_ext.trace(func, X, compiler="torchscript")
        assert_same(loaded(saved_bytes(module))(*arguments), func(*arguments))


def _check_native(module, change):
    given = [mapped(change, case.arguments) for case in CASES.values()]
    outputs = module(*mapped(change, [case.arguments for case in CASES.values()]))
    assert len(outputs) == len(CASES)
    for (name, case), arguments, got in zip(CASES.items(), given, outputs, strict=True):
        assert_same(got, _eager(case, copied(arguments)), name)


@pytest.mark.parametrize("values", OTHER_VALUES, ids=["traced values", "other values"])
@pytest.mark.parametrize("saved", [False, True], ids=["traced", "loaded"])
def test_native_code_returns_what_eager_returns(saved, values):
    _check_native(loaded(saved_bytes(_native())) if saved else _native(), values)


# ------------------------------------------------------------------------------- strides

STRIDES = {
    "reversed": lambda t: (
        t.permute(tuple(range(t.dim()))[::-1]).clone().permute(tuple(range(t.dim()))[::-1])
    ),
    "every second element": lambda t: torch.stack([t, t], -1)[..., 0],
    "offset": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() > 1 and len(t) else t.clone(),
    "channels last": lambda t: t.clone(
        memory_format=torch.channels_last if t.dim() == 4 else torch.contiguous_format
    ),
    "requires grad": lambda t: t.clone().requires_grad_(t.is_floating_point()),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_the_strides_of_inputs_do_not_matter(strides):
    change = STRIDES[strides]
    for name, case in CASES.items():
        traced = neuron_ext.trace(case.func, copied(case.arguments), compiler="torchscript")
        want = _eager(case, copied(mapped(change, case.arguments)))
        assert_same(traced(*mapped(change, case.arguments)), want, name)


@pytest.mark.parametrize("strides", STRIDES)
def test_the_strides_of_inputs_do_not_matter_to_native_code(strides):
    _check_native(_native(), STRIDES[strides])


@pytest.fixture(params=COMPILERS)
def stateful(request):
    """x, which it changes in place, and its weight, which callers may change."""
    return _stateful(request.param)


@functools.cache
def _stateful(compiler):
    return neuron_ext.trace(_Stateful().eval(), (X.clone(), Y.clone()), compiler=compiler)


class _Stateful(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(4.0).reshape(2, 2))
        self.register_buffer("offset", torch.arange(3.0))

    def forward(self, state, x):
        state.mul_(2).add_(x)
        return state + self.offset, self.weight, self.weight.t()[1], self.offset, self.weight * 2


@pytest.mark.parametrize(
    "strides",
    [
        lambda t: t.clone(),
        lambda t: t.t().clone().t(),
        lambda t: torch.stack([t, t], -1)[..., 1],
        lambda t: torch.cat([t, t])[1:3],
    ],
    ids=["contiguous", "transposed", "sliced", "offset"],
)
def test_an_input_that_is_changed_in_place_changes_for_the_caller(stateful, strides):
    state = strides(X)
    before = state.clone()
    for _ in range(2):
        assert_same(stateful(state, Y)[0], before * 2 + Y + torch.arange(3.0))
        before = before * 2 + Y
        assert torch.equal(state, before)


def test_writing_to_an_output_changes_neither_the_model_nor_the_next_outputs(stateful):
    weight, offset = torch.arange(4.0).reshape(2, 2), torch.arange(3.0)
    for module in (stateful, loaded(saved_bytes(stateful))):
        for _ in range(3):
            outputs = module(X.clone(), Y)
            want = (X * 2 + Y + offset, weight, weight.t()[1], offset, weight * 2)
            assert_same(outputs, want)
            for output in outputs:
                output.fill_(-1)


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, None), r"example input y is None of type NoneType; expected a tensor"),
        ((X, "a"), r"example input y is 'a' of type str; expected a tensor"),
        ((X, 3), r"example input y is 3 of type int; expected a tensor.*functools\.partial"),
        ((X, {"k": [X, 2.5]}), r"example input y\['k'\]\[1\] is 2.5 of type float"),
        ((X, {"k": b"no"}), r"example input y\['k'\] is of type builtins.bytes"),
        ((X, []), r"example input y is an empty list; expected at least one tensor"),
        ((X, ()), r"example input y is an empty tuple"),
        ((X, {"k": {}}), r"example input y\['k'\] is an empty dict"),
        ((X, [X, (X,)]), r"example input y: the list has elements of several types \(Tensor, Tup"),
        ((X, {"a": X, "b": [X]}), r"example input y: the dict has values of several types"),
        ((X, ({"a": X, "b": [X]},)), r"example input y\[0\]: the dict has values of several"),
        ((X, {"a": X, 1: X}), r"example input y is a dict with the keys \['a', 1\]; .* one type"),
        ((X, {2.5: X}), r"example input y is a dict with the keys \[2.5\]"),
        ((X, X.to("meta")), r"example input y is on device meta; expected a CPU tensor"),
        ((X, X.to_sparse()), r"example input y is a torch.sparse_coo tensor; expected a dense"),
        ((X,), r"example_inputs holds 1 argument\(s\), which func does not take"),
        ((X, X, X), r"example_inputs holds 3 argument\(s\), which func does not take"),
        ((), r"example_inputs is empty; expected at least one tensor"),
    ],
    ids=str,
)
@pytest.mark.parametrize("compiler", [*COMPILERS, None])
def test_example_inputs_that_cannot_be_traced_are_named(arguments, message, compiler):
    def func(x, y):
        raise AssertionError("never called")

    with pytest.raises(ValueError, match=message):
        neuron_ext.trace(func, arguments, compiler=compiler)


@pytest.mark.parametrize(
    ("func", "message"),
    [
        (lambda x: {"a": x, "b": [x]}, r"output: the dict has values of several types \(List"),
        (lambda x: (x, {"a": x, "b": 1}), r"output\[1\]: the dict has values of several types"),
        (lambda x: [x, (x,)], r"output: the list has elements of several types"),
        (lambda x: [x, None], r"output: the list has elements of several types \(None, Tensor\)"),
        (lambda x: {"k": (x, {1: x, "b": x})}, r"output\['k'\]\[1\] is a dict with the keys"),
        (lambda x: (x, object()), r"output\[1\] of func is of type builtins.object"),
        (lambda x: (x, {x}), r"output\[1\] of func is of type builtins.set"),
        (lambda x: None, r"the output of func is None of type NoneType, without any tensor in"),
        (lambda x: [], r"the output of func is of type builtins.list, without any tensor"),
        (lambda x: x.to_sparse(), r"output tensor 0 of function is on device cpu with layout"),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("compiler", [*COMPILERS, None])
def test_outputs_that_torchscript_has_no_type_for_are_named(func, message, compiler):
    with pytest.raises(ValueError, match=message):
        neuron_ext.trace(func, X, compiler=compiler)
