"""Numbers for people: times, counts and sizes as a line on the terminal shows them."""

import math
from collections.abc import Sequence

NAME_WIDTH = 18  # of a domain or a teacher in a line


def duration(seconds: float) -> str:
    """A time such as 1h05m, 3m07s or 12s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def thousands(value: float) -> str:
    """A count such as 1.2k, or 950."""
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def in_bytes(size_bytes: float) -> str:
    """A size such as 3.5 GB, in powers of 1000."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(math.log10(max(1, size_bytes)) // 3))
    return f"{size_bytes / 1000**power:,.{1 if power else 0}f} {units[power]}"


def shortened(name: str, width: int = NAME_WIDTH) -> str:
    """A name for a line or a column of a table."""
    return name if len(name) <= width else name[: width - 2] + ".."


def counted(number: int, noun: str) -> str:
    """A number of things such as 1 worker, or 4 workers."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def named(names: Sequence[str], *, most: int = 6) -> str:
    """The first names, with how many more there are."""
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def those(number: int, one: str, many: str) -> str:
    """A number of things with what is said of them, as 1 text is cut, or 4,000 texts are cut."""
    return f"{number:,} {one if number == 1 else many}"
