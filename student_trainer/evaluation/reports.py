"""Reports to the controller: how the student does, domain by domain, before a decision.

G domains in config order
"""

from dataclasses import replace

from shared.errors import TutelageError
from shared.mixture.weight_log import DomainReport, read_log
from student_trainer.evaluation.evaluations import read_evaluations
from student_trainer.evaluation.validation import ValidationSums
from student_trainer.run import Run


def report(run: Run, step: int) -> None:
    """Tell the controller how the student does, as its policy needs; rank 0 alone talks. Where
    weights are replayed they are decided already."""
    config = run.config
    if run.plan.replays or config.decision_interval is None:
        return
    if not (step or config.mixture.opens_with_report):
        return
    sums = run.validation.sums(run.engine) if config.decides_from_validation else None
    error = None
    if run.ranks.leads:
        assert run.controller is not None, "rank 0 has a controller"
        try:
            run.controller.observe(_domain_report(run, step, sums))
        except TutelageError as failure:
            error = failure
    run.ranks.agree(error)
    run.since_report.clear()


def catch_up(run: Run, step: int) -> None:
    """Hand over the reports for decisions before `step` that are missing: those of a run that takes
    more steps than it was to, as they would have ruled beyond its end."""
    decided, due = 0, [decision for decision in run.decisions if decision < step]
    if run.ranks.leads:
        entries = read_log(run.files.weight_log, run.config.domains).entries
        stopped = bool(entries) and entries[-1].stop
        decided = len(due) if stopped else len(entries)
    for missing in due[run.ranks.from_leader(decided) :]:
        report(run, missing)


def _domain_report(run: Run, step: int, sums: ValidationSums | None) -> DomainReport:
    learnt = run.since_report
    found = DomainReport(
        step=step,
        training_tokens=tuple(learnt.tokens_D.tolist()),
        training_kl_sums=tuple(learnt.by_domain("kl").tolist()),
        training_excess_sums=tuple(learnt.by_domain("excess").tolist()),
    )
    if sums is None:
        return found
    before = read_evaluations(run.files.path)["before"]
    return replace(
        found,
        student_nll_sums=tuple(sums.student_nll_G.tolist()),
        num_tokens=tuple(int(n) for n in sums.tokens_G),
        teacher_nlls=tuple(before[name]["teacher_nll"] for name in run.config.domains),
    )
