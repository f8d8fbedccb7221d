"""The scenarios, one module each, in the order of the table.

Each has ``run(options, tally)``, which runs in a process of its own.
"""

from __future__ import annotations

SCENARIOS = {
    "load": "load_and_moves",
    "leaks": "leaks",
    "killed": "killed",
    "cores": "racing_for_cores",
    "fork": "forks",
    "exit": "exits",
    "environment": "bad_environment",
}
"""From the name in the table to the module."""
