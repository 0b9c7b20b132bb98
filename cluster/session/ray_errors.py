"""What Ray says on a command's terminal of its own accord."""

import re
from typing import Any

from ray._private import worker

_LOST_NODE = re.compile(r"^The node with node id: \w+ and address: (\S+) and node name")


def in_one_line() -> None:
    """Let Ray say in one line that it lost a node, in place of a paragraph."""
    theirs = worker.print_to_stdstream
    if getattr(theirs, "in_one_line", False):
        return

    def said(message: dict[str, Any], ignore_prefix: bool) -> None:
        found = _LOST_NODE.match("\n".join(message["lines"]))
        if found:
            print(f"the cluster lost the node {found[1]}", flush=True)
        else:
            theirs(message, ignore_prefix)

    said.in_one_line = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = said
