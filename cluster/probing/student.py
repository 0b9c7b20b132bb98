"""What a student's worker does in a probe: steps as they are, counted, in place of a training."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.probing.following import Chunks, Followed
from cluster.probing.longest import LongestFirst, longest_rows, longest_steps
from cluster.probing.memory import ResidentPeak, live_tensors, resident_bytes, storage_bytes
from cluster.sizing.fitting import GPU_LIBRARIES
from cluster.sizing.measured import STEP_PART, Logits, ProcessMemory, StudentProbe, write
from shared.run.plan import OpenController, OpenRunReader, RunPlan
from shared.targets.generation import OpenGenerator, OpenTeachers
from shared.targets.lessons import OpenModules
from student_trainer.accelerator import this_device
from student_trainer.early import Early
from student_trainer.engine import take_step
from student_trainer.evaluation.reports import report
from student_trainer.evaluation.validation import unit_size
from student_trainer.loop import learn, reseed
from student_trainer.metrics.accumulator import Stopwatch
from student_trainer.run import Run, close_run, open_run
from student_trainer.schedule import learning_rate
from student_trainer.state.resume import save
from student_trainer.tasks.registry import task_of

FOLLOWED = 1  # the step that is followed; the one before it makes the optimiser's states


def probe_student(
    plan: RunPlan,
    open_reader: OpenRunReader | None,
    open_controller: OpenController,
    *,
    early: Early,
    chunks: Chunks,
    folder: Path,
    open_generator: OpenGenerator | None = None,
    open_teachers: OpenTeachers | None = None,
    open_modules: OpenModules | None = None,
) -> None:
    """Take the steps of a probe and write what they took to `folder`, a file for every rank; its
    rows are those of the data set, whatever could write others."""
    device, loaded = this_device(), resident_bytes()
    libraries = loaded - storage_bytes(live_tensors(device))
    run = open_run(
        plan,
        open_reader,
        open_controller,
        open_source=LongestFirst,
        task=task_of(plan.config),
        load=early.load,
    )
    try:
        with ResidentPeak() as resident:
            meter = Meter(device, libraries=libraries, resident=resident)
            found = Steps(run, meter, chunks).taken()
        write(folder / f"student-{run.ranks.rank}.json", found)
        run.ranks.wait()
    finally:
        close_run(run)


class Meter:
    """The most that this process held so far, libraries included."""

    def __init__(self, device: torch.device, *, libraries: int, resident: ResidentPeak) -> None:
        self.device, self._resident = device, resident
        self.on_gpu = device.type == "cuda"
        self.libraries = GPU_LIBRARIES if self.on_gpu else libraries

    def most(self) -> int:
        """Bytes; of a GPU those that torch has reserved there."""
        if self.on_gpu:
            return torch.cuda.max_memory_reserved(self.device) + self.libraries
        return self._resident.most

    def memory(self, parts: dict[str, int]) -> ProcessMemory:
        """The most, told apart."""
        beyond = self.most() - self.libraries - sum(parts.values())
        return ProcessMemory(parts, max(0, beyond), self.libraries)


class Steps:
    """The steps of a probe, one after the other."""

    def __init__(self, run: Run, meter: Meter, chunks: Chunks) -> None:
        self._run, self._meter, self._chunks = run, meter, chunks
        self._parts: dict[str, int] = {}
        self._logits: Logits | None = None
        self._heads = 0  # of teachers whose states are read
        if run.config.targets.exact is not None:
            weights, optimiser = map(storage_bytes, lasting(run.engine))
            self._heads = storage_bytes(live_tensors(meter.device)) - weights - optimiser

    def taken(self) -> StudentProbe:
        """All of them: those of the longest rows, the run's own, then validation and a save."""
        run, first = self._run, longest_steps(len(self._run.plan.by_teacher))
        for step in range(first):
            self._take(step)
        longest = self._meter.most()
        own = [self._take(step) for step in range(first, run.config.steps)]
        later = self._meter.most()
        validation_s = self._validated()
        started = time.perf_counter()
        save(run, run.config.steps)
        checkpoint_s = time.perf_counter() - started
        files = run.files.checkpoints.rglob("*") if run.ranks.leads else ()
        return StudentProbe(
            memory=self._meter.memory(self._parts),
            longest_bytes=longest,
            later_bytes=later,
            logits=self._logits,
            steps=own[min(len(own) // 2, run.source.ahead + 1) :],
            validation_s=validation_s,
            checkpoint_s=checkpoint_s,
            checkpoint_bytes=sum(file.stat().st_size for file in files if file.is_file()),
        )

    def _take(self, step: int) -> dict[str, float]:
        """One step, as the loop of a run takes it; its seconds and loss tokens."""
        run = self._run
        if step in run.decisions:
            report(run, step)
        watch = Stopwatch(run.reader)
        drawn = run.loader.step(step)
        reseed(run.config.seed, step=step, rank=run.ranks.rank)
        with watch.timed("compute"):
            if step == FOLLOWED:
                with self._followed(max(int(u.num_loss_tokens().sum()) for u in drawn.units)):
                    learn(run, drawn)
            else:
                learn(run, drawn)
        lr = learning_rate(run.config.optimiser, step=step, steps=run.config.steps)
        with watch.timed("optimiser"):
            take_step(run.engine, run.config, lr=lr)
        machine = watch.machine()
        return {
            "seconds": machine[0],
            "wait": machine[1],
            "compute": machine[-2],
            "optimiser": machine[-1],
            "tokens": float(drawn.tokens),
        }

    @contextmanager
    def _followed(self, positions: int) -> Iterator[None]:
        """Follow the forward and backward passes of a `with` whose largest unit has so many
        positions with loss."""
        device = self._meter.device
        held = live_tensors(device)
        weights, optimiser = lasting(self._run.engine)
        parts = {"weights": storage_bytes(weights), "optimiser": storage_bytes(optimiser)}
        before = sum(parts.values()) + self._beside(held)
        with Followed(self._chunks, held, unwritten=self._unwritten()) as followed:
            yield
        most = before + followed.most
        if self._meter.on_gpu:
            most = torch.cuda.max_memory_allocated(device)
        parts["teacher's head"] = max(0, self._heads)
        parts["gradients"] = max(0, self._beside(live_tensors(device)) - parts["teacher's head"])
        parts[STEP_PART] = max(0, most - sum(parts.values()))
        self._parts = parts
        chunks = self._chunks
        self._logits = Logits(followed.widest, positions, chunks.rows, chunks.vocabularies[0])

    def _beside(self, tensors: list[Tensor]) -> int:
        """Bytes of tensors beside weights and optimiser."""
        weights, optimiser = lasting(self._run.engine)
        known = {tensor.untyped_storage().data_ptr() for tensor in [*weights, *optimiser]}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        unwritten = self._unwritten()
        return sum(
            size for place, size in storages.items() if place not in known and size not in unwritten
        )

    def _unwritten(self) -> frozenset[int]:
        """Bytes of DeepSpeed's reduction bucket: a CPU gives only what gradients are written to,
        which counts as kept."""
        elements = getattr(self._run.engine.optimizer, "reduce_bucket_size", 0)
        if self._meter.on_gpu or not elements:
            return frozenset()
        return frozenset(int(elements) * itemsize for itemsize in (2, 4))

    def _validated(self) -> float:
        """Score a unit of the longest validation rows twice; about the seconds of all units."""
        run, question = self._run, self._run.plan.validation_question
        size, stores = unit_size(run.config.batch.micro_batch, question), run.validation.stores
        rows = longest_rows(stores, size, packed=run.plan.packed)
        units = sum(-(-len(store) // size) for store in stores)
        run.engine.eval()
        seconds = 0.0
        with torch.no_grad():
            for _ in range(2):
                started = time.perf_counter()
                answer = None
                if run.reader is not None and question is not None:
                    answer = run.validation.answer(run.reader, rows, question)
                run.engine(run.layouts.batch(rows, answer), mode="measure")
                seconds = time.perf_counter() - started
        run.engine.train()
        return seconds * -(-units // run.ranks.world_size)


def lasting(engine: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Weights as this rank holds them, and what its optimiser has beside them."""
    parameters = list(engine.module.parameters())
    weights = [getattr(p, "ds_tensor", p) for p in parameters] + list(engine.module.buffers())
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = [t for state in inner.state.values() for t in state.values() if isinstance(t, Tensor)]
    masters = [p for group in inner.param_groups for p in group["params"]]
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    optimiser = [t for t in [*states, *masters] if t.untyped_storage().data_ptr() not in known]
    return weights, optimiser
