"""One cell from its config to its record: prepared, trained and evaluated by the product itself.

Times are CPU seconds of this process, since its machine may be shared.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import xxhash
from transformers import AutoTokenizer

from cluster.control.controller import Controller, ControllerPlan
from cluster.launch.writing import open_generator
from cluster.planning.difficulty import ScoringModel
from cluster.planning.loading import made
from cluster.planning.ordering import ordered_domains
from cluster.planning.preparation import Prepared, prepare_run, run_plan
from cluster.planning.projecting import projection_of
from cluster.planning.prompting import Showing
from shared.config.run import Config
from shared.data.prepared import PreparedDomain
from shared.mixture.weight_log import ControllerClient, read_log
from shared.run.metrics import read_metrics
from shared.run.plan import RunPlan
from shared.run.run_dir import RunDir, write_atomically
from shared.text.framing import ends_of
from student_trainer.evaluation.evaluations import EVALUATIONS, evaluate
from student_trainer.evaluation.reports import report
from student_trainer.evaluation.validation import Validation, ValidationSums
from student_trainer.loop import learn, reseed, train
from student_trainer.run import Run, close_run, open_run
from student_trainer.weighing import advantages as student_advantages
from tests.benchmarks.methods.calibration import student_calibration_error
from tests.benchmarks.methods.cells import (
    BY_NAME,
    EVEN,
    KD,
    MADE,
    MAKERS,
    OWN,
    PROMPTS,
    TASKS,
    Cell,
    config_of,
    described,
)
from tests.benchmarks.methods.making import write_examples, write_random, write_tasks
from tests.benchmarks.methods.workplace import TimedModules, TimedTeacher, Workplace
from tests.benchmarks.methods.writing import items_by_domain, kl_by_position, written
from tests.student_trainer.runs import mark_exported

Record = dict[str, Any]  # what one cell's JSON holds
PROMPTS_AT_ONCE = 32
MADE_SEED = 100  # of the models that are made
LOSS_TOLERANCE = 1e-3  # nats; stored answers depend a little on the unit they were scored in


@dataclass(slots=True)
class Seconds:
    """CPU seconds of a cell, apart from the rest of its training."""

    decisions: float = 0.0  # validation passes that a policy asks for
    evaluation: float = 0.0  # against the teacher, before and after


class TimedValidation:
    """The run's validation, timed: a pass without a reader is a policy's."""

    def __init__(self, validation: Validation, seconds: Seconds) -> None:
        self._validation, self._seconds = validation, seconds
        self.stores = validation.stores

    def sums(
        self, engine: Any, reader: Any = None, spec: Any = None, **options: Any
    ) -> ValidationSums:
        """See `Validation.sums`."""
        start = time.process_time()
        found = self._validation.sums(engine, reader, spec, **options)
        kind = "decisions" if reader is None else "evaluation"
        setattr(self._seconds, kind, getattr(self._seconds, kind) + time.process_time() - start)
        return found


@dataclass(frozen=True, slots=True)
class Opened:
    """A cell's run, ready to train."""

    prepared: Prepared
    plan: RunPlan
    run: Run
    seconds: Seconds
    teacher: TimedTeacher


def run_cell(cell: Cell, seed: int, place: Workplace) -> Record:
    """Train one cell, return its record; its folder is removed."""
    rewarded = constant_advantages if cell.control else nullcontext
    with rewarded(), opened(cell, seed, place) as it:
        _lend_before(it, place)
        mark_exported(it.plan)
        wall, start = time.perf_counter(), time.process_time()
        train(it.run)
        wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - start
        _keep_before(it, place)
        record = _record(cell, seed, it, cpu_s=cpu_s, wall_s=wall_s)
        return record | ({"written": writes(it, place)} if cell.base == OWN.base else {})


@contextmanager
def constant_advantages() -> Iterator[None]:
    """Whatever the teacher says, what the student wrote is to become less likely."""

    def constant(reward_T: np.ndarray, **_: Any) -> np.ndarray:
        return np.full(len(reward_T), -1.0)

    with patch.object(student_advantages, "advantages", constant):
        yield


def writes(it: Opened, place: Workplace) -> dict[str, dict]:
    """What the student writes on validation prompts; the teacher and the student as it began too,
    which is kept."""
    config = it.plan.config
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    items, ends = items_by_domain(it.prepared, tokenizer), ends_of(tokenizer)
    kept = place.folder / "before" / "written.json"
    if not kept.exists():
        models = {"teacher": it.prepared.teacher.model, "before": config.student.model}
        found = {
            name: written(place.engine(model), items, tokenizer, ends=ends)
            for name, model in models.items()
        }
        write_atomically(kept, json.dumps(found))
    model = it.run.student.saved.eval()
    generator = open_generator(
        model, device=torch.device("cpu"), dtype=config.student.dtype, batch_rows=PROMPTS_AT_ONCE
    )
    student = written(generator, items, tokenizer, ends=ends)
    teacher = place.engine(it.prepared.teacher.model).model
    far = {
        name: kl_by_position((teacher, model), generator, own, ends=ends)
        for name, own in items.items()
    }
    return {"student": student, "kl_by_position": far, **json.loads(kept.read_text())}


def differences_to(record: Record, cell: Cell, seed: int, place: Workplace) -> list[str]:
    """What is not as recorded: the rows, or the loss of the first step, which is not taken."""
    with opened(cell, seed, place) as it:
        _lend_before(it, place)
        run = it.run
        evaluate(run, "before")
        if 0 in run.decisions:
            report(run, 0)
        drawn = run.loader.step(0)
        reseed(run.config.seed, step=0, rank=0)
        loss = float(learn(run, drawn)[0] / drawn.tokens)
        found = [] if rows_of(it.plan) == record["rows"] else ["its rows"]
        if abs(loss - record["losses"][0]) > LOSS_TOLERANCE:
            found.append(f"its first loss, {loss:.4f} after {record['losses'][0]:.4f}")
        return found


@contextmanager
def opened(cell: Cell, seed: int, place: Workplace) -> Iterator[Opened]:
    """A run of a cell in a folder that lasts as long as the `with`."""
    logging.getLogger().setLevel(logging.WARNING)
    _make_missing(cell, place)
    prepared = prepare_run(made(place_config(cell, seed, place)))
    folder = place.folder / "runs" / f"{cell.name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    learning = place.learning(prepared, folder)
    reader, teacher = place.reader(prepared, learning)
    plan = _plan(prepared, folder, place)
    seconds = Seconds()
    run = open_run(
        plan,
        lambda rank: reader,
        _controller(plan),
        open_generator=open_generator,
        open_teachers=lambda rank: place.writers(plan),
        open_modules=lambda: TimedModules(teacher, learning),
    )
    run.validation = TimedValidation(run.validation, seconds)  # type: ignore[assignment]
    try:
        yield Opened(prepared, plan, run, seconds, teacher)
    finally:
        close_run(run)
        shutil.rmtree(folder, ignore_errors=True)


def _make_missing(cell: Cell, place: Workplace) -> None:
    """Make the prompts and students that the cell names and no cell before did."""
    for value in cell.options.values():
        to = place.folder / value
        if not value.startswith(MADE) or to.exists():
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        if value == PROMPTS:
            write_examples(to, place_config(KD, 0, place))
        elif value == EVEN:
            _train(BY_NAME["ce"], to, place)
        elif value in MAKERS:
            _train(MAKERS[value], to, place)
        elif value.startswith(TASKS):
            write_tasks(to.parent)
        else:
            write_random(to, like=place.root / config_of(KD, 0).student.model)


def _train(cell: Cell, to: Path, place: Workplace) -> None:
    """A model that other cells begin with: trained on the text, apart from all seeds."""
    with opened(cell, MADE_SEED, place) as it:
        train(it.run)
        RunDir(Path(it.plan.run_dir)).export.rename(to)


def place_config(cell: Cell, seed: int, place: Workplace) -> Config:
    """The resolved config of a cell in a workplace."""
    return config_of(cell, seed, root=place.root, folder=place.folder)


def _plan(prepared: Prepared, folder: Path, place: Workplace) -> RunPlan:
    """With rows in the order of their difficulty and a projection, where the cell asks for them.

    Whatever the teacher is shown in training, validation compares with it as it is without, so
    that all cells are measured alike.
    """
    engine = place.engine(prepared.teacher.model)
    fingerprint = engine.fingerprint
    projection = projection_of(prepared, fingerprint, lambda rank: place.asked(prepared))
    head = engine.ship_head() if prepared.config.targets.exact == "last_hidden" else None
    plan = run_plan(prepared, run_dir=folder, teacher=fingerprint, projection=projection, head=head)
    if plan.validation_question is not None:
        plan = replace(plan, validation_question=replace(plan.validation_question, prefix=""))
    return replace(plan, domains=_ordered(prepared, place))


def _ordered(prepared: Prepared, place: Workplace) -> tuple[PreparedDomain, ...]:
    """Scored by the teacher without prompts, once for all cells."""
    progressive = prepared.config.progressive
    if progressive is None:
        return prepared.domains
    plain = replace(prepared, showing=Showing())
    fingerprint = place.engine(prepared.teacher.model).fingerprint
    asked = ScoringModel(
        "teacher", fingerprint, lambda: nullcontext(lambda rank: place.asked(plain))
    )
    difficulty, parts = progressive.difficulty, progressive.phases
    return ordered_domains(
        plain, difficulty, parts=parts, teachers=dict.fromkeys(plain.teachers, asked), student=None
    )


def _controller(plan: RunPlan) -> Callable[[], ControllerClient]:
    """The controller in this process."""
    log = RunDir(Path(plan.run_dir)).weight_log
    natural = tuple(domain.natural_weight for domain in plan.domains)
    return lambda: Controller(ControllerPlan(plan.config, natural, str(log)))


def rows_of(plan: RunPlan) -> dict[str, list]:
    """Each domain's rows: the name of their folder, which is a hash of what decides them, rows and
    loss tokens."""
    return {
        domain.name: [Path(domain.train_path).parent.name, domain.num_rows, domain.num_loss_tokens]
        for domain in plan.domains
    }


def _before(it: Opened, place: Workplace) -> Path:
    """Where the evaluation of the student as it starts is kept; adapters that start at zero are
    the base student."""
    decisive = [it.plan.config.student.model, rows_of(it.plan), it.plan.teacher]
    decisive += [asdict(it.plan.validation_question)] if it.plan.validation_question else []
    key = xxhash.xxh3_64_hexdigest(json.dumps(decisive, sort_keys=True).encode())
    return place.folder / "before" / f"{key}.json"


def _lend_before(it: Opened, place: Workplace) -> None:
    kept = _before(it, place)
    if kept.exists():
        shutil.copy(kept, Path(it.plan.run_dir) / EVALUATIONS)


def _keep_before(it: Opened, place: Workplace) -> None:
    kept = _before(it, place)
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        measured = json.loads((Path(it.plan.run_dir) / EVALUATIONS).read_text())
        write_atomically(kept, json.dumps({"before": measured["before"]}))


def _record(cell: Cell, seed: int, it: Opened, *, cpu_s: float, wall_s: float) -> Record:
    files = RunDir(Path(it.plan.run_dir))
    evaluations = json.loads((files.path / EVALUATIONS).read_text())
    lines = read_metrics(files.metrics)
    log = read_log(files.weight_log, it.plan.config.domains)
    seconds, teacher = it.seconds, it.teacher
    training = cpu_s - teacher.cpu_s - seconds.decisions - seconds.evaluation
    return {
        "cell": cell.name,
        "seed": seed,
        "config": described(config_of(cell, seed)),
        "rows": rows_of(it.plan),
        "domains": {
            name: {
                "teacher_nll": evaluations["after"][name]["teacher_nll"],
                **{
                    f"{kind}_{when}": evaluations[when][name][column]
                    for when in ("before", "after")
                    for kind, column in (("nll", "student_nll"), ("kl", "kl"))
                },
                "sequences": sum(line.domains[name].sequences for line in lines),
            }
            for name in it.plan.config.domains
        },
        "calibration_error": student_calibration_error(it.run),
        "weights": [[entry.effective_from, *entry.weights] for entry in log.entries],
        "losses": [round(line.loss, 5) for line in lines],
        "steps": lines[-1].step,
        "tokens": sum(line.tokens for line in lines),
        "cpu_s": {
            "training": training,
            "decisions": seconds.decisions,
            "evaluation": seconds.evaluation,
            "teacher": teacher.cpu_s,
        },
        "teacher_tokens": teacher.tokens,
        "wall_s": wall_s,
    }
