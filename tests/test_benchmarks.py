"""The harness of the benchmark suite: its arithmetic, its processes and its reports."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks is not installed

from benchmarks.harness import plots, report
from benchmarks.harness.measure import (
    in_new_process,
    interleaved,
    resolve,
    rotated,
    rounds_of,
    rows_of,
)
from benchmarks.harness.options import Options, place_of, questions
from benchmarks.harness.table import Row, Sample, Table
from benchmarks.harness.worker import Worker


def make_table(**changes):
    fields = {
        "question": "calls.affine",
        "title": "a call",
        "unit": "us",
        "better": "lower",
        "reference": "peer",
        "subject": "ours",
        "rows": rows_of({"ours": [3.0, 2.0, 4.0], "peer": [2.0, 2.0, 2.0]}, reference="peer"),
        "must": 1.5,
        "aim": 1.25,
        "notes": ["one note"],
    }
    return Table(**{**fields, **changes})


def make_results(*tables):
    return report.Results(
        name="quick",
        date="2030-01-02 03:04 UTC",
        machine={"cpu": "a CPU", "cpu_features": ["avx2"], "cores": 2, "cpus_used": [0, 1]},
        versions={"torch": "2.13.0", "compiler": "g++ 12"},
        settings={"rounds": 3},
        load_before=[0.1, 0.2, 0.3],
        load_after=[1.0, 0.5, 0.3],
        tables=list(tables),
        failures={"other": "Traceback\nRuntimeError: it broke"},
    )


class TestSamples:
    def test_quartiles_interpolate(self):
        assert Sample.of([4.0, 1.0, 3.0, 2.0]) == Sample(2.5, 1.75, 3.25, 4)
        assert Sample.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Sample(3.0, 2.0, 4.0, 5)
        assert Sample.of([7.0]) == Sample(7.0, 7.0, 7.0, 1)

    def test_no_value_is_an_error(self):
        with pytest.raises(ValueError, match="at least one value"):
            Sample.of([])

    def test_ratios_are_of_rounds_not_of_medians(self):
        # The medians are 20 and 10; in each round the ratio is another.
        ours, peer = rows_of({"ours": [10.0, 20.0, 90.0], "peer": [10.0, 5.0, 30.0]}, "peer")
        assert (ours.sample.median, peer.sample.median) == (20.0, 10.0)
        assert (ours.ratio_low, ours.ratio, ours.ratio_high) == (2.0, 3.0, 3.5)
        assert (peer.ratio_low, peer.ratio, peer.ratio_high) == (1.0, 1.0, 1.0)

    def test_differences_are_of_rounds(self):
        ours, _ = rows_of({"ours": [5.0, 7.0], "peer": [4.0, 1.0]}, "peer", "difference")
        assert (ours.ratio_low, ours.ratio, ours.ratio_high) == (2.25, 3.5, 4.75)

    def test_without_reference_there_are_no_ratios(self):
        (row,) = rows_of({"ours": [1.0, 2.0]}, None)
        assert row == Row("ours", Sample(1.5, 1.25, 1.75, 2))

    def test_unknown_comparison(self):
        with pytest.raises(ValueError, match="'ratio' or 'difference'"):
            rows_of({"ours": [1.0]}, None, "value")


class TestInterleaved:
    def test_each_comes_first_in_its_turn(self):
        assert [rotated("abc", n) for n in range(4)] == [
            ["a", "b", "c"],
            ["b", "c", "a"],
            ["c", "a", "b"],
            ["a", "b", "c"],
        ]
        assert rotated([], 3) == []

    def test_order_and_warmup(self):
        seen = []
        subjects = {name: lambda name=name: seen.append(name) or len(seen) for name in "abc"}
        values = rounds_of(subjects, rounds=2, warmup=1)
        assert "".join(seen) == "abc" + "bca" + "cab"
        assert values == {"a": [6.0, 8.0], "b": [4.0, 9.0], "c": [5.0, 7.0]}

    def test_rows(self):
        values = {"ours": iter([99.0, 2.0, 6.0]), "peer": iter([1.0, 2.0, 3.0])}
        subjects = {name: (lambda own=own: next(own)) for name, own in values.items()}
        ours, peer = interleaved(subjects, rounds=2, subject="ours", reference="peer")
        assert ours == Row("ours", Sample(4.0, 3.0, 5.0, 2), 1.5, 1.25, 1.75)
        assert peer == Row("peer", Sample(2.5, 2.25, 2.75, 2), 1.0, 1.0, 1.0)

    @pytest.mark.parametrize(
        ("wrong", "match"),
        [
            ({"rounds": 0}, "rounds=0"),
            ({"rounds": 1, "reference": "b"}, "no subject 'b'; there are: a"),
            ({"rounds": 1, "subject": "c"}, "no subject 'c'"),
        ],
    )
    def test_wrong_arguments(self, wrong, match):
        with pytest.raises(ValueError, match=match):
            interleaved({"a": lambda: 1.0}, **wrong)


class TestTable:
    @pytest.mark.parametrize(
        ("better", "goal", "reached"),
        [
            ("lower", 1.5, True),
            ("lower", 1.49, False),
            ("higher", 1.5, True),
            ("higher", 1.51, False),
            ("lower", None, None),
        ],
    )
    def test_reaches(self, better, goal, reached):
        table = make_table(better=better)
        assert table.answer == 1.5
        assert table.reaches(goal) is reached

    def test_a_value_is_its_own_answer(self):
        assert make_table(compare="value").answer == 3.0

    def test_no_answer_reaches_nothing(self):
        table = make_table(rows=rows_of({"ours": [1.0], "peer": [2.0]}, None))
        assert table.answer is None
        assert table.reaches(1.0) is None

    @pytest.mark.parametrize(
        ("wrong", "match"),
        [
            ({"better": "faster"}, "use 'lower' or 'higher'"),
            ({"compare": "sum"}, "use 'ratio', 'difference' or 'value'"),
            ({"subject": "theirs"}, "has no row 'theirs'; it has: ours, peer"),
        ],
    )
    def test_wrong_fields(self, wrong, match):
        with pytest.raises(ValueError, match=match):
            make_table(**wrong)


class TestProcesses:
    def test_json_in_and_out(self):
        assert in_new_process("json:loads", s='{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}

    def test_environment(self):
        name = "NEURON_EXT_BENCHMARK_TEST"
        assert in_new_process("os:getenv", key=name) is None
        assert in_new_process("os:getenv", environment={name: "x"}, key=name) == "x"

    def test_what_a_failed_child_wrote_is_shown(self):
        with pytest.raises(RuntimeError, match=r"json:loads ended with status 1(?s:.)*Expecting"):
            in_new_process("json:loads", s="{")

    def test_resolve(self):
        assert resolve("json:loads") is json.loads

    def test_a_worker_keeps_its_object(self):
        with Worker("collections:Counter", a=2, b=1) as worker:
            assert worker.call("total") == 3
            assert worker.call("update", c=4) is None
            assert worker.call("most_common", n=1) == [["c", 4]]
            with pytest.raises(RuntimeError, match="has no attribute 'nothing'"):
                worker.call("nothing")
            assert worker.call("total") == 7  # an error does not end it

    def test_a_worker_that_cannot_start(self):
        with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
            Worker("no_such_module:name")

    def test_cpus_and_environment_of_a_worker(self):
        cpu = min(os.sched_getaffinity(0))
        environment = {"NEURON_EXT_BENCHMARK_TEST": "x"}
        with Worker(
            "importlib:import_module", name="subprocess", environment=environment, cpus=[cpu]
        ) as worker:
            assert worker.call("getoutput", cmd="echo $NEURON_EXT_BENCHMARK_TEST") == "x"
            assert worker.call("getoutput", cmd="taskset -cp $$").endswith(f": {cpu}")


class TestOptions:
    @pytest.mark.parametrize(
        ("only", "wanted"),
        [
            ([], True),
            (["peers"], True),
            (["peers.mlp"], True),
            (["peers.mlp.table"], True),
            (["peer"], False),
            (["peers.ml"], False),
            (["scaling", "peers.mlp"], True),
        ],
    )
    def test_wants(self, only, wanted):
        assert Options(only=only).wants("peers.mlp") is wanted

    def test_a_quick_run_takes_small_models_unless_asked(self):
        assert Options(quick=True).takes("mlp")
        assert not Options(quick=True).takes("bert")
        assert Options(quick=False).takes("bert")
        assert Options(quick=True, only=["peers.bert"]).takes("bert")

    def test_every_model_of_the_speed_questions_is_there(self):
        known = set(questions())
        assert {"call_overhead.python", "call_overhead.cpp"} <= known
        assert {f"scaling.{model}" for model in ("mlp", "resnet50", "bert")} <= known
        assert {f"bfloat16.{name}" for name in ("resnet50", "bert", "calls")} <= known
        models = ("mlp", "resnet50", "bert", "minilm", "minilm_batch8")
        assert {f"peers.{model}" for model in models} <= known

    def test_tables_stand_in_the_order_of_the_questions(self):
        tables = ["gone", "weights.replace", "loading_four", "loading.now", "scaling.mlp.2_threads"]
        assert sorted(tables, key=place_of) == [
            *("loading.now", "loading_four", "scaling.mlp.2_threads", "weights.replace", "gone")
        ]


class TestReport:
    def test_a_table_in_words(self):
        text = report.table_text(make_table())
        assert "| **ours** | 3 | 2.5 - 3.5 | 3 | 1.500 | 1.250 - 1.750 |" in text
        assert "| peer | 2 | 2 - 2 | 3 | reference |  |" in text
        assert "Answer: 1.500x; must be 1.5x: reached; aim 1.25x: not reached." in text
        assert "- one note" in text

    def test_a_difference_has_a_sign_and_a_unit(self):
        rows = rows_of({"ours": [3.5], "peer": [2.0]}, "peer", "difference")
        table = make_table(rows=rows, compare="difference", aim=0.5)
        assert report.verdict(table) == (
            "Answer: +1.5 us; must be +1.5 us: reached; aim +0.5 us: not reached."
        )

    def test_a_value_has_a_unit(self):
        table = make_table(compare="value", must=2.0, aim=None)
        assert report.verdict(table) == "Answer: 3 us; must be 2 us: **not reached**."

    def test_the_json_holds_everything(self, tmp_path):
        difference = rows_of({"ours": [3.5], "peer": [2.0]}, "peer", "difference")
        results = make_results(
            make_table(), make_table(question="d", rows=difference, compare="difference")
        )
        file = tmp_path / "new" / "results.json"
        results.save(file)
        again = report.Results.load(file)
        assert again == results
        text = report.summary_text(again, Path("plots"))
        assert text == report.summary_text(results, Path("plots"))
        assert "| a call | 3 us | 2 (peer) | 1.500x | 1.250 - 1.750 | 1.5x | 1.25x | must |" in text
        assert "**other failed**: RuntimeError: it broke" in text
        assert "![a call](plots/calls.affine.png)" in text
        for word in ("a CPU", "avx2", "torch 2.13.0", "g++ 12", "2030-01-02", "[0.1, 0.2, 0.3]"):
            assert word in text

    def test_a_table_that_came_later_says_what_differs(self):
        first, now = make_results(), make_results()
        first.versions["commit"], now.versions["commit"] = "aaa", "bbb"
        now.date, now.settings["window"] = "2030-01-03 04:05 UTC", "2 s"
        later = (
            "Measured later than the file was begun: 2030-01-03 04:05 UTC, commit bbb, window 2 s."
        )
        assert report.notes_of_later(now, first) == [later]
        now.versions["torch"] = "2.14.0"
        now.machine = {**now.machine, "cpu": "another CPU"}
        assert report.notes_of_later(now, first)[:2] == [
            later,
            "With other versions: torch 2.14.0.",
        ]
        (machine,) = report.notes_of_later(now, first)[2:]
        assert machine.startswith("Measured on another machine: another CPU (avx2), 2 cores")

    def test_another_format_is_refused(self, tmp_path):
        file = tmp_path / "results.json"
        file.write_text('{"format": 0}')
        with pytest.raises(ValueError, match="is not a result file"):
            report.Results.load(file)

    def test_files(self, tmp_path, monkeypatch):
        monkeypatch.setattr(plots, "plot", lambda table, file: file.write_text(table.question))
        results = make_results(make_table(), make_table(question="other"))
        report.write(results, tmp_path)
        assert (tmp_path / "summary.md").read_text() == report.summary_text(results, Path("plots"))
        assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == [
            "calls.affine.png",
            "other.png",
        ]

    @pytest.mark.parametrize(
        ("value", "text"),
        [(1234.5, "1234"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.0123")],
    )
    def test_numbers(self, value, text):
        assert report.number(value) == text
