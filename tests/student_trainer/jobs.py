"""The jobs that test processes know by name; each takes a plan and returns plain values."""

import json
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from deepspeed.utils import safe_get_full_grad

from cluster.controller import Controller, ControllerPlan
from shared.plan import RunPlan
from shared.run_dir import RunDir
from student_trainer.engine import take_step
from student_trainer.loop import learn, reseed
from student_trainer.run import Run, close_run, open_run
from student_trainer.torchrun import StandingWeights
from tests.student_trainer.processes import LocalTeacher, job_train, run, teacher


def opened(plan: RunPlan) -> Run:
    """A run on this rank, its teacher in this process."""
    folder = plan.config.teachers["t"].model
    reader = (lambda rank: LocalTeacher(teacher(folder))) if plan.config.needs_teacher else None
    return open_run(plan, reader, lambda: StandingWeights(plan))


def job_resumed(plan: RunPlan, at: int) -> dict:
    """Train to the end, and once more from the checkpoint at a step, in a folder of its own."""
    run(plan)
    again = replace(plan, run_dir=plan.run_dir + "-resumed")
    if dist.get_rank() == 0:
        _as_if_killed(Path(plan.run_dir), Path(again.run_dir), at=at)
    dist.barrier()
    run(again)
    return {}


def job_decided(plan: RunPlan, at: int) -> dict:
    """Like `resumed`, with a controller in rank 0 whose log is as it was at the checkpoint."""
    again = replace(plan, run_dir=plan.run_dir + "-resumed")
    run(plan, lambda: _controller(plan))
    if dist.get_rank() == 0:
        _as_if_killed(Path(plan.run_dir), Path(again.run_dir), at=at)
        log = RunDir(Path(again.run_dir)).weight_log
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if json.loads(line)["decided_at"] < at))
    dist.barrier()
    run(again, lambda: _controller(again))
    return {}


def _controller(plan: RunPlan) -> Controller:
    natural = tuple(domain.natural_weight for domain in plan.domains)
    log = RunDir(Path(plan.run_dir)).weight_log
    return Controller(ControllerPlan(plan.config, natural, str(log)))


def _as_if_killed(done: Path, folder: Path, *, at: int) -> None:
    """What is on disk after a kill some time after the checkpoint at step `at`."""
    shutil.copytree(done, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.name > f"step-{at:06d}":
            shutil.rmtree(checkpoint)
    evaluations = json.loads((folder / "evaluations.json").read_text())
    (folder / "evaluations.json").write_text(json.dumps({"before": evaluations["before"]}))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:1]))


def job_gradient(plan: RunPlan, file: str) -> dict:
    """The first step's gradient of every trained weight, whole, saved by rank 0."""
    run = opened(plan)
    drawn = run.supply.step(0)
    sums = learn(run, drawn)
    gradients = {}
    for name, parameter in run.engine.module.named_parameters():
        if parameter.requires_grad:
            gradient = safe_get_full_grad(parameter)
            gradients[name] = gradient if gradient is None else gradient.clone()
    if dist.get_rank() == 0:
        torch.save(gradients, file)
    close_run(run)
    return {"sums": sums.tolist(), "tokens": drawn.tokens}


def job_ranks_agree(plan: RunPlan) -> dict:
    """Whether all weights are the same bits on every rank after the run's steps."""
    run = opened(plan)
    before = _digest(run)
    for index in range(3):
        learn(run, run.supply.step(index))
        take_step(run.engine, plan.config, lr=1e-2)
    digests = run.ranks.gather(_digest(run))
    close_run(run)
    return {"digests": digests, "changed": digests[0] != before}


def job_dropout(plan: RunPlan) -> dict:
    """Losses of the same rows under two seeds, the first of them twice, after an evaluation."""
    run = opened(plan)
    run.validation.sums(run.engine)
    drawn, losses = run.supply.step(0), []
    learn(run, drawn)
    take_step(run.engine, plan.config, lr=1e-2)  # a fresh adapter multiplies dropout by zero
    for seed in (0, 1, 0):
        reseed(seed, step=0, rank=run.ranks.rank)
        losses.append(float(learn(run, drawn)[0]))
        take_step(run.engine, plan.config, lr=0.0)
    close_run(run)
    return {"losses": losses}


def job_norms_around_evaluation(plan: RunPlan) -> dict:
    """Gradient norms of the same rows before and after an evaluation pass."""
    run, norms = opened(plan), []
    drawn = run.supply.step(0)
    for _ in range(2):
        learn(run, drawn)
        norms.append(take_step(run.engine, plan.config, lr=0.0))
        run.validation.sums(run.engine)
    close_run(run)
    return {"norms": norms}


def job_full_disk(plan: RunPlan) -> dict:
    """Train on where rank 1 can write no large file any more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        return job_train(plan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _digest(run: Run) -> str:
    state = xxhash.xxh3_128()
    for parameter in run.engine.module.parameters():
        state.update(parameter.detach().contiguous().numpy().tobytes())
    return state.hexdigest()


JOBS: dict[str, Callable[..., dict]] = {
    "train": job_train,
    "resumed": job_resumed,
    "decided": job_decided,
    "gradient": job_gradient,
    "ranks_agree": job_ranks_agree,
    "dropout": job_dropout,
    "norms_around_evaluation": job_norms_around_evaluation,
    "full_disk": job_full_disk,
}
