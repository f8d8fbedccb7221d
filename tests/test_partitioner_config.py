"""What ``PartitionerConfig`` and a trace with it refuse, and what reaches the subgraphs."""

import json

import pytest
import torch
from partition_helpers import OTHER, Sorter, X, partition, parts, state
from trace_helpers import assert_same

from neuron_ext import PartitionerConfig
from neuron_ext._subgraphs import find_subgraphs


@pytest.fixture(scope="module")
def sorter():
    return Sorter().eval()


# ------------------------------------------------------------------------------- refusals


def _unsupported(x):
    return torch.nonzero(torch.nonzero(x) + 1), torch.relu(x)


def test_too_little_support_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"25.00% .*\(1 of 4\).* asks for 50.00%.*aten::nonzero"):
        partition(_unsupported, X, ())
    traced = partition(_unsupported, X, (), model_support_percentage_threshold=0.25)
    assert_same(traced(OTHER), _unsupported(OTHER))


def test_a_model_that_is_not_supported_at_all_is_refused():
    with pytest.raises(ValueError, match=r"0.00% of the operators of nonzero .*\(0 of 1\)"):
        partition(torch.nonzero, X, ())
    with pytest.raises(ValueError, match=r"no operator of nonzero is left for a subgraph"):
        partition(torch.nonzero, X, (), model_support_percentage_threshold=0)


def test_subgraphs_that_are_too_small_are_refused(sorter):
    traced = partition(sorter, X, min_subgraph_size=2)
    assert parts(traced) == ["neuron_0", "cpu_1", "neuron_2"]
    with pytest.raises(
        ValueError,
        match=r"subgraph neuron_0 of Sorter would hold 2 operator.*aten::linear, aten::relu.* 3",
    ):
        partition(sorter, X, min_subgraph_size=3)
    with pytest.raises(ValueError, match=r"would hold 5 operator"):
        partition(sorter, X, (), min_subgraph_size=6)


def test_too_many_subgraphs_are_refused(sorter):
    assert len(find_subgraphs(partition(sorter, X, max_subgraph_count=2))) == 2
    with pytest.raises(
        ValueError, match=r"cut into 2 subgraphs, and max_subgraph_count allows 1.*aten::sort"
    ):
        partition(sorter, X, max_subgraph_count=1)


def test_a_number_that_depends_on_data_cannot_be_returned():
    for body in (lambda x: (x, torch.nonzero(x).shape[0]), lambda x: (x, x.sum().item())):
        with pytest.raises(ValueError, match=r"returns a number that depends on the values"):
            partition(lambda x, body=body: {"a": body(x)}, X, ())


def test_control_flow_on_data_is_refused():
    with pytest.raises(RuntimeError, match=r"cannot be exported"):
        partition(lambda x: x if x.sum() > 0 else -x, X, ())


def test_a_control_flow_operator_cannot_run_on_the_cpu():
    def func(x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    with pytest.raises(RuntimeError, match=r"higher_order::cond of func cannot run on the CPU"):
        partition(func, X, ())


def test_a_model_with_state_is_refused():
    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count += 1
            return torch.sort(x)[0] * self.count

    model = Counter().eval()
    with pytest.raises(ValueError, match=r"changes its buffer 'count' in place"):
        partition(model, X)
    assert model.count == 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"input_output_aliases": {"x": 0}}, r"input_output_aliases cannot be used together"),
        ({"inline_weights_to_neff": False}, r"inline_weights_to_neff=False cannot be used"),
    ],
)
def test_features_that_do_not_go_together(sorter, keywords, message):
    with pytest.raises(ValueError, match=message):
        partition(sorter, X, traced=keywords)


# ------------------------------------------------------------------------------- the configuration


def test_the_defaults():
    config = PartitionerConfig()
    assert config.trace_kwargs == {}
    assert config.model_support_percentage_threshold == 0.5
    assert (config.min_subgraph_size, config.max_subgraph_count) == (-1, -1)
    assert config.ops_to_partition == frozenset()
    assert config.analyze_parameters == {}
    assert "max_subgraph_count=-1" in repr(config)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"trace_kwargs": ["x"]}, r"trace_kwargs must be a dict or None, got \['x'\]"),
        ({"trace_kwargs": {"target": 1}}, r"trace_kwargs has the unknown key\(s\) 'target'; it"),
        ({"trace_kwargs": {"partitioner_config": None}}, r"unknown key\(s\) 'partitioner_config'"),
        ({"trace_kwargs": {"input_output_aliases": {}}}, r"unknown key\(s\) 'input_output"),
        ({"trace_kwargs": {"compiler": "gcc"}}, r"compiler='gcc' is unknown"),
        ({"trace_kwargs": {"compiler_args": "--nonsense"}}, r"--nonsense"),
        ({"trace_kwargs": {"cpu_backend": 1}}, r"cpu_backend must be True or False, got 1"),
        ({"trace_kwargs": {"compiler_workdir": 3}}, r"trace_kwargs: compiler_workdir must be the"),
        ({"model_support_percentage_threshold": 1.5}, r"threshold must be .*0 to 1, got 1.5"),
        ({"model_support_percentage_threshold": "half"}, r"threshold must be .* got 'half'"),
        ({"model_support_percentage_threshold": True}, r"threshold must be .* got True"),
        ({"model_support_percentage_threshold": float("nan")}, r"threshold must be .* got nan"),
        ({"min_subgraph_size": 0}, r"min_subgraph_size must be .* or -1, got 0"),
        ({"min_subgraph_size": 1.0}, r"min_subgraph_size must be a whole number .*got 1.0"),
        ({"max_subgraph_count": -2}, r"max_subgraph_count must be .*got -2"),
        ({"max_subgraph_count": True}, r"max_subgraph_count must be .*got True"),
        ({"ops_to_partition": "aten::sort"}, r"ops_to_partition must be a set .*got 'aten::sort'"),
        (
            {"ops_to_partition": {"sort"}},
            r"holds 'sort', which names no operator; use .*aten::sort",
        ),
        ({"ops_to_partition": {3}}, r"holds 3, which names no operator"),
        ({"ops_to_partition": {"aten::srot"}}, r"'aten::srot', an operator that PyTorch does not"),
        ({"analyze_parameters": {"cleanup": True}}, r"analyze_parameters has the unknown key\(s\)"),
        (
            {"analyze_parameters": {"max_workers": 0}},
            r"analyze_parameters: max_workers must be .* 0",
        ),
        (
            {"analyze_parameters": {"additional_ignored_ops": {"x"}}},
            r"analyze_parameters: additional_ignored_ops holds 'x'",
        ),
        ({"analyze_parameters": {"compiler_workdir": ""}}, r"compiler_workdir must be the path"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_at_construction(keywords, message):
    with pytest.raises(ValueError, match=message):
        PartitionerConfig(**keywords)


def test_unknown_and_positional_arguments_are_type_errors():
    with pytest.raises(TypeError):
        PartitionerConfig(max_subgraphs=1)
    with pytest.raises(TypeError):
        PartitionerConfig({})


def test_what_trace_and_trace_kwargs_say_must_not_contradict(sorter):
    config = {"trace_kwargs": {"compiler": "inductor"}}
    with pytest.raises(ValueError, match=r"compiler is 'torchscript' for trace and 'inductor' in"):
        partition(sorter, X, **config)
    traced = partition(sorter, X, compiler=None, trace_kwargs={"compiler": "torchscript"})
    assert [state(one)[2]["format"] for one in find_subgraphs(traced)] == ["torchscript"] * 2


def test_trace_kwargs_reach_every_subgraph(sorter, tmp_path):
    traced = partition(
        sorter,
        X,
        trace_kwargs={
            "compiler_workdir": tmp_path / "work",
            "compiler_args": ["--auto-cast", "all", "--auto-cast-type", "bf16"],
        },
        analyze_parameters={"compiler_workdir": tmp_path / "report", "max_workers": 2},
    )
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["neuron_0", "neuron_2"]
    for name in ("neuron_0", "neuron_2"):
        options = json.loads((tmp_path / "work" / name / "options.json").read_text())
        assert options["func"] == f"Sorter_{name}"
        assert options["auto_cast"] == "all"
    report = json.loads((tmp_path / "report" / "analysis.json").read_text())
    assert report["supported_operators"]["aten::sort"] == 1
    assert traced(X).dtype == torch.float32
    torch.testing.assert_close(traced(X), sorter(X).detach(), rtol=0.02, atol=0.1)


def test_an_operator_that_the_model_does_not_call_is_a_warning(sorter, caplog):
    traced = partition(sorter, X, {"aten::topk"})
    assert parts(traced) == []
    assert "ops_to_partition names aten::topk, which Sorter does not call" in caplog.text
