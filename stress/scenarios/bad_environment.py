"""Processes with little of something: each works, or says in one clear error what it lacks."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from stress.harness import cpp
from stress.harness.options import Options
from stress.harness.processes import crash_in, python, run_forked
from stress.harness.processes import run as run_process
from stress.harness.tally import Tally
from stress.harness.watchdog import Watchdog
from stress.subjects import constrained

_AT_ONCE = 2
_NOWHERE = "/proc/neuron_ext"  # root cannot write there either


@dataclasses.dataclass
class _Case:
    """One environment, and what must come of it."""

    name: str
    arguments: Sequence[object]
    expected: str = "ok or an error"
    """``ok``, or a text that the error must have, or that either will do."""
    settings: dict[str, object] = dataclasses.field(default_factory=dict)
    preload: str = ""
    """A library of ``stress/cpp`` that is loaded first."""
    shell: str = ""
    """What a shell does before it becomes the process."""
    mounts: str = ""
    """What a shell does before, in a mount namespace of its own, which only root can have."""
    slow: bool = False


_READ_ONLY = "mount -o remount,bind,ro / && mount -o remount,bind,ro /dev/shm"
_NO_SHM = """
keep=$(mktemp -d) && mount --bind /dev $keep && mount -t tmpfs none /dev && touch /dev/null &&
mount --bind $keep/null /dev/null && touch /dev/urandom && mount --bind $keep/urandom /dev/urandom
"""
# Version 1 of cgroups, or 2: a quota of one CPU.
_QUOTA = """
cd $(mktemp -d) && echo 100000 > value && echo "100000 100000" > both &&
if [ -e /sys/fs/cgroup/cpu/cpu.cfs_quota_us ]
then mount --bind value /sys/fs/cgroup/cpu/cpu.cfs_quota_us
else mount -t tmpfs none /sys/fs/cgroup && cp both /sys/fs/cgroup/cpu.max
fi
"""


def _cases() -> list[_Case]:
    one_cpu = min(os.sched_getaffinity(0))
    cases = [
        _Case("64 file descriptors", ["files", 64], "ok"),
        _Case("a stack of 512 kB", ["nothing"], "ok", shell="ulimit -s 512", slow=True),
        _Case(
            "one CPU", ["nothing"], "ok", shell=f"taskset -cp {one_cpu} $$ >/dev/null", slow=True
        ),
        _Case(
            "a lock folder that cannot be",
            ["nothing"],
            _NOWHERE,
            {"NEURON_EXT_LOCK_DIR": _NOWHERE, "NEURON_RT_NUM_CORES": 1},
        ),
        _Case("files of 0 bytes", ["file size", 0], slow=True),
        _Case(
            "no home and no cache folder",
            ["trace"],
            "ok",
            {"HOME": _NOWHERE, "XDG_CACHE_HOME": _NOWHERE, "NEURON_EXT_CACHE_DIR": _NOWHERE},
            slow=True,
        ),
        _Case("no temporary folder", ["nothing"], "ok", {"TMPDIR": _NOWHERE}, slow=True),
        _Case("files of 100 kB", ["file size", 100_000], slow=True),
        _Case(
            "/dev/shm is no folder",
            ["nothing"],
            "/dev/null",
            {"NEURON_EXT_LOCK_DIR": "/dev/null", "NEURON_EXT_EXCLUSIVE": 1},
            slow=True,
        ),
    ]
    cases += [
        _Case("memory files refused", ["nothing"], "ok", preload="no_memfd", slow=True),
        _Case(
            "memory files refused, all files read-only",
            ["nothing"],
            "memfd_create",
            preload="no_memfd",
            mounts=_READ_ONLY,
            slow=True,
        ),
        _Case("binding to CPUs refused", ["nothing"], "ok", preload="no_affinity", slow=True),
        _Case("all files read-only", ["nothing"], "ok", mounts=_READ_ONLY, slow=True),
        _Case("a compile, all files read-only", ["trace"], mounts=_READ_ONLY, slow=True),
        _Case("no /dev/shm", ["nothing"], "ok", mounts=_NO_SHM, slow=True),
        _Case("a cgroup's quota of one CPU", ["nothing"], "ok", mounts=_QUOTA, slow=True),
    ]
    cases += [
        _Case(f"{number} more file descriptors", ["few files", number], slow=True)
        for number in range(9)
    ]
    cases += [
        _Case(f"{number} MB more, for 100 MB of weights", ["memory", number], slow=True)
        for number in (20, 60, 90, 110, 150, 220, 300, 400)
    ]
    cases += [
        _Case(f"{number} MB of memory", ["little memory", number], slow=number != 1)
        for number in (0, 1, 2, 4, 7, 11)
    ]
    return cases


def run(options: Options, tally: Tally, watchdog: Watchdog) -> None:
    cases = [case for case in _cases() if options.environments or not case.slow]
    if any(case.arguments[0] == "memory" for case in cases):
        with watchdog.operation("making a large file"):
            status, _, stderr = run_forked(
                constrained.main, str(options.models), "large file", timeout=options.wait_limit
            )
        if not tally.expect(status == 0, f"the large file: {status}: {stderr[-2000:]}"):
            return

    if not _mounts_work():
        tally.note(f"{sum(bool(case.mounts) for case in cases)} that need root were left out")
        cases = [case for case in cases if not case.mounts]
    for case in cases:
        if case.preload:
            with watchdog.operation(f"building {case.preload}"):
                folder = cpp.build(options.folder, case.preload)
            case.settings["LD_PRELOAD"] = folder / f"lib{case.preload}.so"

    def try_one(case: _Case) -> None:
        _judge(case, options, tally)

    # No operation for the watchdog: each process has a limit of its own.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(try_one, cases))


def _mounts_work() -> bool:
    try:
        return run_process(["unshare", "-m", "mount", "--bind", "/tmp", "/tmp"])[0] == 0
    except OSError:
        return False


def _judge(case: _Case, options: Options, tally: Tally) -> None:
    arguments = [str(word) for word in (options.models, *case.arguments)]
    if case.shell or case.preload or case.mounts:
        command = python("-m", "stress.subjects.constrained", *arguments)
        words = " ".join(shlex.quote(str(word)) for word in command)
        first = f"{case.shell}\n" if case.shell else ""
        if case.mounts:
            first += f"{{ {case.mounts}\n}} || exit 99\n"
        shell = [*(["unshare", "-m"] if case.mounts else []), "bash", "-c", f"{first}exec {words}"]
        status, stdout, stderr = run_process(shell, case.settings, options.wait_limit)
    else:
        status, stdout, stderr = run_forked(
            constrained.main, *arguments, settings=case.settings, timeout=options.wait_limit
        )
    said = stdout.strip()
    last = f"{said[-1000:]} {stderr[-2000:]}"
    tally.count("processes")
    if status is None:
        tally.fail(f"{case.name}: hung: {last}")
    elif status != 0 or crash_in(stderr):
        tally.fail(f"{case.name}: ended with {status}: {last}")
    elif said == "ok":
        tally.count("that worked")
        fits = case.expected in ("ok", "ok or an error")
        tally.expect(fits, f"{case.name}: worked, expected an error with {case.expected!r}")
    else:
        tally.count("that said what they lack")
        # The names by which C++ and Python programs know that memory ran out are clear enough;
        # Python's own error has no text.
        names = ("bad_alloc", "MemoryError")
        clear = said.startswith("error") and (
            len(said.split()) > 4 or any(name in said for name in names)
        )
        fits = case.expected == "ok or an error" or case.expected in said
        tally.expect(clear and fits, f"{case.name}: {last}, expected {case.expected}")
