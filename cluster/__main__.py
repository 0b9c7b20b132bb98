"""The program `tutelage`, also `python -m cluster`: it answers signals from its first moments on,
while the command line is still to be imported, and has its exit code to its last."""

import sys

from cluster.session import interrupts


def program() -> int:
    """Run the command line that this process was called with; returns its exit code."""
    with interrupts.handling(to_the_end=True):
        try:
            from cluster.cli import main

            return main()
        except KeyboardInterrupt:
            print(interrupts.UNSAVED, file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(program())
