"""What memory and speed there are: of GPUs by name, of this machine as it says.

Peaks are the vendors' dense figures without sparsity, bfloat16 with float32 sums, and float32
without TF32.
"""

import difflib
import os
import re
from dataclasses import dataclass

from shared.errors import ConfigError

GIB = 2**30
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{unit}I": 1024**power for power, unit in enumerate("KMGT", start=1)}
SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Device:
    """What one process computes on."""

    name: str
    memory_bytes: int
    bfloat16_flops: float | None  # a second at peak; None: not known
    float32_flops: float | None

    def peak(self, dtype: str) -> float | None:
        """Operations a second at best in a dtype."""
        return self.bfloat16_flops if dtype == "bfloat16" else self.float32_flops


GPUS = {
    "T4": Device("T4", 16 * 10**9, 8.1e12, 8.1e12),
    "V100": Device("V100", 32 * GIB, 15.7e12, 15.7e12),
    "A10": Device("A10", 24 * GIB, 125e12, 31.2e12),
    "RTX-3090": Device("RTX-3090", 24 * GIB, 71e12, 35.6e12),
    "RTX-4090": Device("RTX-4090", 24 * GIB, 165e12, 82.6e12),
    "L4": Device("L4", 24 * GIB, 121e12, 30.3e12),
    "L40S": Device("L40S", 48 * GIB, 362e12, 91.6e12),
    "A40": Device("A40", 48 * GIB, 149.7e12, 37.4e12),
    "A100-40GB": Device("A100-40GB", 40 * GIB, 312e12, 19.5e12),
    "A100": Device("A100", 80 * GIB, 312e12, 19.5e12),
    "H100": Device("H100", 80 * GIB, 989e12, 67e12),
    "H200": Device("H200", 141 * 10**9, 989e12, 67e12),
    "B200": Device("B200", 180 * 10**9, 2250e12, 80e12),
}


def gpu_named(name: str) -> Device:
    """A GPU by name. Raises ConfigError for one that is not known."""
    found = {known.upper(): device for known, device in GPUS.items()}.get(name.upper())
    if found is None:
        near = difflib.get_close_matches(name.upper(), GPUS, n=1, cutoff=0.0)
        raise ConfigError(
            f"--gpu is {name!r}, which is not known; did you mean {near[0]}? There are "
            f"{', '.join(GPUS)}; or give its memory alone, as --gpu-memory 80GiB"
        )
    return found


def size_of(text: str, *, option: str) -> int:
    """Bytes of a size as 80GiB, 24GB or 512M. Raises ConfigError for anything else."""
    match = SIZE.fullmatch(text)
    size = round(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size <= 0:
        raise ConfigError(f"{option} is {text!r}, which is no size; write one as 80GiB or 24GB")
    return size


def machine_memory() -> int:
    """Bytes of this machine, or of the container that it is."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            return min(whole, int(file.read()))
    except (OSError, ValueError):  # none, or "max"
        return whole
