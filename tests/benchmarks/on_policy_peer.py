"""On-policy distillation here and in TRL: tokens learnt a second, and where the student ends.

    pip install -e '.[oracles]'
    python -m tests.benchmarks.on_policy_peer [--steps 60] [--models FOLDER]

The same pair, prompts, length of what is written, divergence (reverse KL over the whole
vocabulary), rows of a step, rate and float32. TRL's trainer has both models in one process with two
threads; the product has a process of one thread for each side, and, where a copy of the student
writes while its worker learns, one for that, all on the same CPUs (`taskset -c 0,1` where there are
more). The first steps are not timed. All students are then measured by plain `transformers` on the
same text.

N positions with loss   V vocabulary
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from shared.run.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TEACHER, STUDENT = "models/teacher-6m", "models/student-base-1m"
DOMAINS = ("sql", "math")
PARTS = {"train": "train", "validation": "valid"}
ROWS, NEW_TOKENS, LR, CONTEXT = 8, 64, 1e-4, 256
THREADS = 2  # of each side's whole
UNTIMED = 10  # steps
MEASURED_ROWS = 32  # of each domain
# Who writes, and how old the weights are that do.
WAYS: dict[str, dict[str, Any]] = {
    "workers": {"source": {"lag": 1}},
    "copy-lag-1": {"source": {"lag": 1}, "rollouts": {"replicas": 1, "cpus": 0.5}},
    "copy-lag-2": {"source": {"lag": 2}, "rollouts": {"replicas": 1, "cpus": 0.5}},
}


@dataclass(frozen=True)
class Trained:
    """One of the two, after its run."""

    tokens_per_s: float  # tokens that were written and learnt
    kl: dict[str, float]  # KL(teacher || student) on right answers, nats per token, by domain
    mean_length: float  # of what it wrote, in tokens
    wall_s: float  # of the command


def product(steps: int, *, models: Path, folder: Path, way: str) -> Trained:
    """`tutelage run` with a student that writes all of its text, in one of `WAYS`."""
    domains = {
        name: {part: f"data/{name}/*.{end}.jsonl" for part, end in PARTS.items()}
        for name in DOMAINS
    }
    config = {
        "name": way,
        "steps": steps,
        "log_every": 1,
        "paths": {"root": str(models), "runs": str(folder)},
        "teachers": {"teacher-6m": {"model": TEACHER, "cpus": 0.5}},
        "student": {"model": STUDENT, "cpus": 0.5, "zero": 0},
        "domains": domains,
        "data": {"context": CONTEXT, "validation_rows": 4},
        "batch": {"rows_per_step": ROWS, "micro_batch": ROWS},
        "source": {"student": 1.0, "max_new_tokens": NEW_TOKENS} | WAYS[way]["source"],
        **{name: asked for name, asked in WAYS[way].items() if name != "source"},
        "targets": {"exact": "last_hidden"},
        "losses": [{"kind": "reverse_kl"}],
        "optimiser": {"lr": LR, "schedule": "constant", "weight_decay": 0.0},
        "checkpoints": {"every": 1_000_000},
    }
    path = folder / f"{way}.yaml"
    path.write_text(json.dumps(config))
    wall_s = _timed([sys.executable, "-m", "cluster", "run", str(path)], threads=1)
    lines = list(read_metrics(folder / way / "metrics.jsonl"))
    timed = lines[UNTIMED:]
    rollouts = [line.rollouts for line in timed if line.rollouts is not None]
    tokens = sum(one.tokens for one in rollouts)
    return Trained(
        tokens_per_s=tokens / sum(line.seconds for line in timed),
        kl=divergences(folder / way / "export", models),
        mean_length=tokens / sum(one.rollouts for one in rollouts),
        wall_s=wall_s,
    )


def peer(steps: int, *, models: Path, folder: Path) -> Trained:
    """TRL's `DistillationTrainer` in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.on_policy_peer", "--peer", str(folder)]
    command += ["--steps", str(steps), "--models", str(models)]
    wall_s = _timed(command, threads=THREADS)
    told = json.loads((folder / "peer.json").read_text())
    timed = told[UNTIMED:]
    tokens = sum(step["tokens"] for step in timed)
    return Trained(
        tokens_per_s=tokens / sum(step["seconds"] for step in timed),
        kl=divergences(folder / "peer", models),
        mean_length=tokens / (ROWS * len(timed)),
        wall_s=wall_s,
    )


def _timed(command: list[str], *, threads: int) -> float:
    """Seconds of a command. Raises CalledProcessError where it fails."""
    started = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr, env=environment)
    return time.monotonic() - started


def train_peer(steps: int, *, models: Path, folder: Path) -> None:
    """What `--peer` does: train, and leave the student and the tokens and seconds of each step."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DistillationTrainer

    tokenizer = AutoTokenizer.from_pretrained(models / STUDENT, padding_side="left")
    texts = [f"{tokenizer.bos_token}{row['prompt']}\n" for row in _rows(models, "train", steps)]
    told: list[dict[str, float]] = []

    class Steps(TrainerCallback):
        """Seconds of each step, and the tokens that the trainer says it wrote."""

        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            told.append({"seconds": time.monotonic() - self.started})

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "completions/mean_length" in logs:
                told[-1]["tokens"] = logs["completions/mean_length"] * ROWS

    trainer = DistillationTrainer(
        model=str(models / STUDENT),
        teacher_model=str(models / TEACHER),
        args=_peer_config(steps, folder / "peer-runs"),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    trainer.train()
    trainer.save_model(str(folder / "peer"))
    (folder / "peer.json").write_text(json.dumps(told))


def _peer_config(steps: int, folder: Path) -> Any:
    """The settings of its trainer that are those of the run here."""
    from trl import DistillationConfig

    return DistillationConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        max_completion_length=NEW_TOKENS,
        beta=1.0,
        learning_rate=LR,
        lr_scheduler_type="constant",
        warmup_steps=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        model_init_kwargs={"dtype": "float32"},
        teacher_model_init_kwargs={"dtype": "float32"},
    )


def _rows(models: Path, part: str, steps: int) -> Iterator[dict[str, str]]:
    """Rows of all domains in turns, as many as so many steps take."""
    files = [sorted((models / "data" / name).glob(f"*.{part}.jsonl")) for name in DOMAINS]
    rows = [_lines(paths) for paths in files]
    for turn in islice(zip(*rows, strict=False), ROWS * steps // len(DOMAINS)):
        yield from turn


def _lines(paths: list[Path]) -> Iterator[dict[str, str]]:
    """Rows with a short prompt, of all files in turns."""
    parsed = (map(json.loads, path.read_text().splitlines()) for path in paths)
    for turn in zip(*parsed, strict=False):
        yield from (row for row in turn if len(row["prompt"]) <= 2 * CONTEXT)


def divergences(student: Path, models: Path) -> dict[str, float]:
    """KL(teacher || student) by domain, over the right answers of validation rows: float64 over
    the whole vocabulary, from plain `transformers`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / STUDENT)
    both = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (models / TEACHER, student)
    ]
    found = {}
    for name in DOMAINS:
        paths = sorted((models / "data" / name).glob("*.valid.jsonl"))
        total, count = 0.0, 0
        for row in islice(_lines(paths), MEASURED_ROWS):
            prompt = tokenizer(f"{tokenizer.bos_token}{row['prompt']}\n", add_special_tokens=False)
            answer = tokenizer(row["response"] + tokenizer.eos_token, add_special_tokens=False)
            ids = torch.tensor([(prompt["input_ids"] + answer["input_ids"])[:CONTEXT]])
            first = len(prompt["input_ids"]) - 1
            with torch.no_grad():
                logits = (model(ids).logits[0, first:-1].double() for model in both)
                p_NV, q_NV = (each.log_softmax(-1) for each in logits)
            total += float((p_NV.exp() * (p_NV - q_NV)).sum())
            count += len(p_NV)
        found[name] = total / count
    return found


def compare(steps: int, models: Path) -> dict[str, Any]:
    """All, one after the other, and the ratio of each of `WAYS` to the peer."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"models": models, "folder": Path(folder)}
        theirs = peer(steps, **places)
        ours = {way: product(steps, **places, way=way) for way in WAYS}
    return {
        "peer": asdict(theirs),
        "untrained": {"kl": divergences(models / STUDENT, models)},
        **{way: asdict(one) for way, one in ours.items()},
        "ratios": {way: one.tokens_per_s / theirs.tokens_per_s for way, one in ours.items()},
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--peer", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer is not None:
        train_peer(arguments.steps, models=arguments.models, folder=arguments.peer)
    else:
        print(json.dumps(compare(arguments.steps, arguments.models), indent=1))
