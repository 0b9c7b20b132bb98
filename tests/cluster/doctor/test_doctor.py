"""`tutelage doctor` on this machine and its cluster, as a user runs it."""

import json
import subprocess
import sys

import ray
import torch

from cluster.cli import main

SECRET = "hf_never_to_be_printed"


def findings(capsys) -> tuple[dict, dict[str, dict]]:
    told = json.loads(capsys.readouterr().out)
    return told["machine"], {f["about"]: f for f in told["findings"]}


def test_this_machine_is_described_as_it_is(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert main(["doctor", "--json"]) == 0
    machine, found = findings(capsys)
    assert machine["packages"]["torch"] == torch.__version__
    assert machine["torch"]["gpus"] == torch.cuda.device_count()
    every = len(machine["packages"])
    assert f"{every} of {every} as required" in found["packages"]["said"]
    assert found["packages"]["verdict"] == "ok"
    assert "Hugging Face" in found["tokens"]["said"]
    assert SECRET not in json.dumps([machine, found])


def test_each_node_looks_at_itself(ray_cluster, capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"1 node, Ray {ray.__version__}" in said
    assert "the same releases" in said
    assert ray.available_resources() == ray.cluster_resources(), "it takes nothing"


def test_a_place_without_room_stops_a_run_and_is_named(capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("HF_HOME", "/proc/nowhere")
    assert main(["doctor"]) == 2
    said = capsys.readouterr()
    assert "0 bytes free at /proc/nowhere" in said.out
    assert "no run can work before this is mended: disk: models of the hub" in said.err


def test_a_cluster_that_does_not_answer_is_a_finding():
    command = [sys.executable, "-m", "cluster", "doctor", "--address", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in done.stdout
    assert done.stderr == "UserError: no run can work before this is mended: cluster\n"
