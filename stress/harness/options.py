"""How much of everything a run does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Options:
    """The numbers of one run, and the folders that it uses."""

    minutes: float
    """How long the load scenario lasts, at least."""
    requests: int
    """How many requests it makes, at least."""
    cycles: int
    """Of load, run, move, unload and delete, in the leak scenario."""
    kills: int
    """Processes killed in each phase."""
    traces: bool
    """Whether processes are killed while they compile, too."""
    races: int
    """Rounds of processes that race for cores."""
    forks: int
    """Forks of a parent with loads in flight, for each way to use the module."""
    exits: int
    """Processes that end at a random moment."""
    cpp_exits: int
    """The same of a C++ program."""
    environments: bool
    """All bad environments, or only the quick ones."""
    native: bool
    """Whether there is native code at all: compiling it takes most of a short run."""
    wait_limit: float = 120.0
    """Seconds that any one operation may take."""
    seed: int = 0
    folder: Path = Path()
    """What the run writes. Gone when it ends."""
    cache: Path = Path()
    """The compile cache of the scenarios that do not try to break it."""

    @property
    def models(self) -> Path:
        """The folder of the files that `harness.nets.make_files` made."""
        return self.folder / "models"


SCALES = {
    "full": Options(
        minutes=10,
        requests=200_000,
        cycles=1000,
        kills=20,
        traces=True,
        races=25,
        forks=20,
        exits=100,
        cpp_exits=100,
        environments=True,
        native=True,
    ),
    "quick": Options(
        minutes=0.4,
        requests=5_000,
        cycles=50,
        kills=3,
        traces=True,
        races=3,
        forks=2,
        exits=8,
        cpp_exits=0,
        environments=True,
        native=True,
    ),
    "smoke": Options(
        minutes=0.02,
        requests=200,
        cycles=10,
        kills=1,
        traces=False,
        races=1,
        forks=1,
        exits=1,
        cpp_exits=0,
        environments=False,
        native=False,
    ),
}
"""``smoke`` is what the tests run: it covers the program, and little else."""
