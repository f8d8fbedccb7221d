"""Processes that scenarios start."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from stress.harness.options import REPOSITORY
from stress.harness.patience import PERIOD, wait_until

CORES = 4
_CRASHES = ("Fatal", "terminate called", "Segmentation", "core dumped", "AddressSanitizer")


def environment(settings: Mapping[str, object] | None = None) -> dict[str, str]:
    """For a new process: of this package's settings only ``settings``, and `CORES` cores."""
    base = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("NEURON_RT_", "NEURON_EXT_"))
    }
    path = [str(REPOSITORY), *filter(None, [base.get("PYTHONPATH")])]
    base |= {"PYTHONPATH": os.pathsep.join(path), "NEURON_EXT_HOST_CORES": str(CORES)}
    base |= {"NEURON_EXT_PROGRESS": "0"}
    return base | {key: str(value) for key, value in (settings or {}).items()}


def run(
    command: Sequence[object],
    settings: Mapping[str, object] | None = None,
    timeout: float = 120.0,
) -> tuple[int | None, str, str]:
    """Runs a command to its end: exit status, stdout and stderr. The status is None where it hung;
    stderr then has the stacks of its threads, if it is a Python process with faulthandler.
    """
    # Files, not pipes: a grandchild that lives on would keep a pipe open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
        status = wait_for(process, timeout)
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read()


def run_forked(
    target: Callable[..., None],
    *arguments: object,
    settings: Mapping[str, object] | None = None,
    timeout: float = 120.0,
) -> tuple[int | None, str, str]:
    """Like `run`, for a function in a forked process."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = forked.Process(
            target=_redirected,
            args=(out.fileno(), err.fileno(), target, environment(settings), arguments),
        )
        process.start()
        status = process.exitcode if wait_until(lambda: not process.is_alive(), timeout) else None
        if status is None:
            os.kill(process.pid, signal.SIGABRT)
            if not wait_until(lambda: not process.is_alive(), 10):
                process.kill()
        process.join()
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read()


def _redirected(
    out: int, err: int, target: Callable[..., None], env: dict[str, str], arguments: Any
) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    faulthandler.enable(2)
    _take_environment(env)
    status = 1
    try:
        target(*arguments)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not through Python's end, which would wait for the thread pool that this was forked from.
        os._exit(status)


def wait_for(process: subprocess.Popen[bytes], timeout: float) -> int | None:
    """Its exit status, or None if it does not end: it is told to show its stacks, and killed."""
    if wait_until(lambda: process.poll() is not None, timeout):
        return process.returncode
    process.send_signal(signal.SIGABRT)
    if not wait_until(lambda: process.poll() is not None, 10):
        process.kill()
    process.wait()
    return None


def python(*arguments: object) -> list[object]:
    """The command that runs Python with stacks shown when it crashes."""
    return [sys.executable, "-X", "faulthandler", *arguments]


def crash_in(stderr: str) -> str:
    """The first line that tells of a crash, or nothing."""
    return next((line for line in stderr.splitlines() if any(w in line for w in _CRASHES)), "")


forked: Any = multiprocessing.get_context("fork")
"""For processes forked from one that has imported torch and neuron_ext and used neither: an import
takes seconds, and a run has thousands of processes.
"""


class ChildEndedError(Exception):
    """A child ended, or said nothing in time."""


class Child:
    """A forked process, in a process group of its own; killed at the end of ``with``.

    Args:
        target: a function of a module; gets the connection to the parent, and ``arguments``.
        settings: what its environment has besides.
        timeout: seconds that it may be silent.
    """

    def __init__(
        self,
        target: Callable[..., None],
        *arguments: object,
        settings: Mapping[str, object] | None = None,
        timeout: float = 120.0,
    ) -> None:
        self._timeout = timeout
        self.connection, theirs = forked.Pipe()
        self.process = forked.Process(
            target=_main, args=(theirs, target, environment(settings), arguments), daemon=False
        )
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        pid = self.process.pid
        assert pid is not None
        return int(pid)

    def receive(self) -> Any:
        """The next thing that the child sends."""
        if not wait_until(lambda: self.connection.poll(PERIOD), self._timeout):
            self.process.kill()
            raise ChildEndedError(f"process {self.pid} said nothing for {self._timeout} s")
        try:
            return self.connection.recv()
        except EOFError:
            code = self.wait()
            raise ChildEndedError(f"process {self.pid} ended with {code}") from None

    def send(self, value: object) -> None:
        self.connection.send(value)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.kill()
        self.process.join()

    def wait(self) -> int | None:
        """Its exit status, or None if it does not end; it is killed then."""
        if not wait_until(lambda: not self.process.is_alive(), self._timeout):
            self.process.kill()
            self.process.join()
            return None
        return self.process.exitcode

    def wait_for_group(self) -> bool:
        """Waits for what the child started, too; whether all of it ended in time."""

        def ended() -> bool:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return True
            return False

        if wait_until(ended, self._timeout, 0.05):
            return True
        os.killpg(self.pid, signal.SIGKILL)
        return False

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.process.is_alive():
            self.kill()
        self.connection.close()


def _main(
    connection: Connection, target: Callable[..., None], env: dict[str, str], arguments: Any
) -> None:
    os.setpgid(0, 0)
    _take_environment(env)
    target(connection, *arguments)


def _take_environment(env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # it comes from the environment again
