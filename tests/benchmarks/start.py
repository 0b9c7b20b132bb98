"""What a start costs: `tutelage run` to its first step beside the bare cost of what it needs.

Bare is one script: `ray.init` with its dashboard, then at the same time an actor that imports torch
and transformers, loads the teacher and scores 64 tokens, and one that imports deepspeed too and
does it with the student. Both take turns in one run of this benchmark, on rows that are prepared.
Warm is `tutelage train` where `tutelage teacher up` has been; its cluster is there all along.

    python -m tests.benchmarks.start [--repeats 3]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT.parent / "shared" / "models"
PAIR = ("teacher-6m", "student-base-1m")
STEPS = 40  # so that what a run does ahead of its end is done by then
DONE = "both have scored"
BARE = """
import os, sys
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
import ray

def score(folder, *modules):
    import importlib
    for module in ("torch", *modules):
        importlib.import_module(module)
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return float(model(torch.arange(64)[None]).logits.sum())

class Scorer:
    def score(self, *arguments):
        return score(*arguments)

ray.init(address="local", include_dashboard=True, log_to_driver=False, logging_level="ERROR")
actor = ray.remote(num_cpus=0.5)(Scorer)
teacher, student = actor.remote(), actor.remote()
ray.get([teacher.score.remote(sys.argv[1]), student.score.remote(sys.argv[2], "deepspeed")])
print("both have scored", flush=True)
"""


@dataclass(frozen=True)
class Start:
    """Seconds of a command and, of its whole family, CPU seconds until its first moment."""

    wall_s: float  # to the first step, or until both have scored
    cpu_s: float
    ending_s: float  # after the last step
    stages: dict[str, float]


@dataclass(frozen=True)
class Result:
    """Medians, and the ratio of product to bare."""

    product: Start
    bare: Start
    warm: Start  # with a service that is up
    ratio: float
    cpu_ratio: float


def measure(*, repeats: int, folder: Path, models: Path = MODELS) -> Result:
    """All in turns, after one run that prepares the rows."""
    config = write_config(folder, models)
    commands = {
        "bare": [sys.executable, "-c", BARE, *(str(models / name) for name in PAIR)],
        "product": tutelage("run", str(config), "--fresh", "--address", "local"),
        "warm": tutelage("train", str(config), "--fresh"),
    }
    moments = dict.fromkeys(commands, ("step 1/", f"step {STEPS}/")) | {"bare": (DONE, DONE)}
    starts: dict[str, list[Start]] = {kind: [] for kind in commands}
    with a_service(config, folder):
        timed(commands["product"], until=moments["product"], folder=folder)
        for _ in range(repeats):
            for kind, command in commands.items():
                starts[kind].append(timed(command, until=moments[kind], folder=folder))
    plain, product, warm = (median(starts[kind]) for kind in commands)
    ratio, cpu_ratio = product.wall_s / plain.wall_s, product.cpu_s / plain.cpu_s
    return Result(product, plain, warm, ratio, cpu_ratio)


def tutelage(*arguments: str) -> list[str]:
    """A command line."""
    return [sys.executable, "-m", "cluster", *arguments]


def own_cluster(folder: Path) -> dict[str, str]:
    """The environment in which a cluster of this machine is this benchmark's."""
    return {n: v for n, v in os.environ.items() if n != "RAY_ADDRESS"} | {
        "XDG_CACHE_HOME": str(folder / "xdg")
    }


@contextmanager
def a_service(config: Path, folder: Path) -> Iterator[None]:
    """A teacher service on a cluster of its own, for the length of a `with`."""
    options = {"cwd": ROOT, "env": own_cluster(folder), "check": True, "capture_output": True}
    subprocess.run(tutelage("teacher", "up", str(config)), **options)  # type: ignore[call-overload]
    try:
        yield
    finally:
        subprocess.run(tutelage("teacher", "down", "--all"), **options)  # type: ignore[call-overload]


def timed(command: list[str], *, until: tuple[str, str], folder: Path) -> Start:
    """Run a command; its first and last moment are lines that begin so."""
    began = time.monotonic()
    first = last = cpu_s = 0.0
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=own_cluster(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(until[0]) and not first:
            first, cpu_s = time.monotonic(), family_cpu_s(process.pid)
        if line.startswith(until[1]):
            last = time.monotonic()
    if process.wait() != 0:
        raise RuntimeError("".join(said[-20:]))
    summary = folder / "runs" / "start" / "summary.json"
    stages = json.loads(summary.read_text())["start"] if until[0] != DONE else {}
    return Start(first - began, cpu_s, time.monotonic() - last, stages)


def family_cpu_s(pid: int) -> float:
    """CPU seconds so far of a process and of all under it that live."""
    total = 0.0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def median(starts: list[Start]) -> Start:
    """The median of every number."""
    stages = {name: statistics.median(s.stages[name] for s in starts) for name in starts[0].stages}
    return Start(
        wall_s=statistics.median(start.wall_s for start in starts),
        cpu_s=statistics.median(start.cpu_s for start in starts),
        ending_s=statistics.median(start.ending_s for start in starts),
        stages=stages,
    )


def write_config(folder: Path, models: Path) -> Path:
    """A short run of the small real pair on two domains of real text."""
    data = models.parent / "data"
    domains = {"stories": "stories/tinystories", "code": "code/thealgorithms_python"}
    config = {
        "name": "start",
        "steps": STEPS,
        "log_every": 1,
        "paths": {"runs": str(folder / "runs"), "cache": str(folder / "cache")},
        "teachers": {"teacher": {"model": str(models / "teacher-6m"), "cpus": 0.5}},
        "student": {"model": str(models / "student-base-1m"), "cpus": 0.5},
        "domains": {
            name: {
                "train": str(data / f"{file}.train.jsonl"),
                "validation": str(data / f"{file}.valid.jsonl"),
            }
            for name, file in domains.items()
        },
        "data": {"context": 128, "validation_rows": 4},
        "batch": {"rows_per_step": 4, "micro_batch": 4},
        "mixture": {"policy": "ddk", "interval": 2, "lag_steps": 1},
    }
    path = folder / "start.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def main() -> None:
    """Print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(repeats=parser.parse_args().repeats, folder=Path(folder))
    print(json.dumps(asdict(result), indent=1))


if __name__ == "__main__":
    main()
