"""The bars of a probe: memory within 15 % of what it says, the time of a step within 30 %."""

from pathlib import Path

import pytest

from tests.benchmarks.probing import PAIRS, compare

MEMORY, TIME = 0.15, 0.30


@pytest.mark.benchmark
@pytest.mark.parametrize("name", [name for name, pair in PAIRS.items() if "real" in pair.recipe])
def test_a_run_takes_what_its_probe_says(name: str, reference: Path, tmp_path: Path) -> None:
    found = compare(PAIRS[name], folder=tmp_path, models=reference)
    assert all(abs(ratio - 1) <= MEMORY for ratio in found.memory.values()), found
    assert abs(found.step - 1) <= TIME, found
