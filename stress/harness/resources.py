"""What a process holds: descriptors, mappings, threads, memory."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import gc
import os
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Held:
    """What this process held at one moment."""

    descriptors: int
    file_maps: int
    """Mappings of files, memory files among them."""
    maps: int
    threads: dict[str, int]
    """By name, without the numbers in it."""
    resident_kb: int

    def text(self) -> str:
        return (
            f"{self.descriptors} descriptors, {self.maps} maps ({self.file_maps} of files), "
            f"{sum(self.threads.values())} threads, {self.resident_kb / 1024:.1f} MB"
        )


def held() -> Held:
    """Counts, after a collection of garbage, and with free memory given back to the kernel."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    maps = Path("/proc/self/maps").read_text().splitlines()
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return Held(
        # One is the folder that is being read.
        descriptors=len(os.listdir("/proc/self/fd")) - 1,
        file_maps=sum("/" in line for line in maps),
        maps=len(maps),
        threads=_threads(),
        resident_kb=next(int(line.split()[1]) for line in rollup if line.startswith("Rss:")),
    )


def _threads() -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it ended meanwhile
            counts[(task / "comm").read_text().strip().rstrip("0123456789")] += 1
    return dict(counts)
