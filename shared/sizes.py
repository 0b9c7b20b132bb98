"""Numbers of bytes as people read them."""

import math


def in_bytes(size: float) -> str:
    """A size for people."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(math.log10(max(1, size)) // 3))
    return f"{size / 1000**power:,.{1 if power else 0}f} {units[power]}"
