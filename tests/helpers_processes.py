"""Processes that tests start and talk with. Import it through ``helpers``."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

import neuron_ext

TESTS = Path(__file__).resolve().parent
PACKAGE_ROOT = Path(neuron_ext.__file__).resolve().parents[1]
"""The folder that the tested ``neuron_ext`` stands in: a source tree or an installation."""


LOCK_FOLDER = None
"""Where new processes reserve their cores; None is where any process does."""


class FullStderr:
    """While open, whoever writes to file descriptor 2 of this process waits until `release`.

    With NEURON_RT_LOG_LEVEL=warning that holds up loads of `helpers.falls_back` modules, for as
    long as a test likes: a slow load without a clock.
    """

    def __enter__(self):
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        for size in (65536, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(write, b"x" * size)
        os.set_blocking(write, True)
        self._stderr = os.dup(2)
        os.dup2(write, 2)
        os.close(write)
        return self

    def release(self):
        """Lets the writers go on; their text is thrown away."""
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        self._stderr = None
        drain = threading.Thread(target=self._drain, daemon=True)
        drain.start()

    def _drain(self):
        while os.read(self._read, 65536):
            pass

    def __exit__(self, *error):
        if self._stderr is not None:
            self.release()


def clean_environment(env=None):
    """For a new process: no setting of ours but ``env``, and the tested package on the path."""
    base = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("NEURON_RT_", "NEURON_EXT_"))
    }
    base["PYTHONPATH"] = os.pathsep.join([str(PACKAGE_ROOT), str(TESTS)])
    base["PYTHONDONTWRITEBYTECODE"] = "1"
    if LOCK_FOLDER is not None:
        base["NEURON_EXT_LOCK_DIR"] = LOCK_FOLDER
    return {**base, **stringified(env)}


def stringified(env):
    return {key: str(value) for key, value in (env or {}).items()}


def run_python(code, *args, env=None, timeout=120, cwd=None, options=(), returncode=0):
    """Run ``code`` in a new Python process and return what it printed.

    Fails the test, showing stderr, unless it ends with ``returncode`` within ``timeout`` seconds.
    ``returncode=None`` returns the whole ``CompletedProcess`` instead.
    """
    command = [
        sys.executable,
        "-P",
        "-X",
        "faulthandler",
        *options,
        "-c",
        textwrap.dedent(code),
        *map(str, args),
    ]
    process = subprocess.Popen(
        command,
        env=clean_environment(env),
        cwd=cwd,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler shows where every thread stands
        stdout, stderr = process.communicate()
        pytest.fail(
            f"a process still ran after {timeout} s\n--- stdout\n{stdout}\n--- stderr\n{stderr}"
        )
    if returncode is None:
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
    if process.returncode != returncode:
        pytest.fail(
            f"a process ended with {process.returncode}, not {returncode}\n"
            f"--- stdout\n{stdout}\n--- stderr\n{stderr}"
        )
    return stdout


class PythonProcess:
    """A Python process to talk with, line by line; killed at the end of the ``with``."""

    def __init__(self, code, *args, env=None, timeout=120):
        self._timeout = timeout
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in __exit__
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-X",
                "faulthandler",
                "-u",
                "-c",
                textwrap.dedent(code),
                *map(str, args),
            ],
            env=clean_environment(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        self._pending = b""

    @property
    def pid(self):
        return self._process.pid

    def stderr(self):
        self._stderr.flush()
        self._stderr.seek(0)
        return self._stderr.read()

    def read_line(self):
        """The next line it prints; fails the test if none comes."""
        deadline = time.monotonic() + self._timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                data = os.read(self._process.stdout.fileno(), 65536) if ready else b""
                if not data:
                    what = "ended" if ready else f"said nothing for {self._timeout} s"
                    pytest.fail(
                        f"a process {what} after {self._pending!r}\n--- stderr\n{self.stderr()}"
                    )
                self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        return line.decode()

    def write_line(self, text=""):
        self._process.stdin.write(text.encode() + b"\n")
        self._process.stdin.flush()

    def kill(self):
        """kill -9, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    def finish(self):
        """Close its stdin and wait for its end; fails the test unless it ends with 0."""
        self._process.stdin.close()
        try:
            code = self._process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)
            self._process.wait()
            pytest.fail(f"a process does not end\n--- stderr\n{self.stderr()}")
        assert code == 0, self.stderr()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._process.poll() is None:
            self.kill()
        self._process.stdin.close()
        self._process.stdout.close()
        self._stderr.close()


_FORK_SERVER = """
import json, os, sys
import torch, neuron_ext, helpers
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.environ.update(request["env"])
        if request["to_exit"]:
            os.close(write)
            for number, path in enumerate(request["to_exit"], start=1):
                file = os.open(path, os.O_WRONLY | os.O_CREAT)
                os.dup2(file, number)
                os.close(file)
            sys.argv[1:] = request["args"]
            exec(request["code"], {"__name__": "__main__"})
            break
        names = {"args": request["args"], "torch": torch, "neuron_ext": neuron_ext}
        try:
            exec(request["code"], names)
            answer = {"result": names.get("result")}
        except Exception as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        with os.fdopen(write, "w") as out:
            json.dump(answer, out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), answer]), flush=True)
"""


class ChildError(Exception):
    """What was raised in a child of the `ForkServer`."""

    def __init__(self, kind, text):
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text


class ForkServer(PythonProcess):
    """A process that has imported torch and neuron_ext, used neither, and forks on request."""

    def __init__(self):
        super().__init__(_FORK_SERVER)
        assert self.read_line() == "ready"

    def _request(self, code, args, env, to_exit=()):
        code = textwrap.dedent(code)
        request = {"code": code, "args": args, "env": stringified(env), "to_exit": to_exit}
        self.write_line(json.dumps(request))
        return json.loads(self.read_line())

    def run_to_exit(self, code, *args, env=None):
        """Run ``code`` as the main program of a new child, which then ends as Python processes do.

        ``args`` are in ``sys.argv[1:]``. Returns a ``CompletedProcess``.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("stdout", "stderr")]
            args = [str(arg) for arg in args]
            status, _ = self._request(code, args, env, [str(file) for file in files])
            return subprocess.CompletedProcess(code, status, *[file.read_text() for file in files])

    def run(self, code, *args, env=None):
        """Run ``code`` in a new child, with ``args`` (through JSON), ``torch`` and ``neuron_ext``.

        Returns what it left in ``result``. Raises `ChildError` with what it raised.
        """
        status, answer = self._request(code, args, env)
        assert status == 0, f"the child ended with {status}\n{self.stderr()}"
        fields = json.loads(answer)
        if "error" in fields:
            raise ChildError(fields["error"], fields["text"])
        return fields["result"]
