"""The stress program: every scenario with very small numbers, and what it does about failures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import clean_environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # stress is not installed

from stress import __main__ as program
from stress.harness import patience
from stress.harness.options import REPOSITORY
from stress.harness.patience import Patience, wait_until
from stress.harness.tally import Outcome, Tally, summary
from stress.harness.watchdog import STUCK
from stress.scenarios import SCENARIOS


def run_stress(*arguments, env=None):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**clean_environment(env), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_all_scenarios_in_small(tmp_path):
    out = tmp_path / "new" / "table.md"
    arguments = ["--scale", "smoke", "--cache", tmp_path / "cache", "--out", out]
    done = run_stress("-m", "stress", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    fields = json.loads(out.with_suffix(".json").read_text())
    assert [one["scenario"] for one in fields["scenarios"]] == list(SCENARIOS)
    rows = [line.split("|") for line in out.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row[1:4]] for row in rows[1:]]
    assert [name for name, _, _ in cells] == list(SCENARIOS)
    assert [failures for _, _, failures in cells] == ["0"] * len(SCENARIOS)
    done_by = {name: text for name, text, _ in cells}
    for name, what in (
        ("load", " requests"),
        ("leaks", "10 cycles"),
        ("killed", "3 processes killed"),
        ("cores", "4 races"),
        ("fork", " forks"),
        ("exit", "1 Python processes"),
        ("environment", " processes"),
    ):
        assert what in done_by[name]


class TestFailures:
    @pytest.fixture
    def fails(self, monkeypatch):
        def run_one(name, _options):
            failures = ["expected 1,\ngot 2"] if name == "leaks" else []
            return Outcome(name, "3 things", failures, 1.0)

        monkeypatch.setattr(program, "run_one", run_one)

    @pytest.mark.usefixtures("fails")
    def test_of_one_scenario_give_status_1_and_stand_below_the_table(self, tmp_path, capsys):
        out = tmp_path / "table.md"
        arguments = ["--quick", "--cache", str(tmp_path), "--out", str(out), "--only"]
        assert program.main([*arguments, "cores,leaks"]) == 1
        text = out.read_text()
        assert text in capsys.readouterr().out
        assert "| leaks | 3 things | 1 | 1 s |" in text
        assert "| cores | 3 things | 0 | 1 s |" in text
        assert "- expected 1, got 2" in text
        assert program.main([*arguments, "cores"]) == 0

    def test_of_a_scenario_itself_are_failures_too(self, tmp_path, fork_server):
        code = """
import dataclasses, sys
from pathlib import Path
folder = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from stress import __main__ as program
from stress.harness.options import SCALES

(folder / "models").mkdir()  # is in the way
options = dataclasses.replace(SCALES["smoke"], folder=folder, cache=folder)
(outcome,) = program.run_all(["cores"], options)  # which needs the models
assert outcome.scenario == "prepare"
(failure,) = outcome.failures
assert "FileExistsError" in failure, failure
"""
        done = fork_server.run_to_exit(code, tmp_path, REPOSITORY)
        assert done.returncode == 0, done.stderr

    def test_of_names_are_refused(self, capsys):
        with pytest.raises(SystemExit):
            program.main(["--only", "load,nothing"])
        assert "no scenario 'nothing'; there are load," in capsys.readouterr().err
        for setting in ("cycle=3", "cycles=many", "cycles"):
            with pytest.raises(SystemExit):
                program.main(["--set", setting])
            assert f"--set {setting}: expected NAME=NUMBER" in capsys.readouterr().err


def test_the_watchdog_shows_all_stacks_and_ends_the_process():
    code = """
import threading
from stress.harness.watchdog import Watchdog
def waits_for_ever():
    threading.Event().wait()
threading.Thread(target=waits_for_ever, daemon=True).start()
with Watchdog(0.2) as watchdog:
    with watchdog.operation("something short"):
        pass
    with watchdog.operation("something long"):
        threading.Event().wait()
"""
    done = run_stress("-c", code)
    assert done.returncode == STUCK
    assert "watchdog: something long still waits after 0 s" in done.stderr
    assert "in waits_for_ever" in done.stderr
    assert "something short" not in done.stderr


def test_patience_does_not_count_time_in_which_the_process_was_stopped(monkeypatch):
    now = 0.0
    monkeypatch.setattr(patience.time, "monotonic", lambda: now)
    patient = Patience(10.0)
    now += 1000.0
    assert not patient.over()
    for _ in range(7):
        now += 1.0
        assert not patient.over()
    now += 1.0
    assert patient.over()


def test_waiting_ends_with_the_condition_or_the_limit():
    answers = iter([False, False, True])
    assert wait_until(lambda: next(answers), 60, 0.0)
    assert not wait_until(lambda: False, 0.01, 0.001)


def test_a_tally_has_what_was_counted_expected_and_noted(capsys):
    tally = Tally()
    tally.count("requests", 1200)
    tally.count("requests")
    tally.note("on 4 cores")
    assert tally.expect(True, "fine")
    assert not tally.failed
    assert not tally.expect(False, "not fine")
    assert tally.failed
    outcome = tally.outcome("load", 130.0)
    assert outcome == Outcome("load", "1,201 requests, on 4 cores", ["not fine"], 130.0)
    assert capsys.readouterr().err == "FAILED: not fine\n"
    assert "| load | 1,201 requests, on 4 cores | 1 | 2.2 min |" in summary(
        [outcome], ["a machine"]
    )
