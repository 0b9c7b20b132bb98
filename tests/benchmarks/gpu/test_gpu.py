"""The prepared run for a GPU works and conforms on a CPU; a case that fails loses no other."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.benchmarks.gpu.sections import Record, Section, measure

ROOT = Path(__file__).resolve().parents[3]
BARRED = ("ray", "pydantic")  # transformers itself looks for some of the others
RUN = f"""
import runpy, sys
class Bar:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BARRED}:
            raise ImportError(f"{{name}} is not on that machine")
sys.meta_path.insert(0, Bar())
runpy.run_module("tests.benchmarks.gpu", run_name="__main__")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The record of a small run where only what such a machine has can be imported."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, "-c", RUN, "--device", "cpu", "--small", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_every_section_has_its_numbers(found: dict):
    assert {"torch", "device"} <= set(found["machine"])
    assert list(found)[1:] == [
        "matrix product",
        "conformance",
        "token loss",
        "teacher",
        "student",
        "wire",
    ]
    cases = {f"{s} / {c}": numbers for s in list(found)[1:] for c, numbers in found[s].items()}
    assert {name: numbers for name, numbers in cases.items() if "failed" in numbers} == {}
    left_out = [name for name, numbers in cases.items() if "left_out" in numbers]
    assert all("TRL" in name or "Liger" in name for name in left_out)
    assert found["token loss"]["ours, whole, N = 48"]["seconds"] > 0
    scoring = found["teacher"]["tiny"]
    assert {"decoder", "forward", "top_k", "threshold", "sampled"} <= set(scoring)
    assert scoring["top_k / forward"] > 0
    assert scoring["decoder rate"] > 0
    assert {"token loss, 64 ids", "dense KL", "cross-entropy"} <= set(found["student"])


def test_scoring_selectors_and_losses_conform(found: dict):
    conformance = found["conformance"]
    assert len(conformance) == 2 * (3 + 6)
    for name, numbers in conformance.items():
        assert numbers["conforms"], (name, numbers)
        assert max(numbers["errors"].values()) <= numbers["bar"], name
    assert max(conformance["top_k bf16"]["errors"].values()) > 1e-4  # it is that type's


@pytest.mark.parametrize(("encoding", "error"), [("fp16", 0.004), ("int8", 0.02)])
def test_what_is_encoded_comes_back(found: dict, encoding: str, error: float):
    numbers = found["wire"][encoding]
    assert numbers["same_ids"]
    assert 0 < numbers["logprob_error"] < error
    assert 8 < numbers["bytes_per_position"] < 40


def test_a_case_that_fails_or_hangs_loses_no_other(tmp_path: Path):
    def fail() -> dict:
        raise torch.OutOfMemoryError("no room")

    def hang() -> dict:
        while True:
            time.sleep(0.01)

    record = Record(tmp_path / "gpu.json", {})
    calls = {"fails": fail, "works": lambda: {"x": 1}, "hangs": hang, "waits": lambda: {"x": 2}}
    measure(Section("some", 0.5, lambda: calls), record)
    measure(Section("cannot begin", 0.5, fail), record)
    measure(Section("other", 0.5, lambda: {"works": lambda: {"x": 3}}), record)
    written = json.loads(record.path.read_text())
    assert written["some"]["fails"]["failed"] == "OutOfMemoryError: no room"
    assert written["some"]["works"]["x"] == 1
    assert "OutOfTime" in written["some"]["hangs"]["failed"]
    assert "left_out" in written["some"]["waits"]
    assert "failed" in written["cannot begin"]["set-up"]
    assert written["other"]["works"]["x"] == 3
