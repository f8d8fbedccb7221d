"""The other side of `in_new_process` and of `Worker`.

``python -m benchmarks.harness.child FUNCTION FILE`` calls a function once; with ``--serve FD`` it
makes an object and serves calls of its methods, one JSON line each, until stdin ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import resolve


def main() -> None:
    first, second = sys.argv[1:]
    if first == "--serve":
        serve(int(second))
    else:
        value = resolve(first)(**json.load(sys.stdin))
        Path(second).write_text(json.dumps(value))


def serve(descriptor: int) -> None:
    served: Any = None
    with os.fdopen(descriptor, "w") as replies:
        waiting_since: tuple[float, float] | None = None
        for line in sys.stdin:
            share = _share_since(waiting_since)
            try:
                request = json.loads(line)
                if "function" in request:
                    if request["cpus"] is not None:
                        os.sched_setaffinity(0, request["cpus"])
                    served = resolve(request["function"])(**request["kwargs"])
                    value = None
                else:
                    value = getattr(served, request["method"])(**request["kwargs"])
                reply = {"value": value, "idle_share": share}
            except Exception:
                reply = {"error": traceback.format_exc()}
            # What spins after its work counts from here on; before, the work itself would.
            waiting_since = (time.perf_counter(), time.process_time())
            replies.write(json.dumps(reply) + "\n")
            replies.flush()


def _share_since(waiting_since: tuple[float, float] | None) -> float:
    """The share of one CPU that this process used since then; 0 for a wait too short to tell."""
    if waiting_since is None:
        return 0.0
    elapsed = time.perf_counter() - waiting_since[0]
    used = time.process_time() - waiting_since[1]
    return used / elapsed if elapsed > 0.5 else 0.0


if __name__ == "__main__":
    main()
