"""What memory this process has; megabytes are 10^6 bytes, as file sizes are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# For the environment of a process that measures loads. glibc serves large blocks from fresh pages
# until one was freed, and from then on may reuse them: a second load would look faster and smaller
# than the first, for some sizes of tensors. A fixed threshold makes each load the first.
FRESH_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}


@dataclass(frozen=True)
class Resident:
    """Resident memory in megabytes.

    ``private`` is in no other process: what ending this one would free. ``anonymous`` is the part
    of it that stands in no file. ``all`` counts pages shared with other processes as well, most of
    them libraries.
    """

    private: float
    anonymous: float
    all: float

    def __sub__(self, other: Resident) -> Resident:
        return Resident(
            self.private - other.private, self.anonymous - other.anonymous, self.all - other.all
        )


def resident() -> Resident:
    """Of this process, now."""
    fields = _fields("smaps_rollup")
    return Resident(
        fields["Private_Clean"] + fields["Private_Dirty"], fields["Anonymous"], fields["Rss"]
    )


def reset_peak() -> None:
    """From here on `peak` counts."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """The most that was resident since `reset_peak`, as ``Resident.all`` counts it."""
    return _fields("status")["VmHWM"]


def _fields(name: str) -> dict[str, float]:
    """The lines "field: N kB" of a file about this process, in megabytes."""
    lines = [line.split() for line in Path("/proc/self", name).read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) * 1024 / 1e6 for line in lines if line[2:] == ["kB"]}
