"""What the numbers were measured on, and with."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.harness.options import REPOSITORY

_PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "transformers", "diffusers", "numpy")
# Of the CPU's features those that decide how fast it multiplies.
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")


def machine() -> dict[str, object]:
    """CPU, memory and kernel of this machine, and the CPUs that this process may use."""
    import psutil

    cpuinfo = Path("/proc/cpuinfo").read_text()
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())
    }
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.machine()),
        "cpu_features": [name for name in _FEATURES if name in flags],
        "cpus": os.cpu_count(),
        "cores": psutil.cpu_count(logical=False),
        "cpus_used": sorted(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    """Of Python, of the packages that take part, of the compiler, and of the sources."""
    from neuron_ext import __version__

    found = {"python": platform.python_version(), "neuron_ext": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    found["compiler"] = _first_line("g++", "--version")
    commit = _first_line("git", "rev-parse", "--short", "HEAD")
    changed = _first_line("git", "status", "--porcelain", "--", "csrc", "neuron_ext", "benchmarks")
    found["commit"] = f"{commit}, with changes" if changed else commit
    return found


def load_average() -> list[float]:
    """Of the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


@contextmanager
def stolen_share() -> Iterator[Callable[[], float]]:
    """What the hypervisor gave to other machines of these CPUs' time, from 0 to 1.

    Asked when the block has ended; 0 where the kernel cannot tell.
    """
    import psutil

    shares: list[float] = []
    before, begin = _stolen_seconds(psutil), time.perf_counter()
    yield lambda: shares[0]
    seconds = (time.perf_counter() - begin) * len(os.sched_getaffinity(0))
    shares.append((_stolen_seconds(psutil) - before) / seconds)


def _stolen_seconds(psutil: Any) -> float:
    times = psutil.cpu_times(percpu=True)
    return sum(getattr(times[cpu], "steal", 0.0) for cpu in os.sched_getaffinity(0))


def cpus_for(count: int) -> list[int]:
    """The first ``count`` CPUs that this process may use, each on a physical core of its own.

    Raises:
        RuntimeError: there are not as many.
    """
    chosen: list[int] = []
    taken: set[str] = set()
    allowed = sorted(os.sched_getaffinity(0))
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text() if siblings.exists() else str(cpu)
        if core not in taken and len(chosen) < count:
            taken.add(core)
            chosen.append(cpu)
    if len(chosen) < count:
        raise RuntimeError(
            f"the questions are about {count} cores; this process may use {len(chosen)} "
            f"(CPUs {allowed})"
        )
    return chosen


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    except FileNotFoundError:
        return "missing"
    return (done.stdout.splitlines() or [""])[0].strip()
