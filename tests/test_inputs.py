"""Inputs that do not fit: refused before any native code runs, by name, and nothing breaks."""

import functools
import re

import pytest
import torch
from helpers import only_status
from trace_helpers import COMPILERS, assert_same, loaded, saved_bytes

import neuron_ext

X = torch.arange(6.0).reshape(2, 3)
MASK = torch.tensor([True, False, True])
IDS = torch.arange(3)
SCALE = torch.tensor(2.0)


class Model(torch.nn.Module):
    """Takes every kind of container."""

    def forward(self, x, y, many, pair):
        kept = torch.where(y["mask"], x * 2, x)
        return kept + y["ids"] + many[0] - many[1] + pair[0] + pair[1][0]


def _arguments(**changes):
    given = {"x": X, "mask": MASK, "ids": IDS, "many": [X, X + 1], "pair": (SCALE, [X])}
    given |= changes
    y = {"mask": given["mask"], "ids": given["ids"]}
    return given["x"], y, given["many"], given["pair"]


WANT = torch.where(MASK, X * 2, X) + IDS - 1 + 2 + X


@functools.cache
def _file(compiler):
    traced = neuron_ext.trace(Model().eval(), _arguments(), compiler=compiler)
    return saved_bytes(traced)


@pytest.fixture(params=COMPILERS)
def model(request):
    """A loaded module; after the test it still gives right answers, and has run only for that."""
    module = loaded(_file(request.param))
    yield module
    assert only_status(module).executions == [0]
    assert_same(module(*_arguments()), WANT)
    assert only_status(module).executions == [1]
    assert only_status(module).error == ""


def _flat(arguments):
    x, y, many, pair = arguments
    return [x, *y.values(), *many, pair[0], *pair[1]]


WRONG = {
    "shape": (
        {"x": X[:1]},
        "input 'x' of subgraph 'Model': expected a float32 tensor of shape [2, 3] on cpu, got a "
        "float32 tensor of shape [1, 3] on cpu; a traced module takes what it was traced with",
    ),
    "rank": (
        {"x": X.reshape(-1)},
        "input 'x' of subgraph 'Model': expected a float32 tensor of shape [2, 3] on cpu, got a "
        "float32 tensor of shape [6] on cpu",
    ),
    "same count of elements": (
        {"many": [X, X.reshape(3, 2)]},
        "input 'many[1]' of subgraph 'Model': expected a float32 tensor of shape [2, 3] on cpu, "
        "got a float32 tensor of shape [3, 2] on cpu",
    ),
    "broadcastable": (
        {"pair": (SCALE.reshape(1), [X])},
        "input 'pair[0]' of subgraph 'Model': expected a float32 tensor of shape [] on cpu, got a "
        "float32 tensor of shape [1] on cpu",
    ),
    "empty": (
        {"mask": MASK[:0]},
        "input 'y['mask']' of subgraph 'Model': expected a bool tensor of shape [3] on cpu, got a "
        "bool tensor of shape [0] on cpu",
    ),
    "dtype": (
        {"pair": (SCALE, [X.double()])},
        "input 'pair[1][0]' of subgraph 'Model': expected a float32 tensor of shape [2, 3] on "
        "cpu, got a float64 tensor of shape [2, 3] on cpu",
    ),
    "dtype of the same size": (
        {"mask": MASK.to(torch.uint8)},
        "input 'y['mask']' of subgraph 'Model': expected a bool tensor of shape [3] on cpu, got a "
        "uint8 tensor of shape [3] on cpu",
    ),
    "device": (
        {"mask": MASK.to("meta")},
        "input 'y['mask']' of subgraph 'Model': expected a bool tensor of shape [3] on cpu, got a "
        "bool tensor of shape [3] on meta",
    ),
    "layout": (
        {"x": X.to_sparse()},
        "input 'x' of subgraph 'Model': expected a float32 tensor of shape [2, 3] on cpu, got a "
        "tensor of layout Sparse",
    ),
    "first of several": (
        {"ids": IDS.int(), "x": X.half()},
        "input 'x' of subgraph 'Model': expected a float32 tensor of shape [2, 3] on cpu, got a "
        "float16 tensor",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_tensor_that_does_not_fit_is_refused_by_the_module_with_its_name(model, kind):
    changes, message = WRONG[kind]
    with pytest.raises(RuntimeError) as caught:
        model(*_arguments(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", WRONG)
def test_a_tensor_that_does_not_fit_is_a_valueerror_of_the_operator(model, kind):
    changes, message = WRONG[kind]
    with pytest.raises(ValueError, match=re.escape(message)):
        torch.ops.neuron_ext.forward(_flat(_arguments(**changes)), model.subgraph)


@pytest.mark.parametrize("count", [0, 1, 6, 8])
def test_a_wrong_count_of_tensors_is_a_valueerror_of_the_operator(model, count):
    flat = (_flat(_arguments()) * 2)[:count]
    message = re.escape(
        "subgraph 'Model' takes 7 input tensors (x, y['mask'], y['ids'], many[0], many[1], "
        f"pair[0], pair[1][0]), got {count}"
    )
    with pytest.raises(ValueError, match=f"^{message}(\n|$)"):
        torch.ops.neuron_ext.forward(flat, model.subgraph)


def _call(model, *arguments, **keywords):
    with pytest.raises(Exception) as caught:  # noqa: PT011  # the kinds are TorchScript's own
        model(*arguments, **keywords)
    return type(caught.value), str(caught.value)


def test_a_container_of_another_length_or_other_keys_is_refused_by_name(model):
    x, y, many, pair = _arguments()
    for arguments, message in (
        ((x, y, many[:1], pair), "input many: expected a list of 2 element(s), got 1"),
        ((x, y, [*many, x], pair), "input many: expected a list of 2 element(s), got 3"),
        ((x, y, many, (pair[0], [])), "input pair[1]: expected a list of 1 element(s), got 0"),
        (
            (x, {"mask": MASK}, many, pair),
            "input y: the key 'ids' is missing; expected the keys ['mask', 'ids'], got [mask]",
        ),
        (
            (x, {**y, "more": X}, many, pair),
            "input y: there are keys too many; expected the keys ['mask', 'ids'], "
            "got [mask, ids, more]",
        ),
    ):
        kind, text = _call(model, *arguments)
        assert kind is RuntimeError
        assert message in text


def test_what_torchscript_checks_itself_names_the_argument(model):
    x, y, many, pair = _arguments()
    for arguments, keywords, kind, message in (
        (("x", y, many, pair), {}, RuntimeError, "for argument 'x' but instead found type 'str'"),
        ((x, X, many, pair), {}, RuntimeError, "for argument 'y' but instead found type 'Tensor'"),
        ((x, y, [X, None], pair), {}, RuntimeError, "for argument 'many'"),
        ((x, y, many, (pair[0],)), {}, RuntimeError, "'pair'"),
        ((x, y, many), {}, RuntimeError, "missing value for argument 'pair'"),
        ((x, y, many, pair, x), {}, RuntimeError, "expected at most 5 argument(s) but received 6"),
        ((x, y, many), {"pear": pair}, RuntimeError, "missing value for argument 'pair'"),
    ):
        caught, text = _call(model, *arguments, **keywords)
        assert issubclass(caught, kind), text
        assert message in text


def test_the_operator_takes_tensors_only(model):
    flat = _flat(_arguments())
    for wrong in ([*flat[:-1], "x"], [*flat[:-1], None], "abc", 3):
        with pytest.raises((RuntimeError, TypeError), match=r"neuron_ext::forward"):
            torch.ops.neuron_ext.forward(wrong, model.subgraph)
    with pytest.raises((RuntimeError, TypeError), match=r"neuron_ext::forward"):
        torch.ops.neuron_ext.forward(flat, None)


def test_none_for_a_tensor_is_refused_by_name(model):
    kind, text = _call(model, *_arguments(mask=None))
    assert issubclass(kind, RuntimeError)
    assert "input 'y['mask']' of subgraph 'Model': expected a bool tensor" in text
    assert "of shape [3] on cpu, got None" in text


def test_keywords_and_the_order_of_keys_are_free(model):
    x, y, many, pair = _arguments()
    other = loaded(saved_bytes(model))
    backwards = dict(reversed(y.items()))
    assert list(backwards) == ["ids", "mask"]
    assert_same(other(x, pair=pair, many=many, y=backwards), WANT)


def test_a_refused_call_does_not_load_a_lazy_module(model):
    neuron_ext.lazy_load(model)
    lazy = loaded(saved_bytes(model))
    with pytest.raises(RuntimeError, match=r"input 'x' of subgraph 'Model'"):
        lazy(*_arguments(x=X[:1]))
    assert only_status(lazy).state == "unloaded"
    assert_same(lazy(*_arguments()), WANT)
