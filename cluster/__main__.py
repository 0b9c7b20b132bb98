"""The program `tutelage`, also `python -m cluster`: it answers signals from its first moments on,
while the command line is still to be imported, and has its exit code to its last."""

import atexit
import os
import sys


class _End:
    """The end of this process once it has its exit code: Python would clear all modules away first,
    which with those of Ray takes a second or more, for nothing that is still to happen."""

    code: int | None = None

    def __call__(self) -> None:
        """Registered before all others, and so called after them."""
        if self.code is None:
            return
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            return  # which Python says
        os._exit(self.code)


_end = _End()
atexit.register(_end)

from cluster.session import interrupts  # noqa: E402  # what it imports registers what it has to do


def program() -> int:
    """Run the command line that this process was called with; returns its exit code, and the
    process ends with it."""
    try:
        with interrupts.handling(to_the_end=True):
            from cluster.cli import main

            _end.code = main()
    except KeyboardInterrupt:  # also while that begins
        print(interrupts.UNSAVED, file=sys.stderr)
        _end.code = 1
    return _end.code


if __name__ == "__main__":
    sys.exit(program())
