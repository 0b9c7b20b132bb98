"""What commands on configs hand to the driver."""

import time

import pytest

from cluster.commands import runs
from shared.run.start import StartClock
from tests.cluster.jobs import write_job


@pytest.mark.parametrize("building", [[], ["models"]])
def test_the_built_in_models_are_no_part_of_a_start(tmp_path, tiny_pair, monkeypatch, building):
    job, built, clocks = write_job(tmp_path, tiny_pair), [], []

    def build(config):
        built.append(time.time())
        return config

    def drive(config, *, fresh: bool, address: str | None, clock: StartClock) -> None:
        clocks.append(clock)

    monkeypatch.setattr(runs, "stages_to_build", lambda config: building)
    monkeypatch.setattr(runs, "made", build)
    monkeypatch.setattr("cluster.launch.driver.run", drive)
    runs.run(job, [])
    assert (clocks[0].moments["began"] >= built[0]) == bool(building)
