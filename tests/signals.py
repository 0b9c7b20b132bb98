"""Signals that a test sends to the command it runs in its own process."""

import os
import signal
import threading

from cluster.session.interrupts import DEAF_TO, EAR


def send(number: int) -> None:
    """Send a signal to this process as a command of its own would get it: its threads are all deaf
    to some but one, while a test's process has others, which the system may choose."""
    ears = [thread for thread in threading.enumerate() if thread.name == EAR]
    if number in DEAF_TO and ears:
        signal.pthread_kill(ears[-1].ident, number)  # type: ignore[arg-type]
    else:
        os.kill(os.getpid(), number)
