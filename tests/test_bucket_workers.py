"""Buckets compile in processes: at the same time, with one answer, and nothing left behind."""

import io
import logging
import multiprocessing
import os
import pickle
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from bucket_helpers import config, inputs, make_pooled, seeded_pooled, trace_buckets
from bucket_worker_helpers import (
    PATIENCE,
    count_living,
    die,
    each,
    fail_in_one,
    is_gone,
    leave_a_thread,
    meet,
    pid_in,
)
from helpers import eventually
from trace_helpers import assert_same

import neuron_ext
from neuron_ext.buckets import job, parallel, worker_main, workers
from neuron_ext.compiler.progress import Progress

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _two_cpus_and_a_clean_end(monkeypatch, tmp_path):
    torch.manual_seed(11)
    monkeypatch.setattr("neuron_ext.buckets.trace.usable_cpus", lambda: 2)
    monkeypatch.setattr("neuron_ext.compiler.progress._PATIENCE_SECONDS", 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield
    assert multiprocessing.active_children() == []
    assert [one.name for one in tmp_path.glob("neuron_ext-buckets-*")] == []
    assert [one.name for one in threading.enumerate() if "progress" in one.name] == []


def jobs(func, count, **kwargs):
    """Pickled, of buckets of one model."""
    return [
        pickle.dumps(
            job.Job(i, count, func, {"index": i, **kwargs}, inputs(4), 3, None, (), "torchscript")
        )
        for i in range(count)
    ]


# ------------------------------------------------------------------------------------- good ends


def test_buckets_compile_at_the_same_time_in_processes_of_their_own(tmp_path, caplog, capsys):
    state = torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        module = trace_buckets(meet, configuration=each(tmp_path))
    finally:
        torch.set_default_dtype(torch.float32)
    pids = {pid_in(tmp_path, name) for name in "01"}
    assert len(pids - {os.getpid()}) == 2
    assert all(is_gone(pid) for pid in pids)
    assert torch.equal(torch.random.get_rng_state(), state)
    model = seeded_pooled()
    for rows in range(1, 9):
        assert_same(module(*inputs(rows)), model(*inputs(rows)))
    # The files of the workers are gone, on disk too.
    assert "neuron_ext-buckets" not in Path("/proc/self/maps").read_text()
    said = [one.getMessage() for one in caplog.records]
    assert sorted(said) == ["a word from 0", "a word from 1", "a word from both"]
    first, last = capsys.readouterr().err.strip().splitlines()
    assert first == "neuron_ext: compiling 2 buckets of meet ..."
    assert last.startswith("neuron_ext: 2 buckets of meet compiled in ")


def test_no_more_processes_than_asked_for(tmp_path):
    parts = workers.compile_in_processes(jobs(count_living, 2, folder=tmp_path), 1, "two")
    assert [one.name for one in parts] == ["Pooled", "Pooled"]
    assert sorted(one.name for one in tmp_path.glob("living-*")) == ["living-1-0", "living-1-1"]
    assert pid_in(tmp_path, "0") != pid_in(tmp_path, "1")


def test_a_worker_that_does_not_end_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_EXIT_SECONDS", 0.1)
    module = trace_buckets(leave_a_thread, configuration=each(tmp_path))
    assert_same(module(*inputs(5)), seeded_pooled()(*inputs(5)))
    for name in ("0", "1", "child-0", "child-1"):
        eventually(lambda name=name: is_gone(pid_in(tmp_path, name)))


def test_from_several_threads(tmp_path):
    found = {}

    def body(i):
        given = jobs(count_living, 1, folder=str(tmp_path))
        found[i] = workers.compile_in_processes(given, 1, "one")[0].name

    threads = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(PATIENCE)
    assert found == {0: "Pooled", 1: "Pooled"}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line_on_a_terminal_says_how_many_are_done(monkeypatch):
    monkeypatch.setattr("neuron_ext.compiler.progress._REFRESH_SECONDS", 0.01)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("2 buckets") as progress:
        eventually(lambda: "compiling 2 buckets ... " in terminal.getvalue())
        progress.update("2 buckets, 1 done")
        eventually(lambda: "compiling 2 buckets, 1 done ... " in terminal.getvalue())


# ------------------------------------------------------------------------------------- bad ends


def test_an_error_in_a_worker(tmp_path, capsys):
    with pytest.raises(KeyError, match="weight") as caught:
        trace_buckets(fail_in_one, configuration=each(tmp_path))
    assert caught.value.__notes__ == ["This is of bucket 1 of 2."]
    cause = str(caught.value.__cause__)
    assert "in fail_in_one" in cause
    assert 'raise KeyError("weight")' in cause
    if (tmp_path / "patient").exists():
        assert is_gone(pid_in(tmp_path, "patient"))
    assert "neuron_ext: 2 buckets of fail_in_one gave up after " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("kill", "bucket 1: its worker process .* was killed by SIGKILL. If memory ran out"),
        ("exit", "bucket 1: its worker process .* ended with exit code 7 and without a result"),
    ],
)
def test_a_worker_that_dies(tmp_path, how, text):
    with pytest.raises(RuntimeError, match=text):
        trace_buckets(die, configuration=each(tmp_path, how=how))
    for name in ("0", "child-0"):
        eventually(lambda name=name: is_gone(pid_in(tmp_path, name)))


def test_a_worker_that_cannot_be_started(monkeypatch):
    def start(_self):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", start)
    with pytest.raises(RuntimeError, match=r"bucket 0: its worker .* Too many .*ulimit -n"):
        trace_buckets()


class TwoArgumentsError(Exception):
    """Can be pickled, and not be read again."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


ERRORS = {
    "ValueError": lambda: ValueError("no such model"),
    "OSError": lambda: FileNotFoundError(2, "not there", "model.bin"),
    "TwoArguments": lambda: TwoArgumentsError(1, 2),
}


def fail_with(index, error):
    raise ERRORS[error]()


def bad_model(index):
    return (lambda x, mask: x + mask), {}


@pytest.mark.parametrize(
    ("func", "kwargs", "kind", "text"),
    [
        (fail_with, {"error": "ValueError"}, ValueError, "bucket 0 of 1: no such model"),
        (
            fail_with,
            {"error": "OSError"},
            FileNotFoundError,
            "not there: 'model.bin'\nThis is of bucket 0 of 1.",
        ),
        (
            fail_with,
            {"error": "TwoArguments"},
            RuntimeError,
            "TwoArgumentsError: bucket 0 of 1: 1 and 2",
        ),
        (bad_model, {}, RuntimeError, "bucket 0 of 1: function failed when it was run on the "),
    ],
)
def test_the_way_of_an_error(tmp_path, func, kwargs, kind, text):
    """As a worker does it, in this process."""
    path = tmp_path / "0.job"
    path.write_bytes(jobs(func, 1, **kwargs)[0])
    outcome = worker_main._compile(path)
    assert outcome.loaded
    with pytest.raises(kind) as caught:
        workers._parts(outcome)
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert text in told
    assert type(caught.value) is kind
    assert func.__name__ in str(caught.value.__cause__) or func is bad_model


# ------------------------------------------------------------------------------------- one by one


def only_record(caplog):
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("neuron_ext", logging.WARNING)
    text = record.getMessage()
    assert text.startswith("buckets are compiled one after another, in this process: ")
    return text


def test_what_cannot_be_pickled(caplog):
    pids = []

    def func():
        pids.append(os.getpid())
        return make_pooled()

    module = trace_buckets(func)
    assert pids == [os.getpid()] * 2
    assert "cannot be pickled" in only_record(caplog)
    assert_same(module(*inputs(7)), seeded_pooled()(*inputs(7)))


def test_what_a_worker_does_not_find(caplog, monkeypatch):
    def func():
        return make_pooled()

    func.__module__, func.__qualname__ = "neuron_ext", "unheard_of"
    monkeypatch.setattr(neuron_ext, "unheard_of", func, raising=False)
    module = trace_buckets(func)
    assert "cannot load func or its arguments (AttributeError: " in only_record(caplog)
    assert_same(module(*inputs(7)), seeded_pooled()(*inputs(7)))


def test_one_cpu_needs_no_words(caplog, monkeypatch):
    monkeypatch.setattr("neuron_ext.buckets.trace.usable_cpus", lambda: 1)
    pids = []

    def func():
        pids.append(os.getpid())
        return make_pooled()

    trace_buckets(func)
    assert pids == [os.getpid()] * 2
    assert caplog.records == []


def test_a_daemonic_process(monkeypatch):
    class Daemonic:
        daemon = True

    monkeypatch.setattr(parallel.multiprocessing, "current_process", Daemonic)
    with pytest.raises(parallel.NotParallelError, match="daemonic"):
        parallel.pickled_jobs([])


GUARDED = 'if __name__ == "__main__":\n    pass\n'


@pytest.mark.parametrize(
    ("text", "spec", "problem"),
    [
        (GUARDED, None, None),
        (GUARDED, "tool", None),
        ("pass", None, "has no `if __name__"),
        ("pass", "tool", "has no `if __name__"),
        ("def f():\n  " + GUARDED.replace("    ", "     "), None, "has no `if __name__"),
        ("if", None, "cannot be read again"),
        (None, None, "interactive"),
        ("pass", "tool.__main__", "interactive"),
    ],
)
def test_main_scripts(tmp_path, monkeypatch, text, spec, problem):
    main = types.ModuleType("__main__")
    main.__spec__ = None if spec is None else types.SimpleNamespace(name=spec)
    if text is not None:
        main.__file__ = str(tmp_path / "main.py")
        (tmp_path / "main.py").write_text(text)

    def func():
        return None

    func.__module__ = "__main__"
    func.__qualname__ = "func"
    main.func = func
    monkeypatch.setitem(sys.modules, "__main__", main)
    one = job.Job(0, 1, func, {}, None, 0, None, (), None)
    if problem is None:
        assert len(parallel.pickled_jobs([one])) == 1
    else:
        with pytest.raises(parallel.NotParallelError, match=problem):
            parallel.pickled_jobs([one])


@pytest.mark.parametrize(
    ("test", "wanted"),
    [
        ('__name__ == "__main__"', True),
        ('"__main__" == __name__', True),
        ('__name__ == "__main__" and x', True),
        ('__name__ != "__main__"', False),
        ('__name__ == "main"', False),
        ("x", False),
    ],
)
def test_what_a_guard_is(test, wanted):
    (node,) = parallel.ast.parse(f"if {test}: pass").body
    assert parallel._is_guard(node.test) == wanted


def test_the_kernel_does_not_travel():
    """A ScriptFunction cannot be pickled, and need not be."""
    with pytest.raises(Exception, match="pickle"):
        pickle.dumps(config())
