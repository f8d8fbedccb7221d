"""The benchmark suite's load: throughput, arrivals, and latencies in turns."""

import contextlib
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks is not installed

from benchmarks.harness import load
from benchmarks.harness.options import Options
from benchmarks.questions import latency
from benchmarks.subjects import fixed_work
from benchmarks.subjects.fixed_work import FixedWork


class TestLoad:
    def test_rate_is_exact_for_a_steady_server(self):
        assert load.rate_of([0.25 * k for k in range(9)]) == pytest.approx(4.0)

    def test_rate_is_exact_for_replicas_in_step(self):
        # Two at a time: a count over the time between the first and the last would say 2.33.
        assert load.rate_of([3.0, 2.0, 0.0, 1.0, 3.0, 0.0, 1.0, 2.0]) == pytest.approx(2.0)

    def test_too_few_completions(self):
        with pytest.raises(RuntimeError, match=r"^3 calls completed"):
            load.rate_of([0.1, 0.2, 0.3])

    def test_throughput_counts_the_calls_of_all_threads(self):
        numbers = set()

        def make_call(number):
            numbers.add(number)
            return lambda: sum(range(100))

        assert load.throughput(make_call, threads=3, seconds=0.0) > 0
        assert numbers == {0, 1, 2}

    def test_an_error_in_a_thread_is_raised(self):
        def make_call(number):
            if number == 1:
                raise ValueError("no session")
            return lambda: None

        with pytest.raises(ValueError, match="no session"):
            load.throughput(make_call, threads=3, seconds=10)

    def test_arrivals_are_the_same_for_the_same_seed(self):
        first = load.arrivals(1000, 1.0, seed=3)
        assert first == load.arrivals(1000, 1.0, seed=3) == sorted(first)
        assert first != load.arrivals(1000, 1.0, seed=4)
        assert first[0] > 0
        assert first[-1] < 1.0
        assert 800 < len(first) < 1200

    def test_every_arrival_has_a_latency(self):
        calls = []
        found = load.latencies(lambda _: lambda: calls.append(1), 2, 2000, 0.05, seed=1)
        assert len(found) == len(load.arrivals(2000, 0.05, seed=1))
        assert len(calls) == len(found) + 2  # each thread warms up once
        assert all(value > 0 for value in found)

    def test_percentile_is_one_of_the_values(self):
        values = [float(k) for k in range(100, 0, -1)]
        assert load.percentile(values, 0.5) == 50.0
        assert load.percentile(values, 0.99) == 99.0
        assert load.percentile([7.0], 0.99) == 7.0
        assert load.percentile([1.0, 2.0, 3.0], 0.5) == 2.0


class TestLatency:
    @staticmethod
    def measured(throughput, window):
        """What is measured of a subject with that throughput, and what it was asked for."""
        asked = []

        def call(method, **arguments):
            asked.append((method, arguments))
            return throughput if method == "callers_throughput" else [1.0, 2.0]

        found = latency._measure(SimpleNamespace(call=call), window=window, seed=7)
        assert found.latencies == [1.0, 2.0]
        return found, asked

    def test_requests_come_at_80_percent_of_what_the_subject_can_do_just_then(self):
        _, asked = self.measured(throughput=100.0, window=4.0)
        assert asked == [
            ("callers_throughput", {"seconds": 1.0}),
            ("latencies", {"rate": 80.0, "seconds": 2.0, "seed": 7}),
        ]

    def test_slow_subjects_have_longer_to_have_as_many_requests(self):
        found, _ = self.measured(throughput=10.0, window=4.0)
        assert found.seconds == latency.REQUESTS / 8.0

    def test_percentiles_are_of_each_turn(self, monkeypatch):
        # 10 of 100 requests are as many times as slow as the others; in one turn 100 times.
        slowest = {
            latency.OURS: 30.0,
            latency.AGAIN: 40.0,
            latency.MANY: 50.0,
            "peer": 20.0,
            latency.FIXED: 1.0,
        }

        class Fleet(contextlib.nullcontext):
            def __init__(self, starts):
                super().__init__(self)
                self.workers = {
                    name: SimpleNamespace(call=functools.partial(self.call, name))
                    for name in starts
                }
                self.turns = []

            def call(self, name, method, seconds=None, seed=None, **_):
                if method == "latencies":
                    self.turns.append((name, seed))
                    return [0.001] * 90 + [0.1 if seed == 3 else 0.001 * slowest[name]] * 10
                return None if method == "last_as_long_as" else 100.0

            def check_idle(self):
                order = [name for name, _ in self.turns]
                assert len(order) == 2 * latency.TURNS_PER_ROUND * 5
                assert order[:10] == [*slowest, *list(slowest)[1:], latency.OURS]
                turns = range(2 * latency.TURNS_PER_ROUND)
                assert [seed for _, seed in self.turns[::5]] == list(turns)

            def notes(self):
                return []

        monkeypatch.setattr(latency, "Fleet", Fleet)
        monkeypatch.setattr(latency, "ours", lambda *_, **__: None)
        monkeypatch.setattr(latency, "two_callers", lambda *_: {"peer": None})
        tables = latency.latency(Options(rounds=2, window=4.0), "mlp")
        asked, p99, p50 = tables
        assert (asked.question, asked.reference, asked.must) == ("latency.mlp.p99_p50", "peer", 1)
        values = {row.subject: row.sample.median for row in asked.rows}
        assert values.pop(latency.STEADY) > 1
        assert values == pytest.approx(slowest)
        assert {row.sample.count for row in asked.rows} == {2 * latency.TURNS_PER_ROUND}
        assert {row.subject: row.sample.median for row in p99.rows}["peer"] == pytest.approx(20)
        assert {row.subject: row.sample.median for row in p50.rows}["peer"] == pytest.approx(1)

    def test_two_cores_of_constant_speed(self):
        found = load.at_constant_speed([0.0, 1.0, 2.0, 9.0], servers=2, service=4.0)
        assert found == [4.0, 4.0, 6.0, 4.0]

    def test_they_are_as_fast_as_the_subject_was_before(self):
        measured, _ = self.measured(throughput=100.0, window=4.0)
        found = measured.at_constant_speed(seed=1)
        assert len(found) == len(load.arrivals(80.0, measured.seconds, seed=1))
        assert min(found) == pytest.approx(0.02)

    def test_fixed_work_lasts_as_long_as_told(self, monkeypatch):
        work = FixedWork(threads=2)
        hashes = []
        monkeypatch.setattr(fixed_work, "_hashes", hashes.append)
        monkeypatch.setattr(FixedWork, "throughput", lambda *_: 400.0)
        work.last_as_long_as(throughput=100.0, seconds=1.0)
        work.last_as_long_as(throughput=500.0, seconds=1.0)
        work.call_on(0)()
        assert hashes == [10_000 * 4 * 400 // 500]
