"""The store of the compile cache: a folder with one file per key.

A file is written under another name and renamed, so it is there as a whole or not at all, and is
never changed afterwards. It is made of blobs, each on a multiple of 64 bytes, a JSON header that
says what they are, and a footer of fixed size::

    weights | code | header | magic, length of the header, SHA-256 of the header

Each blob's SHA-256 stands in the header. The first blob begins where the file does, which is where
`torch.from_file` can map it.

This module knows nothing of compilers; what goes into a key is `cache_key`'s business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger("neuron_ext")

_MAGIC = b"neuron_ext cache"
_FOOTER = struct.Struct("<16sQ32s")
_ALIGNMENT = 64
_MAX_HEADER_BYTES = 64 << 20
# Below that a copy costs less than a mapping.
_MIN_MAPPED_BYTES = 1 << 20
# A file that vanishes on the server of a network file system would kill whoever has it mapped.
_LOCAL_FILE_SYSTEMS = frozenset(
    {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}
)

_ENTRY = ".entry"
_UNFINISHED = "unfinished-"
# No writer pauses that long: what is older was left by one that is gone.
_UNFINISHED_SECONDS = 3600.0
# Longer than any compile: who waits that long does the work itself.
_LOCK_SECONDS = 3600.0

_DEFAULT_MAX_GB = 10.0
_OFF = "set NEURON_EXT_CACHE_DIR to another folder, or NEURON_EXT_CACHE=0 to do without"


@dataclasses.dataclass
class Entry:
    """What is kept under a key.

    Attributes:
        fields: anything that JSON holds.
        blobs: contiguous uint8 tensors; the first is the one that may be memory-mapped.
        digests: the SHA-256 of each blob, in hex. `Store.write` adds those that are missing.
    """

    fields: dict[str, Any]
    blobs: dict[str, torch.Tensor]
    digests: dict[str, str] = dataclasses.field(default_factory=dict)


class _UnusableError(Exception):
    """The file of an entry is damaged, or not to be trusted."""


def open_store() -> Store | None:
    """The store that the environment asks for, or None where it is off or cannot be had, which
    then one log line says.

    Raises:
        RuntimeError: if a variable has a value that means nothing.
    """
    switch = os.environ.get("NEURON_EXT_CACHE", "1")
    if switch not in ("0", "1"):
        raise RuntimeError(f"NEURON_EXT_CACHE is {switch!r}; expected 0 (off) or 1 (on)")
    max_bytes = _max_bytes()
    folder = _folder()
    if switch == "0":
        return None
    problem = "there is no home folder" if folder is None else _folder_problem(folder)
    if folder is None or problem is not None:
        _log.warning("the compile cache is off: %s; %s", problem, _OFF)
        return None
    return Store(folder, max_bytes)


def _max_bytes() -> int:
    text = os.environ.get("NEURON_EXT_CACHE_MAX_GB") or str(_DEFAULT_MAX_GB)
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not 0 < gigabytes < math.inf:
        raise RuntimeError(
            f"NEURON_EXT_CACHE_MAX_GB is {text!r}; expected a number of gigabytes above 0, such "
            "as 10 or 0.5. NEURON_EXT_CACHE=0 switches the cache off"
        )
    return int(gigabytes * 1e9)


def _folder() -> Path | None:
    text = os.environ.get("NEURON_EXT_CACHE_DIR")
    if text:
        folder = Path(text).absolute()
        if folder.exists() and not folder.is_dir():
            raise RuntimeError(
                f"NEURON_EXT_CACHE_DIR is {text!r}, which is a file; expected a directory"
            )
        return folder
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the XDG specification wants it
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return base / "neuron_ext" if base.is_absolute() else None


def _folder_problem(folder: Path) -> str | None:
    """Make the folder if it is missing; why it cannot be used, or None."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        return f"the folder {str(folder)!r} cannot be made: {error.strerror or error}"
    # Code out of it is executed: nobody else may have put it there.
    if status.st_uid != os.geteuid():
        return f"the folder {str(folder)!r} belongs to user {status.st_uid}, not {os.geteuid()}"
    if status.st_mode & 0o022:
        return (
            f"the folder {str(folder)!r} can be written by others (mode "
            f"{stat.S_IMODE(status.st_mode):04o}): chmod go-w makes it usable"
        )
    return None


class Store:
    """A folder of entries, for any number of processes at once.

    Nothing that goes wrong with the folder or its files raises: it is a miss, or nothing is kept,
    and one log line in the life of the instance says so. An instance serves one thread; any number
    of instances share a folder.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """``folder`` exists. Entries of more than ``max_bytes`` in all are dropped, least recently
        used first.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        self._warned = False

    def read(self, key: str) -> Entry | None:
        """The entry of that key, every byte of it checked, or None. Counts as a use of it.

        What cannot be used is removed.
        """
        path = self._path(key)
        try:
            # Not through a link, and without waiting for the writer of a pipe.
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._drop(path, error.strerror or str(error))
            return None
        with os.fdopen(file, "rb") as stream:
            try:
                entry = _parse(stream, key)
            except (_UnusableError, OSError, LookupError, TypeError, ValueError) as error:
                self._drop(path, str(error))
                return None
            with contextlib.suppress(OSError):
                os.utime(file)
        return entry

    def write(self, key: str, entry: Entry) -> None:
        """Keep the entry, in place of what was there; then make room."""
        for name, blob in entry.blobs.items():
            if name not in entry.digests:
                entry.digests[name] = hashlib.sha256(blob.numpy().data).hexdigest()
        header = _header(key, entry)
        size = _end(entry) + len(header) + _FOOTER.size
        if size > self._max_bytes:
            self._warn(
                f"an entry of {size / 1e9:.2g} GB is more than NEURON_EXT_CACHE_MAX_GB allows"
            )
            return
        unfinished = None
        try:
            file, unfinished = tempfile.mkstemp(prefix=_UNFINISHED, dir=self._folder)
            with os.fdopen(file, "wb") as stream:
                for blob in entry.blobs.values():
                    stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
                    stream.write(blob.numpy().data)
                stream.write(header)
                stream.write(_FOOTER.pack(_MAGIC, len(header), hashlib.sha256(header).digest()))
            os.replace(unfinished, self._path(key))
            unfinished = None
            self._make_room(self._path(key))
        except OSError as error:
            self._warn(f"nothing is kept in {str(self._folder)!r}: {error.strerror or error}")
        finally:
            if unfinished is not None:
                with contextlib.suppress(OSError):
                    os.unlink(unfinished)

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold what other processes and threads wait for that want the same key.

        The kernel frees it when the process ends, however that happens. Where the folder cannot
        hold a lock, nobody waits.
        """
        import filelock

        # A few files that stay: removing a lock that others wait for is a race. Two keys seldom
        # share one, and then only wait.
        lock = filelock.FileLock(self._folder / f"{key[:2]}.lock", timeout=_LOCK_SECONDS)
        held = False
        try:
            lock.acquire()
            held = True
        except (OSError, NotImplementedError) as error:
            # Among them filelock.Timeout. A folder that cannot be written says so when it matters.
            _log.debug("the compile cache is used without a lock: %s", error)
        try:
            yield
        finally:
            if held:
                lock.release()

    def _path(self, key: str) -> Path:
        return self._folder / (key + _ENTRY)

    def _drop(self, path: Path, why: str) -> None:
        self._warn(f"{str(path)!r} is not used and will be replaced: {why}")
        with contextlib.suppress(OSError):
            path.unlink()

    def _warn(self, text: str) -> None:
        if not self._warned:
            _log.warning("compile cache: %s", text)
        self._warned = True

    def _make_room(self, newest: Path) -> None:
        """Remove what was used least recently, and what killed writers left."""
        entries: list[tuple[float, int, str]] = []
        abandoned = time.time() - _UNFINISHED_SECONDS
        with os.scandir(self._folder) as found:
            for one in found:
                try:
                    status = one.stat(follow_symlinks=False)
                    if one.name.endswith(_ENTRY):
                        entries.append((status.st_mtime, status.st_size, one.path))
                    elif one.name.startswith(_UNFINISHED) and status.st_mtime < abandoned:
                        os.unlink(one.path)
                except FileNotFoundError:  # another process was faster
                    continue
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._max_bytes:
                return
            if path != str(newest):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size


def _end(entry: Entry) -> int:
    """Where the header begins."""
    end = 0
    for blob in entry.blobs.values():
        end = _aligned(end) + blob.numel()
    return end


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _header(key: str, entry: Entry) -> bytes:
    blobs = [
        {"name": name, "size": blob.numel(), "sha256": entry.digests[name]}
        for name, blob in entry.blobs.items()
    ]
    return json.dumps({"key": key, "blobs": blobs, "fields": entry.fields}).encode()


def _parse(stream: io.BufferedReader, key: str) -> Entry:
    status = os.fstat(stream.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise _UnusableError("it is no regular file")
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise _UnusableError(f"others than user {os.geteuid()} may have written it")
    footer = os.pread(stream.fileno(), _FOOTER.size, max(0, status.st_size - _FOOTER.size))
    if len(footer) != _FOOTER.size:
        raise _UnusableError("it is cut short")
    magic, length, digest = _FOOTER.unpack(footer)
    start = status.st_size - _FOOTER.size - length
    if magic != _MAGIC or length > _MAX_HEADER_BYTES or start < 0:
        raise _UnusableError("it does not end as an entry ends")
    header = os.pread(stream.fileno(), length, start)
    if hashlib.sha256(header).digest() != digest:
        raise _UnusableError("its header is damaged")
    content = json.loads(header)
    if content["key"] != key:
        raise _UnusableError("it is the entry of another key")
    entry = Entry(content["fields"], {})
    position = 0
    for blob in content["blobs"]:
        position = _aligned(position)
        tensor = _read_blob(stream, position, blob["size"])
        if hashlib.sha256(tensor.numpy().data).hexdigest() != blob["sha256"]:
            raise _UnusableError(f"its {blob['name']} is damaged")
        entry.blobs[blob["name"]] = tensor
        entry.digests[blob["name"]] = blob["sha256"]
        position += blob["size"]
    return entry


def _read_blob(stream: io.BufferedReader, position: int, size: int) -> torch.Tensor:
    if position + size > os.fstat(stream.fileno()).st_size:
        raise _UnusableError("it is cut short")
    if position == 0 and size >= _MIN_MAPPED_BYTES and _is_local(stream):
        # By descriptor: the name may belong to another file by now.
        return torch.from_file(
            f"/proc/self/fd/{stream.fileno()}", shared=False, size=size, dtype=torch.uint8
        )
    data = torch.empty(size, dtype=torch.uint8)
    stream.seek(position)
    view = memoryview(data.numpy().data)
    while len(view):
        # A large file may be read in pieces.
        count = stream.readinto(view)
        if not count:
            raise _UnusableError("it is cut short")
        view = view[count:]
    return data


def _is_local(stream: io.BufferedReader) -> bool:
    """Whether the file system keeps a file that is open, whoever removes its name."""
    device = os.fstat(stream.fileno()).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    for line in mounts:
        left, _, right = line.partition(" - ")
        if left.split()[2] == wanted:
            return right.split()[0] in _LOCAL_FILE_SYSTEMS
    return False
