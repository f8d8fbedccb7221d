"""What tests of worker processes tell workers to do, and how the two talk. Holds no tests."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from bucket_helpers import config, make_pooled

PATIENCE = 120


def note(folder, name):
    """Tell the test this process's id, in a file that is there whole or not at all."""
    path = Path(folder, f"{name}.part")
    path.write_text(str(os.getpid()))
    path.rename(Path(folder, str(name)))


def wait_for(folder, *names):
    deadline = time.monotonic() + PATIENCE
    while not all(Path(folder, name).exists() for name in names):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{names} did not come")
        time.sleep(0.01)


def pid_in(folder, name):
    return int(Path(folder, name).read_text())


def is_gone(pid):
    """Whether a process has ended; one that nobody has collected yet has ended, too."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


def each(folder, count=2, **options):
    """The configuration that gives func a folder and the number of its bucket."""
    kwargs = [{"folder": str(folder), "index": i, **options} for i in range(count)]
    return config(func_kwargs=kwargs)


# ------------------------------------------------------------------------- what a worker calls


def start_a_child(folder, index):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path(folder, f"child-{index}").write_text(str(child.pid))


def meet(folder, index):
    """Needs the other bucket to be under way."""
    note(folder, index)
    wait_for(folder, "0", "1")
    logging.getLogger("neuron_ext").warning("a word from both")
    logging.getLogger("neuron_ext").warning("a word from %d", index)
    logging.getLogger("neuron_ext").info("nobody wants to know")
    if torch.get_default_dtype() != torch.float64:
        raise AssertionError(torch.get_default_dtype())
    return make_pooled()


def count_living(folder, index):
    note(folder, index)
    living = [
        one.name for one in Path(folder).glob("[0-9]") if not is_gone(pid_in(folder, one.name))
    ]
    note(folder, f"living-{len(living)}-{index}")
    return make_pooled()


def leave_a_thread(folder, index):
    """A process with such a thread does not end by itself."""
    note(folder, index)
    start_a_child(folder, index)
    threading.Thread(target=threading.Event().wait).start()
    return make_pooled()


def fail_in_one(folder, index):
    if index == 1:
        raise KeyError("weight")
    note(folder, "patient")
    wait_for(folder, "never")


def die(folder, index, how):
    if index == 0:
        start_a_child(folder, index)
        note(folder, index)
        wait_for(folder, "never")
    wait_for(folder, "0")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(7)


def wait_for_ever(folder, index):
    start_a_child(folder, index)
    note(folder, index)
    wait_for(folder, "never")
