"""What `tutelage plan --probe` predicts, beside what a run of the same config then takes.

    python -m tests.benchmarks.probing [--pairs real demo] [--models FOLDER]

A run's processes are looked at from outside while it works: the most that each has resident, less
what it shares. Its steps' seconds are those of `metrics.jsonl`, after as many as a probe takes.
Formula and probe are of the largest process of a side. Both are taken one after the other, so that
a load beside them that comes or goes is in the ratio of times.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.sizing.fitting import CPU_LIBRARIES
from shared.run.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "cluster" / "recipes"
TITLES = {"teacher": "ray::TeacherReplica", "student": "ray::RayTrainWorker"}
POLL_S = 0.1
FIRST = 25  # steps that are not compared: as many as a probe takes


@dataclass(frozen=True)
class Pair:
    """A config whose run is long enough to have later steps."""

    recipe: str
    overrides: tuple[str, ...]


PAIRS = {
    "real": Pair("real_text.yaml", ("steps=75", "log_every=25", "baseline=false")),
    "real, one worker": Pair(
        "real_text.yaml",
        ("steps=75", "log_every=25", "baseline=false", "student.workers=1", "student.zero=0"),
    ),
    "demo": Pair("demo.yaml", ("steps=125", "log_every=25", "baseline=false")),
}


@dataclass(frozen=True)
class Compared:
    """Predicted and measured: bytes of each side's largest process, seconds of a step and of the
    whole run, of which the run's own have its start too."""

    formula_bytes: dict[str, float]
    probe_bytes: dict[str, float]
    run_bytes: dict[str, float]
    probe_step_s: float
    run_step_s: float
    probe_whole_s: float
    run_wall_s: float

    @property
    def memory(self) -> dict[str, float]:
        """Measured memory as a share of what the probe said, by side."""
        return {side: self.run_bytes[side] / size for side, size in self.probe_bytes.items()}

    @property
    def step(self) -> float:
        """Seconds of a step as a share of what the probe said."""
        return self.run_step_s / self.probe_step_s


def compare(pair: Pair, *, folder: Path, models: Path) -> Compared:
    """Probe, then run; `models` is the folder of models and data."""
    options = [*pair.overrides, f"paths.root={models}", f"paths.runs={folder}"]
    command = [sys.executable, "-m", "cluster"]
    config = str(RECIPES / pair.recipe)
    planned = [*command, "plan", config, *options, "--probe", "--json"]
    told = subprocess.run(planned, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(told.stdout)
    running = subprocess.Popen([*command, "run", config, *options], cwd=ROOT, stdout=sys.stderr)
    started = time.monotonic()
    most = watched(running)
    run_wall_s = time.monotonic() - started
    if running.returncode:
        raise SystemExit(f"the run ended with {running.returncode}")
    run_dir = folder / found["config"]["name"]
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line.step > FIRST]
    teachers = [one for of in found["probe"]["teachers"].values() for one in of]
    return Compared(
        formula_bytes={
            "student": total(found["student"]["memory"]["parts"]) + CPU_LIBRARIES["student"],
            "teacher": max(total(side["memory"]["parts"]) for side in found["teachers"])
            + CPU_LIBRARIES["teacher"],
        },
        probe_bytes={
            "student": max(size(one) for one in found["probe"]["student"]),
            "teacher": max(map(size, teachers)),
        },
        run_bytes=most,
        probe_step_s=found["pace"]["step_s"],
        run_step_s=sum(line.seconds for line in lines) / (lines[-1].step - FIRST),
        probe_whole_s=found["seconds"],
        run_wall_s=run_wall_s,
    )


def size(one: dict) -> float:
    """Bytes of a process that was probed."""
    memory = one["memory"]
    return total(memory["parts"]) + memory["kept"] + memory["libraries"]


def total(parts: dict[str, float]) -> float:
    """Bytes of all parts."""
    return sum(parts.values())


def watched(running: subprocess.Popen) -> dict[str, float]:
    """The most that a process of each side had resident until a command ended."""
    most = dict.fromkeys(TITLES, 0.0)
    command = psutil.Process(running.pid)
    while running.poll() is None:
        for process in command.children(recursive=True):
            try:
                title = " ".join(process.cmdline())
                own = private_bytes(process.pid)
            except (psutil.Error, OSError, KeyError):  # it has just ended
                continue
            for side, start in TITLES.items():
                if title.startswith(start):
                    most[side] = max(most[side], own)
        time.sleep(POLL_S)
    return most


def private_bytes(pid: int) -> int:
    """Bytes that a process has resident and does not share."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return 1024 * (int(fields["VmRSS"].split()[0]) - int(fields["RssShmem"].split()[0]))


def main(names: Sequence[str], models: Path) -> None:
    """Compare pairs and print each as JSON, with the machine's load."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found = compare(PAIRS[name], folder=Path(folder), models=models)
        ratios = {"memory": found.memory, "step": found.step, "load": os.getloadavg()[0]}
        print(json.dumps({name: asdict(found) | ratios}, indent=1), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", default=[*PAIRS], choices=[*PAIRS])
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared")
    arguments = parser.parse_args()
    main(arguments.pairs, arguments.models)
