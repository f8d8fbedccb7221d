"""One scenario, in a process of its own."""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from stress.harness.options import Options
from stress.harness.tally import Tally
from stress.harness.watchdog import Watchdog
from stress.scenarios import SCENARIOS


def run_scenario(
    name: str, options: Options, result: Path, log: int, env: Mapping[str, str]
) -> None:
    """The whole life of a process that was forked for it, and which leads a session of its own.

    Args:
        name: of `SCENARIOS`, or ``prepare``, which makes the models.
        result: the file for the `Outcome`, in the folder to work in.
        log: a file descriptor for what would go to stdout and stderr.
    """
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(result.parent)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # it comes from the environment again
    faulthandler.enable(2)
    tally = Tally()
    start = time.monotonic()
    try:
        if name == "prepare":
            from stress.harness import nets

            nets.make_files(options.models, options.native)
        else:
            scenario = importlib.import_module(f"stress.scenarios.{SCENARIOS[name]}")
            with Watchdog(options.wait_limit) as watchdog:
                scenario.run(options, tally, watchdog)
    except Exception:
        tally.fail(f"the scenario itself: {traceback.format_exc()}")
    outcome = tally.outcome(name, time.monotonic() - start)
    outcome.save(result)
    sys.exit(1 if outcome.failures else 0)
