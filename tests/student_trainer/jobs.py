"""The jobs that test processes know by name; each takes a plan and returns plain values."""

import json
import os
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

from cluster.control.controller import Controller, ControllerPlan
from shared.config.run import Config
from shared.errors import TutelageError
from shared.run.plan import RunPlan
from shared.run.run_dir import RunDir
from student_trainer.accelerator import deepspeed
from student_trainer.ending import export, is_finished
from student_trainer.engine import take_step
from student_trainer.loop import learn, reseed
from student_trainer.models.frozen import frozen_weights, refuse_changed
from student_trainer.models.student import Student
from student_trainer.run import Run, close_run, open_run
from student_trainer.sources.data_set import DataSet
from student_trainer.state.checkpoint import (
    MANIFEST,
    all_checkpoints,
    draft_of,
    publish,
    read_state,
    step_of,
    write_state,
)
from student_trainer.tasks.causal_lm import CausalLM
from student_trainer.torchrun import StandingWeights
from tests.student_trainer.processes import job_train, reader_of, run
from tests.student_trainer.sources.own import Alternating, Uncounted
from tests.student_trainer.tasks.own import Aside, Echo


def opened(plan: RunPlan) -> Run:
    """A run on this rank, its teacher in this process."""
    return open_run(plan, reader_of(plan), lambda: StandingWeights(plan))


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


def job_controlled(plan: RunPlan) -> dict:
    """Train with a controller in rank 0."""
    run(plan, lambda: _controller(plan))
    return {}


def job_slowed(plan: RunPlan, delay_s: float) -> dict:
    """Train beside a copy of the student that takes its time to write."""
    run(plan, delay_s=delay_s)
    return {}


def job_tasked(plan: RunPlan, task: str) -> dict:
    """Train at a task."""
    return job_train(plan, task={kind.__name__: kind for kind in (CausalLM, Echo, Aside)}[task]())


def job_masked(plan: RunPlan, umask: int) -> dict:
    """Train under a umask."""
    before = os.umask(umask)
    try:
        return job_train(plan)
    finally:
        os.umask(before)


def job_sourced(plan: RunPlan, source: str) -> dict:
    """Train on a source of tokens, with a controller in rank 0."""
    sources = {kind.__name__: kind for kind in (DataSet, Uncounted, Alternating)}
    run(plan, lambda: _controller(plan), open_source=sources[source])
    return {}


def job_stopped(plan: RunPlan) -> dict:
    """Train with a controller in rank 0, and again after the end; whether the run knows it."""
    run(plan, lambda: _controller(plan))
    lines = RunDir(Path(plan.run_dir)).metrics.read_text()
    finished = is_finished(plan)
    run(plan, lambda: _controller(plan))
    return {"finished": finished, "same": RunDir(Path(plan.run_dir)).metrics.read_text() == lines}


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
    drawn = run.loader.step(0)
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
        learn(run, run.loader.step(index))
        take_step(run.engine, plan.config, lr=1e-2)
    digests = run.ranks.gather(_digest(run))
    close_run(run)
    return {"digests": digests, "changed": digests[0] != before}


def job_dropout(plan: RunPlan) -> dict:
    """Losses of the same rows under two seeds, the first of them twice, after an evaluation."""
    run = opened(plan)
    run.validation.sums(run.engine)
    drawn, losses = run.loader.step(0), []
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
    drawn = run.loader.step(0)
    for _ in range(2):
        learn(run, drawn)
        norms.append(take_step(run.engine, plan.config, lr=0.0))
        run.validation.sums(run.engine)
    close_run(run)
    return {"norms": norms}


def job_frozen(plan: RunPlan) -> dict:
    """Two steps: what of the base and what of the rest is still the same bits, and what an export
    would have said."""
    run = opened(plan)
    before = _groups(run)
    for index in range(2):
        learn(run, run.loader.step(index))
        take_step(run.engine, plan.config, lr=1e-2)
    run.validation.sums(run.engine)
    after = _groups(run)
    refuse_changed(run.student, run.frozen, run.ranks)
    assert run.frozen is not None
    again = frozen_weights(run.student, run.engine.module, run.ranks)
    facts = run.ranks.gather(run.frozen.facts())
    close_run(run)
    same = {name: before[name] == after[name] for name in before}
    return {"same": same, "facts": facts, "again": again and again.facts()}


def job_unfrozen(plan: RunPlan, name: str) -> dict:
    """Train with a base weight that trains too, by mistake; what is said at the end."""

    class Unfrozen(CausalLM):
        def load(self, config: Config, *, device: torch.device) -> Student:
            student = super().load(config, device=device)
            weights = [p for n, p in student.saved.named_parameters() if name in n]
            weights[0].requires_grad_(True)
            return student

    return job_train(plan, task=Unfrozen())


def job_touched(plan: RunPlan, name: str) -> dict:
    """One bit of what rank 1 holds of a base weight flips, or of its nf4 scales."""
    run = opened(plan)
    weights = [p for n, p in run.student.saved.named_parameters() if name in n]
    held, said = {"weight": getattr(weights[0], "ds_tensor", weights[0].data)}, {}
    if hasattr(weights[0], "quant_state"):
        held["scale"] = weights[0].quant_state.absmax
    for place, touched in held.items():
        bits = touched.detach().reshape(-1).view(torch.uint8)
        if run.ranks.rank == 1:
            bits[5] ^= 1
        try:
            export(run, step=0)
        except TutelageError as error:
            said[place] = [type(error).__name__, str(error)]
        if run.ranks.rank == 1:
            bits[5] ^= 1
    refuse_changed(run.student, run.frozen, run.ranks)
    close_run(run)
    return said


def _groups(run: Run) -> dict[str, str]:
    """Digests of the base, the adapters and the projections, whole, whatever the ZeRO stage."""
    states = {"base": xxhash.xxh3_128(), "adapters": xxhash.xxh3_128()}
    states["projections"] = xxhash.xxh3_128()
    for name, parameter in run.engine.module.named_parameters():
        group = "adapters" if "lora_" in name else "base"
        group = "projections" if "projections" in name else group
        whole = deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id"))
        with whole:
            states[group].update(parameter.detach().contiguous().numpy().tobytes())
    return {name: state.hexdigest() for name, state in states.items()}


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


def job_other_states(plan: RunPlan, states: dict) -> dict:
    """Train on from checkpoints that hold other states than the run wrote."""
    folder = RunDir(Path(plan.run_dir)).checkpoints
    if dist.get_rank() == 0:
        checkpoint = all_checkpoints(folder)[-1]
        write_state(checkpoint, read_state(checkpoint) | states)
        (checkpoint / MANIFEST).unlink()
        draft = checkpoint.rename(draft_of(folder, step_of(checkpoint)))
        publish(draft, step=step_of(checkpoint), keep=9)
    dist.barrier()
    return job_train(plan)


def _digest(run: Run) -> str:
    state = xxhash.xxh3_128()
    for parameter in run.engine.module.parameters():
        state.update(parameter.detach().contiguous().numpy().tobytes())
    return state.hexdigest()


JOBS: dict[str, Callable[..., dict]] = {
    "train": job_train,
    "resumed": job_resumed,
    "decided": job_decided,
    "controlled": job_controlled,
    "masked": job_masked,
    "sourced": job_sourced,
    "slowed": job_slowed,
    "tasked": job_tasked,
    "stopped": job_stopped,
    "gradient": job_gradient,
    "ranks_agree": job_ranks_agree,
    "dropout": job_dropout,
    "norms_around_evaluation": job_norms_around_evaluation,
    "frozen": job_frozen,
    "unfrozen": job_unfrozen,
    "touched": job_touched,
    "full_disk": job_full_disk,
    "other_states": job_other_states,
}
