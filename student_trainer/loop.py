"""The loop: draw sequences, get soft targets, take a step, tell the controller."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import xxhash

from shared.data.rows import Rows
from shared.errors import NonFiniteLossError
from shared.run.plan import OpenController, OpenRunReader, RunPlan
from shared.targets.generation import OpenGenerator, OpenTeachers
from shared.targets.lessons import OpenModules
from student_trainer.early import Early
from student_trainer.ending import (
    end_to_grow,
    export,
    foresee,
    go_on,
    is_finished,
    say_stopped,
    stepping,
    stop_if_asked,
)
from student_trainer.engine import backward, take_step
from student_trainer.evaluation.evaluations import evaluate, evaluate_only, forget_after
from student_trainer.evaluation.reports import catch_up, report
from student_trainer.metrics.accumulator import Stopwatch
from student_trainer.metrics.progress import introduce, write_line
from student_trainer.metrics.sums import POLICY
from student_trainer.run import Run, close_run, open_run
from student_trainer.schedule import learning_rate
from student_trainer.sources.batches import Batch, Step
from student_trainer.sources.data_set import DataSet
from student_trainer.sources.generated.rollouts import Rollouts
from student_trainer.sources.source import OpenSource
from student_trainer.state.resume import restore, save
from student_trainer.tasks.registry import task_of
from student_trainer.tasks.task import Task
from student_trainer.weighing.reinforced import Selection
from student_trainer.weighing.weighed import weighed_batches, weighers_of
from student_trainer.weighing.weightings import follow_step, reports_of_weighting

log = logging.getLogger(__name__)


def run_plan(
    plan: RunPlan,
    open_reader: OpenRunReader | None,
    open_controller: OpenController,
    *,
    open_source: OpenSource = DataSet,
    task: Task | None = None,
    early: Early | None = None,
    open_generator: OpenGenerator | None = None,
    open_teachers: OpenTeachers | None = None,
    open_modules: OpenModules | None = None,
) -> None:
    """Train, or evaluate, as the plan's mode says; `open_generator` is for a student that writes,
    `open_teachers` for teachers that do, `open_modules` for one whose modules learn; `task` is that
    of the config where none is given. A finished run is left alone."""
    if is_finished(plan):
        log.info("%s is finished already", plan.run_dir)
        return
    task = task or task_of(plan.config)
    load = task.load if early is None else early.load
    run = open_run(
        plan,
        open_reader,
        open_controller,
        open_source=open_source,
        task=task,
        load=load,
        open_generator=open_generator,
        open_teachers=open_teachers,
        open_modules=open_modules,
    )
    try:
        if plan.mode == "train":
            train(run, early)
        else:
            if early is None or not early.is_exported:
                restore(run)
            evaluate_only(run)
    finally:
        close_run(run)


def train(run: Run, early: Early | None = None) -> None:
    """One run from its last checkpoint, or its beginning, to its export."""
    step = restore(run)
    go_on(run, step)
    introduce(run)
    evaluate(run, "before")
    catch_up(run, step)
    if not run.is_over(step):
        forget_after(run)
    with stepping(run):
        step = steps(run, step, early)
    say_stopped(run, step)
    evaluate(run, "after")
    export(run, step)


def steps(run: Run, step: int, early: Early | None = None) -> int:
    """Take steps from `step` on until training is over; returns how many are done.

    Raises StoppedError, once what is learnt is saved, where somebody asks for it.
    """
    config = run.config
    while not run.is_over(step):
        stop_if_asked(run, step)
        if step in run.decisions:
            report(run, step)
        follow_validation(run, step)
        watch = Stopwatch(run.reader)
        if run.followed is not None:
            run.followed.follow(step)
        drawn = run.loader.step(step)
        if run.online is not None:
            run.online.teach(drawn)
        reseed(config.seed, step=step, rank=run.ranks.rank)
        with watch.timed("compute"):
            sums = learn(run, drawn)
        follow_weighting(run, drawn, sums)
        lr = learning_rate(config.optimiser, step=step, steps=config.steps)
        with balancing(run, drawn) as factors, watch.timed("optimiser"):
            grad_norm = take_step(run.engine, config, lr=lr, factors=factors)
        refuse_non_finite(run, drawn, grad_norm)
        follow_taid(run, drawn, sums)
        step += 1
        if early is not None:
            early.stepped(run)
        if run.due(config.checkpoints.every, step):
            run.loader.settle()  # what a checkpoint waits for is time of training
        machine = watch.machine()
        foresee(run, step, seconds=machine[0])
        run.metrics.add(drawn, sums, machine)
        run.since_report.add(drawn, sums)
        if isinstance(run.source, Rollouts):
            run.rollouts.add(drawn, effort=run.source.take_effort())
        if run.due(config.log_every, step):
            write_line(run, step, lr=lr, grad_norm=grad_norm)
        if run.due(config.checkpoints.every, step):
            save(run, step)
            end_to_grow(run, step)
    stop_if_asked(run, step)
    return step


def learn(run: Run, drawn: Step) -> np.ndarray:
    """Form the gradient of a step; returns its sums over all ranks, as `SumLayout` has them.

    Each micro-batch's loss is a sum over its positions times world size / tokens of the step: the
    engine takes the mean over ranks, which makes it the mean over the step's tokens.
    Raises NonFiniteLossError on every rank before any weight changes.
    """
    multiplier = run.ranks.world_size / max(1, drawn.tokens)
    sums, weighted = torch.zeros(()), []
    for number, (rows, batch) in enumerate(batches(run, drawn), start=1):
        loss, unit_sums, weighted_N = run.engine(
            batch,
            multiplier=multiplier,
            phase=drawn.phase,
            teacher_share=run.taid.teacher_share,
            weighting=run.weighting,
        )
        backward(run.engine, loss, last=number == len(drawn.units))
        sums = sums.to(unit_sums.device) + unit_sums
        weighted.append((rows, weighted_N, batch["row_N"]))
    total = run.ranks.sum(sums.cpu().numpy())
    if not np.isfinite(total).all():
        bad = [name for unit in weighted for name in rows_with_bad_loss(*unit)]
        raise non_finite("the loss", drawn, run.ranks.gather(bad))
    return total


@contextmanager
def balancing(run: Run, drawn: Step) -> Iterator[Mapping[str, float]]:
    """What the learning rates of a student's sides are multiplied by in the update of a `with`,
    which is looked at where they are kept in step."""
    if run.balance is None:
        yield {}
        return
    with run.balance.watching(run.balance.chosen(drawn, run.layouts)):
        yield run.balance.factors


def batches(run: Run, drawn: Step) -> Iterator[tuple[Rows, Batch]]:
    """The step's units and their tensors, in order, the teacher's answers taken one by one.

    A loss that weighs the step's positions needs the answers of all ranks and units before the
    first forward pass: how a step is cut then changes nothing.
    """
    weighers, answers = weighers_of(run.config.losses), run.loader.answers(drawn)
    if not weighers:
        for rows, answer in zip(drawn.units, answers, strict=True):
            yield rows, run.layouts.batch(rows, answer)
        return
    weighed = weighed_batches(
        list(zip(drawn.units, answers, strict=True)),
        run.layouts,
        weighers,
        engine=run.engine,
        gather=run.ranks.gather,
    )
    yield from zip(drawn.units, weighed, strict=True)


def follow_taid(run: Run, drawn: Step, sums: np.ndarray) -> None:
    """Let TAID's target follow a step's loss; `sums` are those of all ranks, on every rank."""
    term = run.config.taid
    if term is None or not drawn.tokens:
        return
    layout = run.metrics.layout
    name = layout.losses[run.config.losses.index(term)]
    loss = layout.losses_in(sums)[name] / drawn.tokens
    run.taid.follow(loss, term, step=drawn.index, steps=run.config.steps)


def follow_weighting(run: Run, drawn: Step, sums: np.ndarray) -> None:
    """Let the weighting, where there is one, follow a step's sums, those of all ranks; raises
    WeightingError, on every rank, where it left nothing of the step."""
    if run.weighting is None:
        return
    layout = run.metrics.layout
    found = {n: sums[layout.place(n)] for n in reports_of_weighting(run.config.weighting)}
    policy_F = sums[layout.place(POLICY)]
    follow_step(run.weighting, found, drawn.domain_tokens_D, step=drawn.index, policy_F=policy_F)


def follow_validation(run: Run, step: int) -> None:
    """Let what follows the validation loss look at it before this step, where it is due: the
    student's share of the text, and a policy that selects; all ranks together."""
    adaptive = run.source.adaptive if isinstance(run.source, Rollouts) else None
    if adaptive is not None and adaptive.is_due(step):
        adaptive.follow(run.validation.sums(run.engine).mean_nll)
    selection = run.weighting
    if isinstance(selection, Selection) and selection.is_due(step):
        selection.look(run.validation.sums(run.engine, rows=selection.rows).mean_nll)


def refuse_non_finite(run: Run, drawn: Step, grad_norm: float) -> None:
    """Raise NonFiniteLossError where the step just taken had no finite gradient."""
    if not np.isfinite(grad_norm):
        names = [name for rows in drawn.units for name in rows.names()]
        raise non_finite("the gradient", drawn, run.ranks.gather(names))


def rows_with_bad_loss(rows: Rows, weighted_N: torch.Tensor, row_N: torch.Tensor) -> list[str]:
    """Names of the rows of a unit with a position whose loss is NaN or infinite."""
    bad = row_N[~torch.isfinite(weighted_N)].unique().tolist()
    names = rows.names()
    return [names[row] for row in bad]


def non_finite(what: str, drawn: Step, names_by_rank: list[list[str]]) -> NonFiniteLossError:
    """The sentence for a step that must not be learnt from."""
    names = sorted(name for own in names_by_rank for name in own)
    domains = sorted({name.rpartition("/")[0] for name in names})
    return NonFiniteLossError(
        f"{what} of step {drawn.index + 1} is not finite, in {', '.join(domains)}, rows "
        f"{', '.join(names)}; look at these rows, or lower optimiser.lr and start over with "
        "--fresh, which moves this run aside"
    )


def reseed(seed: int, *, step: int, rank: int) -> None:
    """Set every random generator from (seed, step, rank), so that dropout survives a resume."""
    torch.manual_seed(xxhash.xxh64_intdigest(f"{seed}/{step}/{rank}".encode()) >> 1)
