"""``python -m stress.harness.child NAME OPTIONS RESULT`` runs one scenario in this process."""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from pathlib import Path

from stress.harness.options import Options
from stress.harness.tally import Tally
from stress.harness.watchdog import Watchdog
from stress.scenarios import SCENARIOS


def main() -> int:
    name, options_file, result_file = sys.argv[1:]
    options = Options.read(Path(options_file))
    tally = Tally()
    start = time.monotonic()
    try:
        if name == "prepare":
            from stress.harness import nets

            nets.make_files(options.models, options.native_weights)
        else:
            scenario = importlib.import_module(f"stress.scenarios.{SCENARIOS[name]}")
            with Watchdog(options.wait_limit) as watchdog:
                scenario.run(options, tally, watchdog)
    except Exception:
        tally.fail(f"the scenario itself: {traceback.format_exc()}")
    outcome = tally.outcome(name, time.monotonic() - start)
    outcome.save(Path(result_file))
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
