"""What a run was asked for, and which questions there are.

A module in ``benchmarks/questions`` defines ``QUESTIONS``: a dict from the id of a question to a
function that takes `Options` and returns a `Table` or a list of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.table import Table

REPOSITORY = Path(__file__).resolve().parents[2]
QUICK_MODELS = ("affine", "mlp", "minilm")
Question = Callable[["Options"], "Table | list[Table]"]


@dataclass
class Options:
    """One run.

    ``quick`` asks for the small models and short windows; ``rounds`` is how often each subject is
    measured; ``workdir`` keeps what is compiled between runs; ``only`` names the questions, all if
    empty, by their ids or by the beginning of an id up to a dot; ``window`` is how many seconds a
    throughput is measured.
    """

    quick: bool = True
    rounds: int = 5
    workdir: Path = REPOSITORY / "build" / "benchmarks"
    only: list[str] = field(default_factory=list)
    window: float = 1.5

    def wants(self, question: str) -> bool:
        """Whether ``question`` is among those asked for."""
        names = self.only or [question]
        # A table's id may go on where the question's ends.
        return any(belongs(question, name) or belongs(name, question) for name in names)

    def takes(self, model: str) -> bool:
        """Whether a run takes a model: a quick one only the small ones, unless asked by name."""
        return not self.quick or bool(self.only) or model in QUICK_MODELS


def questions() -> dict[str, Question]:
    """All questions, by id, in the order of their modules.

    Raises:
        ValueError: two modules define the same id.
    """
    import benchmarks.questions as package

    found: dict[str, Question] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, question in getattr(module, "QUESTIONS", {}).items():
            if name in found:
                raise ValueError(f"question {name!r} is defined twice, again in {info.name}.py")
            found[name] = question
    return found


def belongs(id: str, to: str) -> bool:
    """Whether an id, as of a table, is another one, as of its question, or goes on after a dot."""
    return f"{id}.".startswith(f"{to}.")


def place_of(table: str) -> int:
    """Where the table of that id stands among the others: in the order of the questions, and behind
    all of them if its question is no longer there.
    """
    known = list(questions())
    return next((n for n, question in enumerate(known) if belongs(table, question)), len(known))
