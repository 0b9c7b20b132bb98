"""`tutelage status RUN` beside a run at work: what its replicas do."""

import json

import pytest

from tests.drills.commands import reached, wait_until

pytestmark = pytest.mark.drill


def test_another_terminal_sees_the_replicas_of_a_run_and_then_its_end(home, job, tmp_path):
    command = home.start("run", str(job.config), f"paths.runs={tmp_path}")
    folder = str(tmp_path / "job")
    wait_until(reached(tmp_path / "job", 3), doing=command)
    told = json.loads(home.run("status", folder, "--json"))
    assert told["state"] == "at work"
    assert told["step"] >= 3
    assert told["eta_s"] > 0
    assert {replica["state"] for replica in told["replicas"]} == {"alive"}
    assert sum(replica["units"] for replica in told["replicas"]) > 0
    said = home.run("status", folder, "--watch")
    (line, *_) = [line for line in said.splitlines() if " replica-0 " in line]
    assert " alive " in line
    assert command.wait() == 0, command.output
    told = json.loads(home.run("status", folder, "--json"))
    assert (told["state"], told["eta_s"], told["replicas"]) == ("finished", None, [])
