"""What Ray says of its own accord, in a line: on a command's terminal and in its errors."""

import re
from typing import Any

from ray._private import worker

_VERSION = re.compile(r"^ +(Ray|Python): (\S+)$", re.M)
_LOST_NODE = re.compile(r"^The node with node id: \w+ and address: (\S+) and node name")
# Of a head that was ended on purpose, as with all processes of a job.
_ENDED = re.compile(r"^The autoscaler failed with the following error:\s+Terminated with signal")


def in_one_line() -> None:
    """Let Ray say in one line that it lost a node, in place of a paragraph, and nothing of the
    helper of a head that was ended."""
    theirs = worker.print_to_stdstream
    if getattr(theirs, "in_one_line", False):
        return

    def said(message: dict[str, Any], ignore_prefix: bool) -> None:
        text = "\n".join(message["lines"])
        if found := _LOST_NODE.match(text):
            print(f"the cluster lost the node {found[1]}", flush=True)
        elif not _ENDED.match(text):
            theirs(message, ignore_prefix)

    said.in_one_line = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = said


def other_versions(said: str) -> str | None:
    """What a cluster runs and what is installed here, of Ray's words about a mismatch; None for
    other words."""
    found = _VERSION.findall(said)
    if not said.startswith("Version mismatch") or len(found) != 4:
        return None
    theirs, ours = (" and ".join(map(" ".join, pair)) for pair in (found[:2], found[2:]))
    return f"runs {theirs}, but {ours} are installed here; install the same versions on both"
