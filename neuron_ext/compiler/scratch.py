"""Temporary folders that do not outlive a killed process for long.

Each is locked while its owner lives, and the kernel frees the lock however a process ends. Whoever
makes a folder first removes those of the same user that nobody has locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "neuron_ext-"


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[str]:
    """A new folder named after ``purpose`` in the folder for temporary files; removed in the end.

    On a file system without locks the folders of killed processes stay. Thread-safe.

    Raises:
        OSError: there is no folder for temporary files.
    """
    prefix = f"{_PREFIX}{purpose}-"
    _remove_abandoned(prefix)
    folder, lock = _make(prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make(prefix: str) -> tuple[str, int]:
    while True:
        folder = tempfile.mkdtemp(prefix=prefix)
        # Another process may find it before it is locked, and take it for abandoned.
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if Path(folder).is_dir():
            return folder, lock
        os.close(lock)


def _remove_abandoned(prefix: str) -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # not ours, no folder, or gone
            continue
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # in use, or no locks here
            continue
        finally:
            os.close(lock)
