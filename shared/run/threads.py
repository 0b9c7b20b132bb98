"""How many threads a process computes with."""

import os
import sys


def use_threads(cpus: float) -> None:
    """Compute with as many threads as whole CPUs were asked for, at least one.

    Said in the process itself, best before it imports torch: a Ray process with an environment of
    its own is started twice.
    """
    threads = max(1, int(cpus))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
