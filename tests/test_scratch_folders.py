"""Temporary folders of compiles, and of processes that were killed in one."""

import os
from pathlib import Path

import pytest

from neuron_ext.compiler import scratch
from neuron_ext.compiler.scratch import scratch_folder

_KILLED = """
import os, signal, sys
from pathlib import Path
from neuron_ext.compiler.scratch import scratch_folder

with scratch_folder("compile") as folder:
    Path(folder, "sub").mkdir()
    Path(folder, "sub", "model.cpp").write_text("int x;")
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def _killed(fork_server, folder):
    done = fork_server.run_to_exit(_KILLED, env={"TMPDIR": folder})
    assert done.returncode == -9
    left = Path(done.stdout.strip())
    assert left.parent == folder
    assert (left / "sub" / "model.cpp").exists()
    return left


def test_the_next_one_removes_what_killed_processes_left_and_nothing_else(fork_server, folder):
    left = _killed(fork_server, folder)
    others = [folder / "neuron_ext-other-1", folder / "somebody's"]
    for other in others:
        other.mkdir()
    link = folder / "neuron_ext-compile-link"
    link.symlink_to(others[0])
    with scratch_folder("compile") as first, scratch_folder("compile") as second:
        assert not left.exists()
        assert Path(first).is_dir()  # its owner lives, though in this process
        assert Path(second).is_dir()
        assert {path.parent for path in map(Path, (first, second))} == {folder}
        Path(first, "file").touch()
        # Another process does not take it for abandoned either.
        again = _killed(fork_server, folder)
        assert Path(first, "file").exists()
    assert sorted(folder.iterdir()) == sorted([*others, link, again])


def test_what_another_user_left_stays(fork_server, folder, monkeypatch):
    left = _killed(fork_server, folder)
    monkeypatch.setattr(os, "geteuid", lambda: left.stat().st_uid + 1)
    with scratch_folder("compile"):
        assert left.exists()


def test_it_goes_when_the_block_raises(folder):
    def fail():
        with scratch_folder("compile") as mine:
            Path(mine, "file").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(folder.iterdir()) == []


def test_one_that_is_taken_for_abandoned_before_it_is_locked_is_made_again(folder, monkeypatch):
    made = []

    def make(prefix):
        made.append(mkdtemp(prefix=prefix))
        if len(made) < 3:
            scratch._remove_abandoned("neuron_ext-compile-")
        return made[-1]

    mkdtemp = scratch.tempfile.mkdtemp
    monkeypatch.setattr(scratch.tempfile, "mkdtemp", make)
    with scratch_folder("compile") as mine:
        assert mine == made[2]
        assert os.listdir(folder) == [Path(mine).name]


def test_without_locks_folders_are_made_and_none_is_removed(fork_server, folder, monkeypatch):
    left = _killed(fork_server, folder)

    def flock(*_arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(scratch.fcntl, "flock", flock)
    with scratch_folder("compile") as mine:
        assert Path(mine).is_dir()
        assert left.exists()
    assert not Path(mine).exists()
