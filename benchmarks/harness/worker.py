"""Subjects in processes of their own, that wait while another is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from benchmarks.harness.options import REPOSITORY

# More than this share of a CPU, used while others are measured, would show in their numbers.
IDLE_LIMIT = 0.03


class Worker:
    """An object in a process of its own; its methods are called from here, one at a time.

    The process is started with its own environment and CPUs, since thread pools are settings of a
    process. Between calls it waits on a pipe, and tells how much CPU time it used while it had
    nothing to do: see `idle_share`. Not thread-safe; several workers may be called at once from
    several threads.
    """

    def __init__(
        self,
        function: str,
        *,
        environment: Mapping[str, str] | None = None,
        cpus: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        """Starts ``function``, named as ``"package.module:name"``, which returns the object.

        Args:
            function: takes ``kwargs``, which must be JSON.
            environment: variables to set on top of those of this process.
            cpus: the CPUs it may use; None leaves them as they are here.

        Raises:
            RuntimeError: it failed; the text holds what it wrote.
        """
        self.name = function
        self.idle_share = 0.0
        """The largest share of one CPU that it used while waiting between two calls."""
        self._log = tempfile.TemporaryFile(prefix="benchmark-")  # noqa: SIM115, see close
        reading, writing = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.harness.child", "--serve", str(writing)],
                cwd=REPOSITORY,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                text=True,
            )
        finally:
            os.close(writing)
        self._replies = os.fdopen(reading)
        self._ask({"function": function, "cpus": cpus, "kwargs": kwargs})

    def call(self, method: str, **kwargs: Any) -> Any:
        """Calls a method of the object, with JSON in and out.

        Raises:
            RuntimeError: it failed; the text holds the traceback and what the process wrote.
        """
        return self._ask({"method": method, "kwargs": kwargs})

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._replies.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"{self.name} ended with status {status}; it wrote:\n{self._said()}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"{self.name}: {reply['error']}\nIt wrote:\n{self._said()}")
        self.idle_share = max(self.idle_share, reply["idle_share"])
        return reply["value"]

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-8000:]
